"""Compiles the sampling kernel for vocabularies as `compiled_kernels` compiles the others; same output.

python -m tests.support.compiled_sampling 90 128256
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton

from muxmesh.engine.native.cuda.sampling_kernel import BLOCK, sample_kernel, sample_rows
from tests.support.compiled_kernels import CompileOnlyDriver, _read


def main() -> None:
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    for vocab_size in map(int, sys.argv[2:]):
        sample_kernel.device_caches.clear()
        integers, numbers = torch.zeros(2, dtype=torch.int64), torch.zeros((4, 2), dtype=torch.float64)
        likely = torch.zeros((2, BLOCK), dtype=torch.int32)
        sample_rows(torch.zeros(2, vocab_size), numbers, numbers[0], integers, integers, likely)
        for compiled in sample_kernel.device_caches[capability][0].values():
            sys.stdout.write(json.dumps({"vocab_size": vocab_size} | asdict(_read(compiled, capability))) + "\n")


if __name__ == "__main__":
    main()
