"""Virtual time: events in the order of their times."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delays:
    """What a mesh of processes adds to the engines' own times, in seconds.

    ``step_s``: to each step, between it and the next. ``turn_s``: in addition, when another worker is granted the
    device. ``admit_s``: from a request's arrival to the unit, and from its credit to the prefill worker, together.
    ``hand_off_s``: from the first token to the decode worker. ``end_s``: from the last token to the free slot.
    """

    step_s: float = 0.0
    turn_s: float = 0.0
    admit_s: float = 0.0
    hand_off_s: float = 0.0
    end_s: float = 0.0


NO_DELAYS = Delays()
MEASURED = Delays(step_s=0.0011, turn_s=0.001, admit_s=0.005, hand_off_s=0.003, end_s=0.003)
"""On two cores of a small virtual machine: ``step_s`` as in `make bench-fidelity`, which measures it anew, the others
fitted to a run of their own. A larger machine takes less."""


class Timeline:
    """Owns the events to come. Events at one time happen in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._last = 0

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        """Schedules an event; never before now."""
        self._last += 1
        heapq.heappush(self._events, (max(when_s, self.now_s), self._last, event))

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Schedules an event after a delay; without one, it happens at once."""
        if delay_s > 0:
            self.at(self.now_s + delay_s, event)
        else:
            event()

    def run(self) -> None:
        """Runs all scheduled events, and those that they schedule."""
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            self.num_events += 1
            event()
