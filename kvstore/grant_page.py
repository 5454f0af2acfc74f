"""Demands, grants and counters as words in shared memory, and which side writes them. No policy: see `arbiter`.

Each attached worker has a slot of 64-bit words:

    word              set by     cleared by
    GRANTED_STEPS     kvstore    the worker; kvstore after the exit of its processes
    RECALLED          kvstore    kvstore
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

    DEMAND = 0
    """1: the worker has something to compute."""
    GRANTED_STEPS = 1
    """Steps that the worker may compute before it reads ``RECALLED``; 0: it may not compute."""
    RECALLED = 2
    """1: the worker returns its grant after these steps. 0: it keeps the grant."""
    PRIORITY = 3
    """Best priority class of the sequences to compute."""
    SLACK_US = 4
    """Microseconds until the first of these sequences misses its latency target; 0: no target."""
    NUM_STEPS = 8
    """This word and those up to NUM_GRANTS are counters since the worker attached."""
    NUM_COMPUTED_TOKENS = 9
    KV_BYTES_WRITTEN = 10
    BUSY_NS = 11
    HEARTBEATS = 12
    SWAP_OUT_BYTES = 13
    SWAP_IN_BYTES = 14
    SWAP_NS = 15
    NUM_GRANTS = 16
    FIRST_COST = 24


class GrantPage:
    """The words, over a mapping that kvstore and its workers share. An aligned 8-byte store is atomic."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("q")
        self._floats = memoryview(self._map).cast("d")

    def read(self, slot: int, word: Word) -> int:
        return self._words[slot * _WORDS_PER_SLOT + word]

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
