"""What it costs to free the token blocks of a sequence in each way, and which way costs least. Pure.

A cost is delay in seconds, summed over the sequences that are delayed. It depends on how long the sequence will wait
anyway, its expected waiting time (EWT; Zhao et al., ALISE, ICCAD 2024): a copy back that ends before its turn delays no
sequence. InferCept (Abhyankar et al., ICML 2024) compares the same three by the memory that they waste.

    keep        those that need the memory wait until enough sequences of the batch have ended
    swap        they wait for the copy out; the sequence is late if both copies take longer than it waits
    recompute   no sequence waits for memory; the prefill delays the sequence and all others that the device computes
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heapreplace

from muxmesh.kv_cost import PREFILL_CHUNK_TOKENS, CopyRates, copy_s, recompute_s, swap_s
from muxmesh.step_cost import UNMEASURED, StepCost

ASSUMED_BYTES_PER_S = 4e9
"""Rate of copies before the first one was measured."""
CALLS_S = 0.002
"""Seconds of a swap beside its copies: the calls of the worker to kvstore."""
_ASSUMED_RATES = CopyRates(ASSUMED_BYTES_PER_S, ASSUMED_BYTES_PER_S, CALLS_S)


@dataclass(frozen=True, slots=True)
class KvCosts:
    """What moving and computing the KV of one model costs on this unit, as measured. ``prefill_chunk`` in tokens."""

    rates: CopyRates = _ASSUMED_RATES
    prefill: StepCost = UNMEASURED.prefill
    prefill_chunk: int = PREFILL_CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class WayCosts:
    """Cost of each way to deal with one sequence's KV; infinite where a way is not possible."""

    keep: float
    swap: float
    recompute: float

    @property
    def best(self) -> str:
        """Name of the way that costs least; of equal ones the first of swap, recompute, keep."""
        return min(("swap", "recompute", "keep"), key=lambda way: float(getattr(self, way)))


def expected_wait_s(num_slots: int, running_s: Iterable[float], before_s: Iterable[float]) -> float:
    """Seconds until a sequence gets one of ``num_slots`` slots, by list scheduling (Graham, 1966).

    ``running_s``: remaining seconds of the sequences that have slots. ``before_s``: those of the sequences that wait
    and get slots before it, in order.
    """
    slots = sorted(running_s)[-num_slots:]
    slots += [0.0] * (num_slots - len(slots))
    heapify(slots)
    for work_s in before_s:
        heapreplace(slots, slots[0] + work_s)
    return slots[0]


def free_after_s(num_blocks: int, running: Iterable[tuple[float, int]]) -> float:
    """Seconds until sequences that end have freed ``num_blocks`` token blocks; infinite if they have fewer.

    ``running``: remaining seconds and token blocks of each.
    """
    if num_blocks <= 0:
        return 0.0
    for remaining_s, num_held in sorted(running):
        num_blocks -= num_held
        if num_blocks <= 0:
            return remaining_s
    return math.inf


def keep_cost_s(freed_after_s: float, num_waiting: int) -> float:
    """Cost of letting ``num_waiting`` sequences wait until memory is free by itself, after ``freed_after_s``."""
    return freed_after_s * max(1, num_waiting)


def swap_cost_s(num_bytes: int, wait_s: float, costs: KvCosts, queued_bytes: int = 0) -> float:
    """Cost of a swap of ``num_bytes``. ``wait_s``: see `expected_wait_s`. ``queued_bytes``: copies before this one."""
    rates = costs.rates
    queued_s = copy_s(queued_bytes, rates.out_bytes_per_s)
    return queued_s + copy_s(num_bytes, rates.out_bytes_per_s) + max(0.0, queued_s + swap_s(num_bytes, rates) - wait_s)


def recompute_cost_s(num_tokens: int, num_others: int, costs: KvCosts) -> float:
    """Cost of computing ``num_tokens`` again while the device computes ``num_others`` other sequences."""
    return recompute_s(num_tokens, costs.prefill, chunk=costs.prefill_chunk) * (1 + num_others)
