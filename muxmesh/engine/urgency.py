"""The most urgent of a worker's sequences, which the arbiter gets as the worker's demand. Pure.

Knows no job and no step. Its owner notes each sequence in a loop that it runs anyway, so that `demand` need not iterate
over the sequences. The simulator's workers use it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from muxmesh.engine.api import ComputeDemand
from muxmesh.types import SchedulingState

_NO_CLASS = 2**33
"""Later than every priority class."""


@dataclass(slots=True)
class Urgency:
    """The minimum over the sequences that were noted. All times but that of the arrival are on one clock."""

    priority: int = _NO_CLASS
    arrived_at_s: float = math.inf
    """Unix time of the oldest request."""
    start_by_s: float = math.inf
    """When the first of them has to be computed to meet its SLO, of those that can still meet it; inf: none."""
    lost_at_s: float = math.inf
    """From when on that one has missed it."""
    missed_at_s: float = math.inf
    """When the first one missed its SLO, if none can still meet it."""

    @property
    def is_empty(self) -> bool:
        return self.priority == _NO_CLASS

    def note(self, scheduling: SchedulingState, start_by_s: float, lost_at_s: float, now_s: float) -> None:
        """Adds a sequence that has to be computed by ``start_by_s``, and has missed its SLO from ``lost_at_s`` on."""
        self.priority = min(self.priority, scheduling.class_rank)
        self.arrived_at_s = min(self.arrived_at_s, scheduling.arrived_at_s)
        if start_by_s < self.start_by_s:
            if lost_at_s >= now_s:
                self.start_by_s, self.lost_at_s = start_by_s, lost_at_s
            elif lost_at_s < self.missed_at_s:
                self.missed_at_s = lost_at_s

    def is_outdated(self, now_s: float) -> bool:
        """Whether its most urgent sequence has missed its SLO since it was noted, so that another one is."""
        return self.lost_at_s < now_s

    def demand(self, now_s: float) -> ComputeDemand:
        """The demand at ``now_s``."""
        can_meet = self.start_by_s < math.inf
        due_at_s, lost_at_s = (self.start_by_s, self.lost_at_s) if can_meet else (self.missed_at_s, self.missed_at_s)
        return ComputeDemand(self.priority, self.arrived_at_s, due_at_s - now_s, lost_at_s - now_s)
