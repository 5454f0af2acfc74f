"""Demand, grants and counters as words in shared memory, and who writes which. No policy: see `arbiter`.

Each attached worker has a slot of 64-bit words. ``granted`` is set by kvstore and cleared by the worker (or by kvstore,
once the worker's process is certainly gone); everything else in a slot is written by its worker alone. ``wanted``, one
word for the unit, is written by kvstore: somebody waits, so the holder gives way after its step. Two eventfds carry
the wake-ups: one doorbell to kvstore, one bell to each worker. A worker that computes alone rings nobody.
"""

from __future__ import annotations

import mmap
from dataclasses import astuple
from enum import IntEnum

from muxmesh.cost import StepCost

MAX_WORKERS = 128
_WORDS_PER_SLOT = 16
_HEADER_WORDS = 8
PAGE_BYTES = 8 * (_HEADER_WORDS + MAX_WORKERS * _WORDS_PER_SLOT)
_WANTED = 0
_COST_WORDS = 5


class Word(IntEnum):
    """The words of a slot. From ``FIRST_COST`` on there are floats, the fields of a `StepCost`."""

    DEMAND = 0
    GRANTED = 1
    NUM_STEPS = 2
    NUM_COMPUTED_TOKENS = 3
    KV_BYTES_WRITTEN = 4
    BUSY_NS = 5
    HEARTBEATS = 6
    SWAP_OUT_BYTES = 7
    SWAP_IN_BYTES = 8
    SWAP_NS = 9
    FIRST_COST = 10


class GrantPage:
    """The words, over a mapping that kvstore and its workers share. An aligned 8-byte store is atomic."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("q")
        self._floats = memoryview(self._map).cast("d")

    def read(self, slot: int, word: Word) -> int:
        """A word of a slot."""
        return self._words[_HEADER_WORDS + slot * _WORDS_PER_SLOT + word]

    def write(self, slot: int, word: Word, value: int) -> None:
        """Sets a word of a slot."""
        self._words[_HEADER_WORDS + slot * _WORDS_PER_SLOT + word] = value

    def add(self, slot: int, word: Word, value: int) -> None:
        """Adds to a counter; only its one writer may."""
        self._words[_HEADER_WORDS + slot * _WORDS_PER_SLOT + word] += value

    def clear(self, slot: int) -> None:
        """Zeroes a slot for its next worker."""
        for word in range(_WORDS_PER_SLOT):
            self._words[_HEADER_WORDS + slot * _WORDS_PER_SLOT + word] = 0

    def read_cost(self, slot: int) -> StepCost:
        """What a worker's steps take; all 0 before its first."""
        first = _HEADER_WORDS + slot * _WORDS_PER_SLOT + Word.FIRST_COST
        return StepCost(*self._floats[first : first + _COST_WORDS])

    def write_cost(self, slot: int, cost: StepCost) -> None:
        """What this worker's steps take. A reader may see a part of it before the rest."""
        first = _HEADER_WORDS + slot * _WORDS_PER_SLOT + Word.FIRST_COST
        for place, value in enumerate(astuple(cost)):
            self._floats[first + place] = value

    @property
    def wanted(self) -> bool:
        """Somebody waits for the grant."""
        return self._words[_WANTED] != 0

    @wanted.setter
    def wanted(self, value: bool) -> None:
        self._words[_WANTED] = int(value)
