"""Clocks that are passed as arguments. No other module reads the system time, so tests and simulations control it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic and of unix time."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never decreases. Comparable between the processes of one machine."""

    def unix_s(self) -> float:
        """Seconds since 1970-01-01 UTC. Comparable between machines; jumps when the system clock is set."""

    def thread_cpu_s(self) -> float:
        """CPU seconds of the calling thread: time in which it waits, or is stopped by SIGSTOP, does not count."""


class SystemClock:
    """The clocks of the operating system."""

    def monotonic_s(self) -> float:
        return time.monotonic()  # noqa: TID251 - the only caller

    def unix_s(self) -> float:
        return time.time()  # noqa: TID251 - the only caller

    def thread_cpu_s(self) -> float:
        return time.thread_time()


class ManualClock:
    """A clock that changes only through `advance`. For tests and simulations."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def advance(self, seconds: float) -> None:
        """Moves monotonic and unix time forward."""
        self._now_s += seconds

    def monotonic_s(self) -> float:
        return self._now_s

    def unix_s(self) -> float:
        return self._now_s

    def thread_cpu_s(self) -> float:
        return self._now_s
