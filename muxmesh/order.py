"""Who goes first: one pure function for router, unit, engine and simulator.

Between priorities there is nothing to decide: lower goes first. Within one, a policy gives each request a score, lower
is sooner, and equal scores go by arrival:

- ``fcfs``: arrival.
- ``sjf``: predicted work of the whole request (shortest job first).
- ``srtf``: predicted work that is left (shortest remaining time first).
- ``srtf-aged``: arrival, later by a handicap for the work that is left: whoever waits grows older until nobody new
  overtakes it.
- ``hrrn``: highest response ratio next, 1 + wait / work left. With equal work this is arrival exactly.
- ``mlfq``: skip-join multi-level feedback queue (FastServe, Wu et al. 2023): levels of doubling quanta. A request
  begins at the level whose quantum holds its prefill, and is lower by the quanta it has used when it waits again.

``srtf-aged`` is SRTF with aging, ``work_left - aging * wait`` (ALISE, Zhao et al. 2024, ages its queues too), but the
handicap ends at ``longest_lead`` times the typical work of a request, and at ``longest_lead_s``. So nobody is overtaken
by a request that arrives later than that, however long it is predicted to be: a bound on starvation, and what little is
gained by telling very long from long answers is not paid for by the longest.

A standing is judged where requests wait. Who has begun is not reordered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from muxmesh.types import Standing

Policy = Literal["fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq"]

_LEAST_WORK_S = 1e-6
_MLFQ_LEVELS = 16

Key = tuple[int, float, float]
"""Priority, score, arrival. Lower is sooner."""


@dataclass(frozen=True, slots=True)
class Order:
    """A policy with its settings. See the head of this file."""

    policy: Policy
    aging: float
    longest_lead: float
    longest_lead_s: float
    quantum_s: float

    @property
    def moves(self) -> bool:
        """True if two requests can change places by waiting alone."""
        return self.policy == "hrrn"

    def key(self, one: Standing, now_s: float) -> Key:
        """The place of a request at ``now_s`` (unix)."""
        return (one.priority, self._score(one, now_s), one.arrived_at_s)

    def reason(self, one: Standing, now_s: float) -> str:
        """Why it has that place, for people."""
        wait_s = max(0.0, now_s - one.arrived_at_s)
        said = {
            "fcfs": f"waited {wait_s:.3g} s",
            "sjf": f"{one.served_s + one.left_s:.3g} s of work",
            "srtf": f"{one.left_s:.3g} s of work left",
            "srtf-aged": f"{one.left_s:.3g} s of work left, waited {wait_s:.3g} s; others that came up to "
            f"{self._handicap_s(one):.3g} s later may go first",
            "hrrn": f"{one.left_s:.3g} s of work left, waited {wait_s:.3g} s: ratio {-self._score(one, now_s):.3g}",
            "mlfq": f"level {self._level(one)}: {one.prefill_s:.3g} s of prefill, {one.served_s:.3g} s served",
        }[self.policy]
        return f"{self.policy}, priority {one.priority}: {said}"

    def _score(self, one: Standing, now_s: float) -> float:
        match self.policy:
            case "fcfs":
                return one.arrived_at_s
            case "sjf":
                return one.served_s + one.left_s
            case "srtf":
                return one.left_s
            case "srtf-aged":
                return one.arrived_at_s + self._handicap_s(one)
            case "hrrn":
                return -1 - max(0.0, now_s - one.arrived_at_s) / max(one.left_s, _LEAST_WORK_S)
            case "mlfq":
                return float(self._level(one))

    def _handicap_s(self, one: Standing) -> float:
        """How much later others may come and still go before it."""
        typical_s = one.typical_s * self.longest_lead if one.typical_s > 0 else math.inf
        return min(one.left_s / self.aging, typical_s, self.longest_lead_s)

    def _level(self, one: Standing) -> int:
        """The quantum of level k is ``quantum_s * 2**k``; what it has used of each is behind it."""
        level, quantum_s, used_s = 0, self.quantum_s, one.served_s
        while level < _MLFQ_LEVELS and (quantum_s < one.prefill_s or used_s >= quantum_s):
            used_s -= quantum_s if quantum_s >= one.prefill_s else 0.0
            level, quantum_s = level + 1, quantum_s * 2
        return level


FCFS = Order("fcfs", aging=1.0, longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
"""By priority, then arrival: what everything that is given no order goes by."""
