"""Compiles the sampling kernel for vocabularies as `compiled_kernels` compiles the others; same output.

python -m tests.support.compiled_sampling 90 128256
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict

from muxmesh.engine.native.cuda.sampling_kernel import sample_kernel
from tests.support.compiled_kernels import compiled_by, launch_sampling


def main() -> None:
    capability = int(sys.argv[1])
    for vocab_size in map(int, sys.argv[2:]):
        launch = functools.partial(launch_sampling, vocab_size)
        for compiled in compiled_by(launch, capability, sample_kernel):
            sys.stdout.write(json.dumps({"vocab_size": vocab_size} | asdict(compiled)) + "\n")


if __name__ == "__main__":
    main()
