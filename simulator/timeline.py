"""Virtual time: a queue of events, ordered by time. Knows nothing of the mesh."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delays:
    """Time that processes and messages of a real mesh add to the steps of its engines, in seconds."""

    step_s: float = 0.0
    """Between a step and the next."""
    turn_s: float = 0.0
    """In addition, when the device is granted to another worker than before."""
    admit_s: float = 0.0
    """From a request's arrival to the unit, plus from its credit to the prefill worker."""
    hand_off_s: float = 0.0
    """From the first token to the decode worker."""
    end_s: float = 0.0
    """From the last token until the slot of the sequence is free."""
    swap_bytes_per_s: float = math.inf
    """Speed of copies of KV to and from the swap region, in bytes per second."""
    sleep_s: float = 0.0
    """From the command to sleep until the engine of a worker has stopped."""
    wake_s: float = 0.0
    """From the command to wake until a worker computes that has mapped its weights before."""
    load_s: float = 0.0
    """The same for a worker that has never been awake."""


NO_DELAYS = Delays()
MEASURED = Delays(
    step_s=0.0011, turn_s=0.001, admit_s=0.005, hand_off_s=0.003, end_s=0.003, swap_bytes_per_s=2.2e9, sleep_s=0.002,
    wake_s=0.002, load_s=2.4,
)  # fmt: skip
"""On two cores of a small virtual machine: ``step_s`` is measured by `make bench-fidelity`, ``swap_bytes_per_s`` by
`make bench-swap`, waking by `make bench-many-models`, the others are fitted to a run of their own. A larger machine
takes less; a GPU copies to pinned memory at about 5e10 bytes per second."""


class Timeline:
    """Owns the scheduled events. Events at the same time run in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        """Events that have run."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_scheduled = 0

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        """Schedules an event at a time; at ``now_s`` if that is past."""
        self._num_scheduled += 1
        heapq.heappush(self._events, (max(when_s, self.now_s), self._num_scheduled, event))

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Schedules an event after a delay; without a delay, runs it in place."""
        if delay_s > 0:
            self.at(self.now_s + delay_s, event)
        else:
            event()

    def run(self, until_s: float = math.inf) -> None:
        """Runs all events scheduled up to ``until_s``, including those that they schedule."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            self.num_events += 1
            event()
