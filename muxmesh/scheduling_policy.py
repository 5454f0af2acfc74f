"""The order in which requests are scheduled: one pure function for router, unit, engine and simulator.

A lower priority always goes first. Within one priority, a policy gives each request a score, the lowest first, and
equal scores go by arrival:

- ``fcfs``: arrival.
- ``sjf``: predicted work of the whole request (shortest job first).
- ``srtf``: predicted remaining work (shortest remaining time first).
- ``srtf-aged``: arrival plus a handicap for the remaining work, so that a request that waits is overtaken by fewer and
  fewer later ones, and in the end by none (`SchedulingPolicy.handicap_s`).
- ``hrrn``: highest response ratio next, 1 + wait / remaining work. With equal work this is arrival exactly.
- ``mlfq``: skip-join multi-level feedback queue (FastServe, Wu et al. 2023): levels of doubling quanta. A request
  starts at the level whose quantum holds its prefill, and is lower by the quanta it has used when it waits again.

Requests are ordered where they wait. A sequence that runs is not reordered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from muxmesh.types import SchedulingState

PolicyName = Literal["fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq"]

_MIN_WORK_S = 1e-6
_NO_HANDICAP, _FULL_HANDICAP = 0.1, 1.5
"""Remaining work, relative to the mean, up to which there is no handicap, and from which on it is the largest."""
_MLFQ_LEVELS = 16

SortKey = tuple[int, float, float]
"""Priority, score, arrival. The lowest goes first."""


@dataclass(frozen=True, slots=True)
class SchedulingPolicy:
    """A policy with its settings. See the head of this file.

    ``longest_lead`` and ``longest_lead_s`` are for ``srtf-aged``, see `handicap_s`; ``quantum_s`` is for ``mlfq``.
    """

    name: PolicyName
    longest_lead: float
    longest_lead_s: float
    quantum_s: float

    @property
    def changes_with_time(self) -> bool:
        """True if waiting alone can change the order of two requests."""
        return self.name == "hrrn"

    def sort_key(self, state: SchedulingState, now_s: float) -> SortKey:
        """Sorts requests at ``now_s`` (unix time)."""
        return (state.priority, self._score(state, now_s), state.arrived_at_s)

    def reason(self, state: SchedulingState, now_s: float) -> str:
        """Why a request has its position in the order, for people."""
        wait_s = max(0.0, now_s - state.arrived_at_s)
        details = {
            "fcfs": f"waited {wait_s:.3g} s",
            "sjf": f"{state.served_s + state.remaining_s:.3g} s of work",
            "srtf": f"{state.remaining_s:.3g} s of work left",
            "srtf-aged": f"{state.remaining_s:.3g} s of work left, waited {wait_s:.3g} s; requests that arrived up to "
            f"{self.handicap_s(state):.3g} s later may go first",
            "hrrn": f"{state.remaining_s:.3g} s of work left, waited {wait_s:.3g} s: "
            f"ratio {-self._score(state, now_s):.3g}",
            "mlfq": f"level {self._level(state)}: {state.prefill_s:.3g} s of prefill, {state.served_s:.3g} s served",
        }[self.name]
        return f"{self.name}, priority {state.priority}: {details}"

    def handicap_s(self, state: SchedulingState) -> float:
        """For ``srtf-aged``: how much later another request may arrive and still go first, at most.

        SRTF with aging is ``remaining work - aging * wait`` (ALISE, Zhao et al. 2024, ages its queues too), which is a
        handicap of ``remaining work / aging``. But normalized latency depends on ratios of work, so the handicap grows
        with the logarithm, and only between 0.1 and 1.5 times the mean work: telling a very long output from a long one
        gains little, and the longest requests would pay for it. Its largest value is ``longest_lead`` times the mean
        work, or ``longest_lead_s`` if that is less: no request is overtaken by one that arrives later than that, which
        bounds starvation.
        """
        mean_work_s = state.mean_work_s or state.remaining_s
        if mean_work_s <= 0:
            return 0.0
        ratio = min(max(state.remaining_s / mean_work_s, _NO_HANDICAP), _FULL_HANDICAP)
        fraction = math.log(ratio / _NO_HANDICAP) / math.log(_FULL_HANDICAP / _NO_HANDICAP)
        return fraction * min(self.longest_lead * mean_work_s, self.longest_lead_s)

    def _score(self, state: SchedulingState, now_s: float) -> float:
        match self.name:
            case "fcfs":
                return state.arrived_at_s
            case "sjf":
                return state.served_s + state.remaining_s
            case "srtf":
                return state.remaining_s
            case "srtf-aged":
                return state.arrived_at_s + self.handicap_s(state)
            case "hrrn":
                return -1 - max(0.0, now_s - state.arrived_at_s) / max(state.remaining_s, _MIN_WORK_S)
            case "mlfq":
                return float(self._level(state))

    def _level(self, state: SchedulingState) -> int:
        """The quantum of level k is ``quantum_s * 2**k``; a request has passed the levels whose quanta it has used."""
        level, quantum_s, used_s = 0, self.quantum_s, state.served_s
        while level < _MLFQ_LEVELS and (quantum_s < state.prefill_s or used_s >= quantum_s):
            used_s -= quantum_s if quantum_s >= state.prefill_s else 0.0
            level, quantum_s = level + 1, quantum_s * 2
        return level


FCFS = SchedulingPolicy("fcfs", longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
"""Priority, then arrival: the default of everything that is given no policy."""
