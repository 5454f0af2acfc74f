"""What it costs to free the memory of a sequence: seconds to swap its KV out and in, or to compute it again. Pure.

Knows no lease, no queue and no KV format: callers pass bytes and measured rates. A swap runs beside compute, whereas a
recomputation takes the device from other sequences, so of two equal costs the swap delays others less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from muxmesh.step_cost import StepCost

PREFILL_CHUNK_TOKENS = 128
"""Tokens of a prefill step, unless the caller knows the model's `prefill_token_budget`."""


@dataclass(frozen=True, slots=True)
class CopyRates:
    """Rates of copies between the pool and the swap region, of one worker. All are positive; ``fixed_s`` may be 0."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    fixed_s: float = 0.0
    """Seconds of a swap out and in beside the copies: the calls to kvstore."""


def copy_s(num_bytes: float, bytes_per_s: float) -> float:
    """Seconds to copy ``num_bytes`` in one direction; infinite at a rate of 0 unless there is nothing to copy."""
    if num_bytes <= 0:
        return 0.0
    return num_bytes / bytes_per_s if bytes_per_s > 0 else math.inf


def swap_s(out_bytes: float, rates: CopyRates, in_bytes: float | None = None) -> float:
    """Seconds to copy ``out_bytes`` out and later ``in_bytes`` in, without the wait in between.

    ``in_bytes`` is less than ``out_bytes`` if the prefix cache still holds a part of the KV. None: all of it.
    """
    copied_in = out_bytes if in_bytes is None else in_bytes
    return rates.fixed_s + copy_s(out_bytes, rates.out_bytes_per_s) + copy_s(copied_in, rates.in_bytes_per_s)


def recompute_s(
    num_tokens: int, cost: StepCost, num_cached_tokens: int = 0, chunk: int = PREFILL_CHUNK_TOKENS
) -> float:
    """Seconds to compute the KV of ``num_tokens`` tokens again, in prefill steps of ``chunk`` tokens.

    ``num_cached_tokens``: the first tokens, which the prefix cache holds. ``cost``: of the worker that prefills.
    """
    num_cached = min(max(0, num_cached_tokens), num_tokens)
    return cost.prefill_s(num_tokens - num_cached, num_cached, chunk) if num_cached < num_tokens else 0.0


def break_even_bytes_per_s(num_bytes: float, recomputed_s: float, fixed_s: float = 0.0) -> float:
    """The rate, in each direction, at which a swap of ``num_bytes`` takes as long as ``recomputed_s``.

    Infinite if the swap's ``fixed_s`` alone take longer.
    """
    return 2 * num_bytes / (recomputed_s - fixed_s) if recomputed_s > fixed_s else math.inf


def crossover_tokens(
    swapped_s: Callable[[int], float], recomputed_s: Callable[[int], float], max_tokens: int
) -> int | None:
    """The least number of tokens from which on, up to ``max_tokens``, a swap takes no longer than to recompute.

    Both functions give seconds for a number of tokens, at least 1. None: recomputing ``max_tokens`` is faster.
    """
    first = max_tokens + 1
    while first > 1 and swapped_s(first - 1) <= recomputed_s(first - 1):
        first -= 1
    return first if first <= max_tokens else None
