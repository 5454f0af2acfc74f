"""How much of the device decode steps may take that go before prefills only for `max_stall_s`. Pure.

A decode worker that goes early computes a small batch, which costs throughput. So these steps have a budget, a token
bucket of device time: a part of the elapsed time fills it, each such step empties it, and one may start while it is not
empty. Over any t seconds they take at most part x (t + WINDOW_S), and one step more. Knows no order and no stall.
"""

from __future__ import annotations

from collections.abc import Iterable

WINDOW_S = 5.0
"""The bucket holds the part of this time."""


class StallBudget:
    """Owns what is left, and which workers compute such a step. Times are in seconds, on one clock."""

    def __init__(self, part: float) -> None:
        """``part``: of the device's time, in [0, 1]. Of 0 nothing is ever left."""
        self._part = part
        self._left_s = part * WINDOW_S
        self._filled_at_s = 0.0
        self._computing: dict[int, tuple[float, float]] = {}
        """Slot → share, and when it was granted."""

    def is_used_up(self, now_s: float) -> bool:
        """Whether no further step may start at ``now_s``."""
        return self._filled_s(now_s) <= 0

    def begin(self, slot: int, share: float, now_s: float) -> None:
        """The worker of ``slot`` begins a step that counts."""
        self._computing[slot] = (share, now_s)

    def end(self, computing: Iterable[int], now_s: float) -> None:
        """Counts the steps of all workers but those that still compute."""
        if not self._computing:
            return
        for slot in self._computing.keys() - set(computing):
            share, began_at_s = self._computing.pop(slot)
            self._left_s = self._filled_s(now_s) - share * (now_s - began_at_s)
            self._filled_at_s = now_s

    def _filled_s(self, now_s: float) -> float:
        return min(self._part * WINDOW_S, self._left_s + self._part * (now_s - self._filled_at_s))
