"""The order of requests: a pure sort key that router, unit, engine and simulator share.

A request whose tenant had less service precedes those of tenants that are ahead of it (`SchedulingState.standing`).
Within one group of tenants, a request with a lower priority value precedes one with a higher value. Within one
priority, the policy computes a score. The lowest score is first, and equal scores are ordered by arrival:

- ``fcfs``: time of arrival.
- ``sjf``: predicted work of the whole request (shortest job first).
- ``srtf``: predicted remaining work (shortest remaining time first).
- ``srtf-aged``: time of arrival plus a handicap that grows with the remaining work. The longer a request waits, the
  fewer later requests overtake it (`SchedulingPolicy.handicap_s`).
- ``hrrn``: highest response ratio next, 1 + wait / remaining work. Equal work gives the order of arrival.
- ``mlfq``: skip-join multi-level feedback queue (FastServe, Wu et al. 2023) with quanta that double with each level. A
  request starts at the first level whose quantum holds its prefill, and sinks one level for each quantum it used.

A request that is overdue, because it has waited for `max_wait_s`, precedes all others whatever their priority is;
overdue requests are ordered by arrival. So neither better classes nor shorter requests starve one. While several
tenants compete, the unit lets only some of the overdue requests do so (`kvstore.overdue_lane`).

The policy orders queued requests, and the sequences of a worker that has more of them than its batch holds
(`muxmesh.batch_choice`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from muxmesh.durations import duration_text
from muxmesh.types import SchedulingState

PolicyName = Literal["fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq"]

_MIN_WORK_S = 1e-6
_NO_HANDICAP = 0.1
"""Remaining work relative to the mean work, up to which the handicap is 0."""
_LONG, _LONG_AT_BACKLOG = 0.75, 1.5
"""Remaining work relative to the mean work, from which on the handicap no longer grows: without a backlog, with one."""
_NO_BACKLOG, _BACKLOG = 0.5, 50.0
"""Requests that were queued at the arrival, per slot of the batch: up to the first value there is no backlog."""
_MLFQ_LEVELS = 16
_OVERDUE = -(2**62)
"""Before every group of tenants and every priority class."""

SortKey = tuple[int, float, float]
"""Precedence (`SchedulingState.precedence`), score, time of arrival. The lowest key is first."""


@dataclass(frozen=True, slots=True)
class SchedulingPolicy:
    """A policy with its settings. The module docstring defines the policies.

    ``longest_lead`` and ``longest_lead_s`` are for ``srtf-aged``, see `handicap_s`. ``quantum_s`` is for ``mlfq``.
    ``max_wait_s``: how long a request has waited when it is overdue; infinite: it never is.
    """

    name: PolicyName
    longest_lead: float
    longest_lead_s: float
    quantum_s: float
    max_wait_s: float = math.inf

    @property
    def changes_with_time(self) -> bool:
        """True if the order of two queued requests can change while neither runs nor becomes overdue."""
        return self.name == "hrrn"

    @property
    def is_timeless(self) -> bool:
        """True if no position in the order ever changes while the request's state does not."""
        return not self.changes_with_time and self.max_wait_s == math.inf

    def is_overdue(self, state: SchedulingState, now_s: float) -> bool:
        """Whether a request is overdue at ``now_s`` (unix time).

        Its wait is the time since its arrival, less that of its service.
        """
        return now_s - state.arrived_at_s - state.served_s >= self.max_wait_s

    def precedes_all(self, state: SchedulingState, now_s: float) -> bool:
        """Whether a request is overdue at ``now_s`` (unix time), and its unit lets it precede those that are not."""
        return state.standing.has_overdue_lane and self.is_overdue(state, now_s)

    def sort_key(self, state: SchedulingState, now_s: float) -> SortKey:
        """The key of a request at ``now_s`` (unix time)."""
        if self.precedes_all(state, now_s):
            return (_OVERDUE, state.arrived_at_s, state.arrived_at_s)
        return (state.precedence, self.score(state, now_s), state.arrived_at_s)

    def reason(self, state: SchedulingState, now_s: float) -> str:
        """The values that determine the position of a request, as text for people."""
        wait_s = max(0.0, now_s - state.arrived_at_s)
        if self.precedes_all(state, now_s):
            return f"overdue, before all others: waited {duration_text(wait_s)} of {duration_text(self.max_wait_s)}"
        waited, left = f"waited {duration_text(wait_s)}", f"{duration_text(state.remaining_s)} of work left"
        details = {
            "fcfs": waited,
            "sjf": f"{duration_text(state.served_s + state.remaining_s)} of work",
            "srtf": left,
            "srtf-aged": f"{left}, {waited}; could be overtaken by requests that arrive up to "
            f"{duration_text(self.handicap_s(state))} later",
            "hrrn": f"{left}, {waited}: ratio {-self.score(state, now_s):.3g}",
            "mlfq": f"level {self._level(state)}: {duration_text(state.prefill_s)} of prefill, "
            f"{duration_text(state.served_s)} served",
        }[self.name]
        return f"{self.name}, priority {state.priority}: {details}{_standing_text(state)}"

    def handicap_s(self, state: SchedulingState) -> float:
        """For ``srtf-aged``: the largest difference in arrival time at which a later request can overtake this one.

        SRTF with linear aging orders by ``remaining work - aging * wait``, which is a handicap of
        ``remaining work / aging``; ALISE (Zhao et al. 2024) also ages its queues. Normalized latency depends on ratios
        of work, so this handicap grows with the logarithm of the work, from a tenth of the mean work on. Requests above
        a limit are ordered by arrival: separating long outputs from very long ones gains little and delays the longest
        requests most. While few requests wait, that costs the 99th percentile of latency more than the gain is worth,
        so the limit is 0.75 times the mean work then; it rises with the logarithm of the queue at the arrival, to 1.5
        times.

        The maximum is the smaller of the state's ``longest_lead_s``, about ``longest_lead`` times the mean work, and
        the policy's ``longest_lead_s``. No request is overtaken by one that arrives later than that, which bounds
        starvation.
        """
        mean_work_s = state.mean_work_s or state.remaining_s
        if mean_work_s <= 0:
            return 0.0
        limit = _long_work(state.queued_per_slot)
        ratio = min(max(state.remaining_s / mean_work_s, _NO_HANDICAP), limit)
        fraction = math.log(ratio / _NO_HANDICAP) / math.log(limit / _NO_HANDICAP)
        return fraction * min(state.longest_lead_s or self.longest_lead * mean_work_s, self.longest_lead_s)

    def score(self, state: SchedulingState, now_s: float) -> float:
        """The position of a request within its class at ``now_s`` (unix time); the lowest is first."""
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
        """The MLFQ level, from 0. The quantum of level k is ``quantum_s * 2**k``."""
        level, quantum_s, used_s = 0, self.quantum_s, state.served_s
        while level < _MLFQ_LEVELS and (quantum_s < state.prefill_s or used_s >= quantum_s):
            used_s -= quantum_s if quantum_s >= state.prefill_s else 0.0
            level, quantum_s = level + 1, quantum_s * 2
        return level


def _standing_text(state: SchedulingState) -> str:
    """What the other tenants mean for a request; empty without others."""
    standing = state.standing
    if not standing.has_rivals:
        return ""
    if standing.group > 0:
        bands = "a band" if standing.group == 1 else f"{standing.group} bands"
        text = f"; its tenant is ahead of others, by {bands} with its requests before this one"
    else:
        text = "; its tenant is behind others, or level with them"
    if state.class_rank > 0:
        return f"{text}; its priority puts it after better classes of its tenant"
    return f"{text}; its priority has no effect on requests of other tenants" if state.priority else text


def _long_work(queued_per_slot: float) -> float:
    """The remaining work relative to the mean work, from which on requests are ordered by arrival."""
    backlog = min(max(queued_per_slot, _NO_BACKLOG), _BACKLOG)
    part = math.log(backlog / _NO_BACKLOG) / math.log(_BACKLOG / _NO_BACKLOG)
    return _LONG * float((_LONG_AT_BACKLOG / _LONG) ** part)


FCFS = SchedulingPolicy("fcfs", longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
"""Priority, then arrival. The default where no policy is configured."""
