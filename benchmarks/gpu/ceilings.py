"""What the card can do at most, measured: speed of a copy on the device, and of a matrix product."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Ceilings:
    """``copy_bytes_s`` counts bytes read and written. ``flop_s``: of a product in bf16."""

    copy_bytes_s: float
    flop_s: float


def measure_ceilings(copied_bytes: int = 4 << 30, size: int = 8192) -> Ceilings:
    """Copies random bytes, larger than any cache, and multiplies random matrices of ``size``."""
    return Ceilings(2 * copied_bytes / _copy_s(copied_bytes), 2 * size**3 / _product_s(size))


def _copy_s(num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_(255)
    target = torch.empty_like(source)
    return median_s(lambda: target.copy_(source), 10)


def _product_s(size: int) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return median_s(lambda: a @ b, 20)


def median_s(enqueue: Callable[[], Any], count: int, warm_ups: int = 3) -> float:
    """Median device time of ``enqueue`` in seconds, by events on the present stream, after ``warm_ups`` calls."""
    for _ in range(warm_ups):
        enqueue()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        enqueue()
        event.record()
    events[-1].synchronize()
    times = sorted(first.elapsed_time(last) / 1e3 for first, last in itertools.pairwise(events))
    return float(times[len(times) // 2])
