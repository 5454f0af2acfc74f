"""Time as an argument. Nothing else in the mesh reads a clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time."""

    def monotonic_s(self) -> float:
        """Seconds that never go back; comparable within one machine."""

    def unix_s(self) -> float:
        """Seconds since 1970; comparable between machines, may jump."""


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return time.monotonic()  # noqa: TID251 - the one place

    def unix_s(self) -> float:
        """See `Clock`."""
        return time.time()  # noqa: TID251 - the one place


class ManualClock:
    """Stands still until it is moved: for tests and simulation."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def advance(self, seconds: float) -> None:
        """Moves both clocks forward."""
        self._now_s += seconds

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return self._now_s

    def unix_s(self) -> float:
        """See `Clock`."""
        return self._now_s
