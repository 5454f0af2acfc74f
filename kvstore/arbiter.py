"""Which workers may compute on the device. Pure: `grant_table` applies the decisions, and so does the simulator.

Each attached worker has a slot. `Arbiter.decide` gets the workers that wait for a grant and those that compute:

    slot        granted                         kept                                  in neither
    waits       gets STEPS_PER_GRANT steps      not recalled from the start           waits
    computes    -                               goes on, with no system call          its grant is recalled

A worker returns a recalled grant after the steps of the grant; its share of the device is free only then.

All modes but `spatial` work alike. The waiting workers, in the mode's order, are planned to compute together as far as
the sum of their shares allows. Those that fit beside the workers that compute are granted at once. Of the computing
ones as many are recalled as the others need, and no more.

In each of these modes workers that others have overtaken `max_overtakes` times go first, the longest waiting first.
This bounds the wait: one of n workers is planned after at most n - 1 + max_overtakes grants of others, not counting
those of overdue workers that have waited for longer. After them:

`adbs` is Alg. 3 of MuxServe (Duan et al., 2024) with priority classes and a slack rule. Its order is

    1. the best priority class present; within it
    2. workers about to miss a latency target, the earliest due first, prefill or decode: if any order meets all
       targets, this one does (Jackson, 1955). A late sequence that can still catch up is due
    3. prefill workers, round-robin over models
    4. decode workers, round-robin over models

While a prefill waits for decodes to stop and no other prefill computes, no worker after it in the order starts (the
drain rule of MuxServe).

A flooded model is not to make others miss their targets: of a model that has used more than an equal part of the device
lately (`recent_use`), an urgent prefill worker goes after the other urgent workers, and one whose prompts have all
missed their target after the decode workers, until others have overtaken it `_OVERTAKES_OF_A_FLOOD` times.

A missed target gives no precedence: the worker would gain nothing by it, and others would miss their targets. But under
load some worker is urgent most of the time. So a decode worker whose sequences have all missed theirs counts as urgent,
due now, once others have overtaken it `_OVERTAKES_AFTER_A_MISS` times.

`fcfs` has prefills before decodes, so that batches form, and each in the order of the worker's oldest request; the
published runs of MuxServe's temporal baseline show this order. `temporal` is `fcfs` with one worker at a time whatever
the shares. `roundrobin` has the least recently granted worker first. `spatial` grants everything and recalls nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.recent_use import RecentUse
from muxmesh.config.arbiter_config import MAX_OVERTAKES, ArbiterConfig
from muxmesh.types import Role

STEPS_PER_GRANT = 1
"""A worker checks for a recall after this many steps."""
_OVERTAKES_AFTER_A_MISS = 2
"""With fewer, models beside a flooded one miss more targets. With more, a model that has fallen behind hardly gets a
step while another one is urgent. Chosen in virtual time on the loads of `benchmarks.shared_device`.
"""
_OVERTAKES_OF_A_FLOOD = 8
"""With fewer, models beside a flooded one miss more targets. With more, a unit that stays overloaded completes less,
and late prompts of the model that uses most wait for longer. Chosen likewise.
"""
_ROUNDING = 1e-9
"""Shares are sums of floats."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A worker that waits for a grant, or computes.

    ``share``: its fixed part of the device, in (0, 1]. ``priority``: the best class of its sequences, lower is sooner.
    ``due_at_s``: when the first of its sequences that can still meet its latency target has to compute; infinite
    without a target. ``lost_at_s``: from when on that one has missed it; in the past if all have. ``arrived_at_s``:
    unix time at which the oldest request among them arrived. The other times are on the clock of `Arbiter.decide`.
    """

    slot: int
    role: Role
    model: str
    share: float = 1.0
    priority: int = 0
    due_at_s: float = math.inf
    lost_at_s: float = math.inf
    arrived_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """``granted``: the slots to grant now. ``kept``: of all that compute then, those whose grant is not recalled."""

    granted: frozenset[int]
    kept: frozenset[int]


@dataclass(slots=True)
class _Wait:
    """``since``: number of the latest grant when the worker began to wait. ``overtaken``: grants since then, except the
    first one to each worker.
    """

    since: int
    overtaken: int = 0


_Order = tuple[float, ...]
_OVERDUE, _NOT_OVERDUE = 0.0, 1.0
_LEAST_SHARE = 0.01
"""`compute_share` is in whole percent."""
_NONE: frozenset[int] = frozenset()
_URGENT, _URGENT_FLOOD, _PREFILL, _DECODE, _MISSED_FLOOD = 0.0, 1.0, 2.0, 3.0, 4.0


class Arbiter:
    """Owns the order of past grants, who has waited how long, and which grants a drain waits for.

    ``config`` is resolved, see `ArbiterConfig.resolved`. Else `auto` is taken as `adbs`, and an unset over-subscription
    as 0.
    """

    def __init__(self, config: ArbiterConfig) -> None:
        self._config = config
        self._mode = "adbs" if config.mode == "auto" else config.mode
        self._whole = 1.0 if self._mode == "temporal" else 0.0
        """The share that each worker takes; 0: its own."""
        self._capacity = (self._whole or 1 + (config.over_subscription or 0) / 100) + _ROUNDING
        self._max_overtakes = config.max_overtakes or MAX_OVERTAKES
        self._use = RecentUse()
        self._flooded: frozenset[str] | None = None
        """Models above their equal part of the device, once the present decision has needed them."""
        self._now_s = 0.0
        self._num_grants = 0
        self._last_grant: dict[int, int] = {}
        """Number of the latest grant of each slot."""
        self._last_turn: dict[tuple[Role, str], int] = {}
        """Number of the latest grant of each role and model."""
        self._waits: dict[int, _Wait] = {}
        self._draining: frozenset[int] = frozenset()
        """Slots whose grants are recalled. A drain that has begun goes on with the same, as long as they are enough."""

    def count_use(self, model: str, seconds: float, now_s: float) -> None:
        """A worker of ``model`` has computed for ``seconds`` of the whole device, until ``now_s``."""
        if self._mode == "adbs":
            self._use.count(model, seconds, now_s)

    def decide(self, waiting: Sequence[Demand], computing: Sequence[Demand], now_s: float = 0.0) -> Decision:
        """Returns the slots to grant at ``now_s``, and those that compute then and keep their grants."""
        self._now_s, self._flooded = now_s, None
        if self._mode == "spatial":
            granted = slots_of(waiting)
            return Decision(granted, granted | slots_of(computing))
        if not waiting:
            self._waits, self._draining = {}, _NONE
            return Decision(_NONE, slots_of(computing))
        self._waits = {one.slot: self._waits.get(one.slot) or _Wait(self._num_grants) for one in waiting}
        ordered = sorted(waiting, key=self._order)
        plan, granted_now = self._plan(ordered, computing)
        for one in granted_now:
            self._count_grant(one)
        granted = slots_of(granted_now)
        now_computing = [*computing, *granted_now]
        if granted_now:  # one is recalled from its start if the next worker needs it
            left = [one for one in ordered if one.slot not in granted]
            plan, _ = self._plan(left, now_computing)
        kept = self._kept(plan, now_computing)
        self._draining = slots_of(now_computing) - kept
        return Decision(granted, kept)

    def _plan(self, ordered: Sequence[Demand], computing: Sequence[Demand]) -> tuple[list[Demand], list[Demand]]:
        """Which of the waiting workers, in order, are to compute together, and those of them that fit right now."""
        planned, granted = list[Demand](), list[Demand]()
        whole, capacity = self._whole, self._capacity
        planned_share, used = 0.0, self._sum_shares(computing)
        is_prefilling = any(one.role is Role.PREFILL for one in computing)
        for one in ordered:
            share = whole or one.share
            if planned_share + share > capacity:
                if planned_share + _LEAST_SHARE > capacity:
                    break
                continue
            planned.append(one)
            planned_share += share
            if used + share <= capacity:
                granted.append(one)
                used += share
                is_prefilling |= one.role is Role.PREFILL
            elif self._mode == "adbs" and one.role is Role.PREFILL and not is_prefilling:
                break
        return planned, granted

    def _kept(self, planned: Sequence[Demand], computing: Sequence[Demand]) -> frozenset[int]:
        """The computing workers that fit beside the planned ones: those first that are recalled last."""
        if not planned:
            return slots_of(computing)
        share, kept = self._sum_shares(planned), list[int]()
        for one in sorted(computing, key=self._keep_order):
            if share + (self._whole or one.share) <= self._capacity:
                share += self._whole or one.share
                kept.append(one.slot)
        return frozenset(kept)

    def _sum_shares(self, demands: Sequence[Demand]) -> float:
        return self._whole * len(demands) or sum([one.share for one in demands])

    def _order(self, demand: Demand) -> _Order:
        """The waiting worker with the smallest order goes first."""
        slot, role, mode, wait = demand.slot, demand.role, self._mode, self._waits[demand.slot]
        last_turn, last_grant = self._last_turn.get((role, demand.model), 0), self._last_grant.get(slot, 0)
        if wait.overtaken >= self._max_overtakes:
            return (_OVERDUE, wait.since, last_turn, last_grant, slot)
        if mode == "roundrobin":
            return (_NOT_OVERDUE, last_grant, slot)
        if mode != "adbs":
            return (_NOT_OVERDUE, role is Role.DECODE, demand.arrived_at_s, last_turn, last_grant, slot)
        phase, due_at_s = self._phase(demand, wait.overtaken)
        is_decode = role is Role.DECODE
        return (_NOT_OVERDUE, demand.priority, phase, due_at_s, is_decode, last_turn, last_grant, slot)

    def _phase(self, demand: Demand, overtaken: int) -> tuple[float, float]:
        """Where `adbs` has a worker within its class, and by when an urgent one is due."""
        is_missed = demand.lost_at_s < self._now_s
        if demand.role is Role.DECODE:
            if is_missed and overtaken >= _OVERTAKES_AFTER_A_MISS:
                return _URGENT, self._now_s
            return (_URGENT, demand.due_at_s) if self._is_urgent(demand) else (_DECODE, 0.0)
        if self._is_urgent(demand):
            return _URGENT_FLOOD if self._is_flooded(demand) else _URGENT, demand.due_at_s
        is_deferred = is_missed and overtaken < _OVERTAKES_OF_A_FLOOD and self._is_flooded(demand)
        return _MISSED_FLOOD if is_deferred else _PREFILL, 0.0

    def _is_flooded(self, demand: Demand) -> bool:
        if self._flooded is None:
            self._flooded = self._use.above_equal_part(self._now_s)
        return demand.model in self._flooded

    def _is_urgent(self, demand: Demand) -> bool:
        now_s = self._now_s
        return demand.due_at_s < now_s + self._config.urgent_slack_s and demand.lost_at_s >= now_s

    def _count_grant(self, granted: Demand) -> None:
        last = self._last_grant.get(granted.slot, 0)
        self._waits.pop(granted.slot)
        for wait in self._waits.values():
            wait.overtaken += last > wait.since
        self._num_grants += 1
        self._last_grant[granted.slot] = self._last_turn[granted.role, granted.model] = self._num_grants

    def _keep_order(self, demand: Demand) -> _Order:
        """The computing worker with the largest order is recalled first.

        That is one whose grant is recalled already; of equals the one of the worst class, one that is not urgent, a
        decode worker, the one with the earliest grant.
        """
        is_recalled = demand.slot in self._draining
        turn = -self._last_grant.get(demand.slot, 0)
        is_decode = demand.role is Role.DECODE
        return (is_recalled, demand.priority, not self._is_urgent(demand), is_decode, turn, demand.slot)


def slots_of(demands: Iterable[Demand]) -> frozenset[int]:
    """The slots of workers."""
    return frozenset(demand.slot for demand in demands)
