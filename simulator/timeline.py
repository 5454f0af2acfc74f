"""Virtual time: events in order of when they happen."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timeline:
    """Owns the events to come. Those of one moment happen in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._last = 0

    def at(self, when_s: float, happen: Callable[[], None]) -> None:
        """Something happens then; never before now."""
        self._last += 1
        heapq.heappush(self._events, (max(when_s, self.now_s), self._last, happen))

    def run(self) -> None:
        """Lets everything happen that is scheduled, and what follows from it."""
        while self._events:
            self.now_s, _, happen = heapq.heappop(self._events)
            self.num_events += 1
            happen()
