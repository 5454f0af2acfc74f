"""A kernel that reads at an address where nothing is mapped: it faults the process, and under MPS all clients."""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl


def read_nowhere() -> None:
    """Enqueues the read."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    _read[(1,)](out, 1 << 44)


@triton.jit
def _read(out, offset):
    tl.store(out, tl.load(out + offset))
