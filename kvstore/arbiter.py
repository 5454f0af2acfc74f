"""Who computes next on the device: one worker at a time, in turn. Pure; `grant` keeps its words in shared memory.

The minimal form of the arbiter: no shares and no classes yet, so the demand of each worker is one bit.
"""

from __future__ import annotations

from collections.abc import Set


def next_slot(demanding: Set[int], last: int) -> int | None:
    """The slot that is granted next: the first demanding one after ``last``, round-robin; None if none demands."""
    return min(demanding, key=lambda slot: (slot <= last, slot), default=None)
