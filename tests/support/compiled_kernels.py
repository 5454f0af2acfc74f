"""Compiles the GPU kernels as their wrappers launch them, for a device that this machine need not have, and prints what
came out as one line of JSON per kernel: registers, spills, shared memory, widths of loads, matrix instructions.

`CompileOnlyDriver` is a driver of Triton whose launches do nothing, so the arguments, and what Triton specializes on,
are those of the engine. Run it in a process without TRITON_INTERPRET:

    python -m tests.support.compiled_kernels 90 bf16/bf16/128/4
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from muxmesh.engine.native.cuda.attention import decode_attention, prefill_attention
from muxmesh.engine.native.cuda.attention_kernels import decode_kernel, merge_kernel, prefill_kernel
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan, prefill_tiles
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.row_kernels import (
    HeadNorms,
    rotate_and_write,
    rotate_and_write_kernel,
    silu_and_multiply,
    silu_kernel,
)
from muxmesh.engine.native.cuda.sampling_kernel import BLOCK as SAMPLED_AT_A_TIME
from muxmesh.engine.native.cuda.sampling_kernel import sample_kernel, sample_rows

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SHARED_BYTES = {80: 166912, 90: 232448}
"""Most shared memory of a program, by compute capability."""
_NUM_SMS = 132
_KV_HEADS = 8


@dataclass(frozen=True)
class Compiled:
    """What one kernel was compiled to. loads: number of loads from global memory in its PTX by bytes per thread."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    wide_copies: int
    """Asynchronous copies of 16 bytes from global to shared memory."""
    narrow_copies: int
    """Those of fewer bytes."""
    wgmma: int
    mma: int


class CompileOnlyDriver(DriverBase):  # type: ignore[misc]
    """Compiles for ``capability`` (80, 90). The number of the device is its capability, so that caches are apart."""

    def __init__(self, capability: int) -> None:
        super().__init__()
        self.capability = capability
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": _SHARED_BYTES[capability]},
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        )
        self.launcher_cls = lambda *_: lambda *_: None

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError(ty)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return device * 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Kind:
    """What kernels are compiled for: dtypes of q and the pool, head size, query heads per KV head."""

    dtype: str
    kv_dtype: str
    head_dim: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Kind:
        """Reads ``bf16/bf16/128/4``. Raises ValueError."""
        dtype, kv_dtype, head_dim, group = text.split("/")
        return cls(dtype, kv_dtype, int(head_dim), int(group))

    def layout(self, block_size: int) -> KvLayout:
        """A layout of four layers whose slabs end with elements that belong to no token block."""
        token_block = 4 * _KV_HEADS * 2 * block_size * self.head_dim
        return KvLayout(self.head_dim, block_size, _KV_HEADS, 3, 3 * token_block + 64, token_block)


def compile_attention(capability: int, kind: Kind, block_size: int = 16) -> Iterator[Compiled]:
    """Compiles attention for one kind of model, decode with and without a split; yields each result."""
    head_dim, dtype, heads = kind.head_dim, DTYPES[kind.dtype], _KV_HEADS * kind.group
    layout = kind.layout(block_size)
    plan = AttentionPlan.of(layout, heads, dtype.itemsize, divmod(capability, 10), _NUM_SMS)
    q = torch.empty(2, heads, head_dim, dtype=dtype)
    pool = torch.empty(64, dtype=DTYPES[kind.kv_dtype])
    tables, integers = torch.zeros(2, 256).int(), torch.zeros(2).int()
    workspace = torch.empty(plan.workspace_elements(2, 256))

    def launch() -> None:
        decode_attention(q, pool, plan, 1, tables, integers, q, workspace)
        decode_attention(q, pool, plan, 1, tables[:, :1], integers, q, workspace)
        prefill_attention(q, pool, plan, 1, tables, torch.from_numpy(prefill_tiles(plan, [0], [2], [7])), q)

    return compiled_by(launch, capability, decode_kernel, merge_kernel, prefill_kernel)


def compile_step_kernels(capability: int, kind: Kind, block_size: int = 16) -> Iterator[Compiled]:
    """Compiles the other kernels of a step: rotation with and without norms, the gate, and sampling."""
    head_dim, dtype, heads = kind.head_dim, DTYPES[kind.dtype], _KV_HEADS * kind.group
    layout = kind.layout(block_size)
    qkv, q = (torch.empty(2, count, head_dim, dtype=dtype) for count in (heads + 2 * _KV_HEADS, heads))
    angles, weights = torch.empty(64, head_dim // 2), torch.empty(head_dim, dtype=dtype)
    pool, integers = torch.empty(64, dtype=DTYPES[kind.kv_dtype]), torch.zeros(2).int()

    def launch() -> None:
        for norms in (None, HeadNorms(weights, weights, 1e-6)):
            rotate_and_write(qkv, norms, angles, angles, integers, integers, pool, layout, 1, q)
        silu_and_multiply(torch.empty(2, 512, dtype=dtype), torch.empty(2, 256, dtype=dtype))
        launch_sampling(128_256)

    return compiled_by(launch, capability, rotate_and_write_kernel, silu_kernel, sample_kernel)


def launch_sampling(vocab_size: int) -> None:
    """Samples two rows of logits."""
    results = torch.zeros(2, dtype=torch.int64)
    numbers, likely = torch.empty(5, 2, dtype=torch.float64), torch.empty(2, SAMPLED_AT_A_TIME, dtype=torch.int32)
    sample_rows(torch.empty(2, vocab_size), numbers[:4], numbers[4], results, results, likely)


def compiled_by(launch: Callable[[], None], capability: int, *kernels: Any) -> Iterator[Compiled]:
    """Yields what ``kernels`` are compiled to for the launches of ``launch``."""
    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    for kernel in kernels:
        kernel.device_caches.clear()
    launch()
    for kernel in kernels:
        for compiled in kernel.device_caches[capability][0].values():
            yield _read(compiled, capability)


def _read(compiled: Any, capability: int) -> Compiled:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch", arch, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    copies = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+)", ptx)]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return Compiled(
        kernel=compiled.metadata.name,
        registers=max(int(used) for used in re.findall(r"Used (\d+) registers", report)),
        spill_bytes=sum(int(size) for size in spills),
        shared_bytes=compiled.metadata.shared,
        loads=dict(sorted(Counter(_load_bytes(ptx)).items())),
        wide_copies=sum(size == 16 for size in copies),
        narrow_copies=sum(size < 16 for size in copies),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
    )


def _load_bytes(ptx: str) -> Iterator[int]:
    for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+) ", ptx):
        yield int(vector or 1) * int(bits) // 8


def compiled_elsewhere(module: str, capability: int, *arguments: str) -> list[Any]:
    """Runs ``module`` in a process of its own, as this one interprets kernels; returns one dict per kernel."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(capability), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, choices=list(_SHARED_BYTES))
    parser.add_argument(
        "kinds", metavar="KIND", nargs="+", type=Kind.parse, help="q/pool/head size/group: bf16/f16/128/4"
    )
    parser.add_argument("--step", action="store_true", help="the kernels beside attention")
    arguments = parser.parse_args()
    compile_kind = compile_step_kernels if arguments.step else compile_attention
    for kind in arguments.kinds:
        for compiled in compile_kind(arguments.capability, kind):
            sys.stdout.write(json.dumps(asdict(kind) | asdict(compiled)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
