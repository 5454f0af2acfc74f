"""Demands, grants and counters as words in shared memory, and which side writes them. No policy: see `arbiter`.

Each attached worker has a slot of 64-bit words:

    word              set by     cleared by
    GRANTED_STEPS     kvstore    the worker; kvstore after the exit of its processes
    RECALLED          kvstore    kvstore
    STEP_END_US       kvstore    kvstore
    LONGEST_STEP_US   kvstore    kvstore
    all others        the worker

Eventfds carry the wake-ups: the doorbell wakes kvstore, and each worker has a bell. A worker that keeps its grant makes
no system call for it.
"""

from __future__ import annotations

import mmap
from dataclasses import astuple
from enum import IntEnum

from muxmesh.step_cost import StepCost

MAX_WORKERS = 128
_WORDS_PER_SLOT = 32
PAGE_BYTES = 8 * MAX_WORKERS * _WORDS_PER_SLOT
_COST_WORDS = 5


class Word(IntEnum):
    """Indices of the words of a slot. From ``FIRST_COST`` on the words are floats: the fields of a `StepCost`."""

    GRANTED_STEPS = 0
    """Steps that the worker may compute before it reads ``RECALLED``; 0: it may not compute."""
    DEMAND = 1
    """1: the worker has something to compute. It stays 1 until the worker has seen its grant."""
    RECALLED = 2
    """1: the worker returns its grant after these steps. 0: it keeps the grant."""
    PRIORITY = 3
    """Best priority class of the sequences to compute."""
    DUE_US = 4
    """Monotonic time, in microseconds, at which the first of these sequences that can still meet its latency target has
    to compute; 0: no target.
    """
    LOST_US = 5
    """Monotonic time, in microseconds, from which on that sequence has missed its target; in the past if all have. 0:
    never.
    """
    ARRIVED_US = 6
    """Unix time, in microseconds, at which the oldest request among these sequences arrived; 0: not known."""
    BUSY_NS = 7
    """This word and those up to GRANT_WAIT_NS are counters since the worker attached."""
    NUM_STEPS = 8
    NUM_COMPUTED_TOKENS = 9
    KV_BYTES_WRITTEN = 10
    HEARTBEATS = 11
    SWAP_OUT_BYTES = 12
    SWAP_IN_BYTES = 13
    SWAP_NS = 14
    NUM_GRANTS = 15
    GRANT_WAIT_NS = 16
    STEP_END_US = 17
    """Monotonic time, in microseconds, by which a step with prompts has to end for those that wait; 0: none."""
    LONGEST_STEP_US = 18
    """Maximum duration of a step with prompts, in microseconds, whichever worker waits; 0: no limit."""
    FIRST_COST = 24


class GrantPage:
    """The words, over a mapping that kvstore and its workers share. An aligned 8-byte store is atomic."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("q")
        self._floats = memoryview(self._map).cast("d")

    def read(self, slot: int, word: Word) -> int:
        return self._words[slot * _WORDS_PER_SLOT + word]

    def read_demand(self, slot: int) -> list[int]:
        """The words GRANTED_STEPS to BUSY_NS of a slot, read in this order. Not atomic.

        The order matters: without a grant DEMAND changes from 0 to 1 only. Were it read first, a whole step between the
        two reads would make the demand that was granted look like one that waits.
        """
        first = slot * _WORDS_PER_SLOT
        return self._words[first : first + Word.BUSY_NS + 1].tolist()

    def write(self, slot: int, word: Word, value: int) -> None:
        self._words[slot * _WORDS_PER_SLOT + word] = value

    def add(self, slot: int, word: Word, value: int) -> None:
        """Adds to a word. Not atomic: only for the one process that writes the word."""
        self._words[slot * _WORDS_PER_SLOT + word] += value

    def clear(self, slot: int) -> None:
        """Zeroes a slot for its next worker."""
        for word in range(_WORDS_PER_SLOT):
            self._words[slot * _WORDS_PER_SLOT + word] = 0

    def read_cost(self, slot: int) -> StepCost | None:
        """Step cost that the slot's worker wrote; None before its first step."""
        first = slot * _WORDS_PER_SLOT + Word.FIRST_COST
        cost = StepCost(*self._floats[first : first + _COST_WORDS])
        return cost if cost.step_s(1, 1) > 0 else None

    def write_cost(self, slot: int, cost: StepCost) -> None:
        """Writes the worker's step cost. Not atomic: a reader may see a part of the new values."""
        first = slot * _WORDS_PER_SLOT + Word.FIRST_COST
        for index, value in enumerate(astuple(cost)):
            self._floats[first + index] = value
