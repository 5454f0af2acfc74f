"""Who goes first: one pure function for router, unit, engine and simulator.

Between priorities there is nothing to decide: lower goes first. Within one, a policy gives each request a score, lower
is sooner, and equal scores go by arrival:

- ``fcfs``: arrival.
- ``sjf``: predicted work of the whole request (shortest job first).
- ``srtf``: predicted work that is left (shortest remaining time first).
- ``srtf-aged``: arrival, later by a handicap for the work that is left: whoever waits grows older until nobody new
  overtakes it (`Order.handicap_s`).
- ``hrrn``: highest response ratio next, 1 + wait / work left. With equal work this is arrival exactly.
- ``mlfq``: skip-join multi-level feedback queue (FastServe, Wu et al. 2023): levels of doubling quanta. A request
  begins at the level whose quantum holds its prefill, and is lower by the quanta it has used when it waits again.

A standing is judged where requests wait. Who has begun is not reordered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from muxmesh.types import Standing

Policy = Literal["fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq"]

_LEAST_WORK_S = 1e-6
_NO_LEAD, _FULL_LEAD = 0.1, 1.5
"""Of the typical work: what counts as little, and what as much."""
_MLFQ_LEVELS = 16

Key = tuple[int, float, float]
"""Priority, score, arrival. Lower is sooner."""


@dataclass(frozen=True, slots=True)
class Order:
    """A policy with its settings. See the head of this file."""

    policy: Policy
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
            f"{self.handicap_s(one):.3g} s later may go first",
            "hrrn": f"{one.left_s:.3g} s of work left, waited {wait_s:.3g} s: ratio {-self._score(one, now_s):.3g}",
            "mlfq": f"level {self._level(one)}: {one.prefill_s:.3g} s of prefill, {one.served_s:.3g} s served",
        }[self.policy]
        return f"{self.policy}, priority {one.priority}: {said}"

    def handicap_s(self, one: Standing) -> float:
        """For ``srtf-aged``: how much later others may come and still go before it.

        SRTF with aging is ``work_left - aging * wait`` (ALISE, Zhao et al. 2024, ages its queues too), which is
        ``work_left / aging`` here. But normalized latency is a matter of ratios of work, so its logarithm counts, and
        only between a tenth of the typical work and one and a half times of it: to tell a very long answer from a long
        one gains little, and the longest would pay for it. From there on it is ``longest_lead`` times the typical work,
        or ``longest_lead_s`` if that is less: nobody is overtaken by who comes later than that, a bound on starvation.
        """
        typical_s = one.typical_s or one.left_s
        if typical_s <= 0:
            return 0.0
        ratio = min(max(one.left_s / typical_s, _NO_LEAD), _FULL_LEAD)
        part = math.log(ratio / _NO_LEAD) / math.log(_FULL_LEAD / _NO_LEAD)
        return part * min(self.longest_lead * typical_s, self.longest_lead_s)

    def _score(self, one: Standing, now_s: float) -> float:
        match self.policy:
            case "fcfs":
                return one.arrived_at_s
            case "sjf":
                return one.served_s + one.left_s
            case "srtf":
                return one.left_s
            case "srtf-aged":
                return one.arrived_at_s + self.handicap_s(one)
            case "hrrn":
                return -1 - max(0.0, now_s - one.arrived_at_s) / max(one.left_s, _LEAST_WORK_S)
            case "mlfq":
                return float(self._level(one))

    def _level(self, one: Standing) -> int:
        """The quantum of level k is ``quantum_s * 2**k``; what it has used of each is behind it."""
        level, quantum_s, used_s = 0, self.quantum_s, one.served_s
        while level < _MLFQ_LEVELS and (quantum_s < one.prefill_s or used_s >= quantum_s):
            used_s -= quantum_s if quantum_s >= one.prefill_s else 0.0
            level, quantum_s = level + 1, quantum_s * 2
        return level


FCFS = Order("fcfs", longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
"""By priority, then arrival: what everything that is given no order goes by."""
