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

A prefill is not to stall tokens for long. With `adbs` a decode worker that prefills have held up for `max_stall_s`
counts as urgent, due then, and computes one step. Such steps have small batches, so they have a budget (`StallBudget`).
When it is used up, the rules above hold alone, and `num_held_up` counts what went later.

A step is never interrupted, so `adbs` and `roundrobin` also say when the step of a prefill worker has to end: before
the first decode worker that waits for it is due, if that decode worker would go next. A decode worker is due when the
next token of its most urgent sequence is, and at the latest after prefills have held it up for `max_stall_s`. A worker
of a worse class, or one due later than the prefill itself, does not go next, so no step is cut for it; nor is that of a
prefill that has been overtaken `max_overtakes` times.

`fcfs` has prefills before decodes, so that batches form, and each in the order of the worker's oldest request; the
published runs of MuxServe's temporal baseline show this order. `temporal` is `fcfs` with one worker at a time whatever
the shares. `roundrobin` has the least recently granted worker first. `spatial` grants everything and recalls nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.recent_use import RecentUse
from kvstore.stall_budget import StallBudget
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
_STALL_SLACK = 0.1
"""A decode worker counts as held up for `max_stall_s` when less than this part of it is left: a further prefill step
would hardly end in time.
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
    """``granted``: the slots to grant now. ``kept``: of all that compute then, those whose grant is not recalled.

    ``step_ends_s``: of those prefill workers that compute then and that decode workers wait for, the time by which
    their step has to end, which may have passed.
    """

    granted: frozenset[int]
    kept: frozenset[int]
    step_ends_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Wait:
    """``since``: number of the latest grant when the worker began to wait. ``overtaken``: grants since then, except the
    first one to each worker. ``held_up_at_s``: since when prefill workers have computed meanwhile; infinite: none has.
    """

    since: int
    overtaken: int = 0
    held_up_at_s: float = math.inf


_Order = tuple[float, ...]
_OVERDUE, _NOT_OVERDUE = 0.0, 1.0
_LEAST_SHARE = 0.01
"""`compute_share` is in whole percent."""
_NONE: frozenset[int] = frozenset()
_BOUNDED_MODES = ("adbs", "roundrobin")
"""Those that bound the steps of prefill workers. The others are baselines, or let all workers compute."""
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
        self._stall_slack_s = _STALL_SLACK * config.max_stall_s
        self._stall_budget = StallBudget(config.stall_budget)
        self.num_held_up: dict[str, int] = {}
        """Model → grants to its decode worker after prefills had held it up for `max_stall_s`, budget used up."""
        self._granted_overdue = set[int]()
        """Slots that got their latest grant because others had overtaken them `max_overtakes` times."""
        self._draining: frozenset[int] = frozenset()
        """Slots whose grants are recalled. A drain that has begun goes on with the same, as long as they are enough."""

    @property
    def longest_step_s(self) -> float:
        """The longest that a prefill step may take, in seconds; infinite: as long as it takes."""
        return self._config.max_stall_s if self._mode in _BOUNDED_MODES else math.inf

    def count_use(self, model: str, seconds: float, now_s: float) -> None:
        """A worker of ``model`` has computed for ``seconds`` of the whole device, until ``now_s``."""
        if self._mode == "adbs":
            self._use.count(model, seconds, now_s)

    def decide(self, waiting: Sequence[Demand], computing: Sequence[Demand], now_s: float = 0.0) -> Decision:
        """Returns the slots to grant at ``now_s``, and those that compute then and keep their grants."""
        self._now_s, self._flooded = now_s, None
        self._stall_budget.end((one.slot for one in computing), now_s)
        if self._mode == "spatial":
            granted = slots_of(waiting)
            return Decision(granted, granted | slots_of(computing))
        if not waiting:
            self._waits, self._draining = {}, _NONE
            return Decision(_NONE, slots_of(computing))
        self._waits = {one.slot: self._waits.get(one.slot) or _Wait(self._num_grants) for one in waiting}
        ordered = sorted(waiting, key=self._order)
        plan, granted_now = self._plan(ordered, computing)
        early = [one for one in granted_now if self._goes_early(one)]
        for one in granted_now:
            self._count_grant(one)
        granted = slots_of(granted_now)
        now_computing = [*computing, *granted_now]
        if granted_now:  # one is recalled from its start if the next worker needs it
            left = [one for one in ordered if one.slot not in granted]
            plan, _ = self._plan(left, now_computing)
        kept = self._kept(plan, now_computing)
        self._draining = slots_of(now_computing) - kept
        for one in early:
            if one.slot not in kept:
                self._stall_budget.begin(one.slot, one.share, now_s)
        waits_on = [one for one in ordered if one.slot not in granted]
        return Decision(granted, kept, self._step_ends_s(waits_on, now_computing))

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

    def _step_ends_s(self, waiting: Sequence[Demand], computing: Sequence[Demand]) -> dict[int, float]:
        """By when the steps of the computing prefill workers have to end, for the workers that still wait."""
        prefills = [one for one in computing if one.role is Role.PREFILL]
        if self._mode not in _BOUNDED_MODES or not prefills:
            return {}
        ends_s = dict[int, float]()
        for decode in waiting:
            if decode.role is not Role.DECODE:
                continue
            for prefill in prefills:
                if prefill.share + decode.share <= self._capacity:
                    continue
                wait = self._waits[decode.slot]
                wait.held_up_at_s = min(wait.held_up_at_s, self._now_s)
                end_s = min(ends_s.get(prefill.slot, math.inf), self._needed_at_s(decode, prefill))
                if end_s < math.inf:
                    ends_s[prefill.slot] = end_s
        return ends_s

    def _needed_at_s(self, decode: Demand, prefill: Demand) -> float:
        """When ``decode``, which waits, needs what ``prefill`` computes on; infinite if it would not go next then."""
        due_at_s = self._stalled_at_s(decode)
        if self._mode == "roundrobin":
            return due_at_s
        if decode.lost_at_s >= self._now_s:
            due_at_s = min(due_at_s, decode.due_at_s)
        is_sooner = prefill.due_at_s < due_at_s and prefill.lost_at_s >= self._now_s
        goes_first = prefill.priority < decode.priority or prefill.slot in self._granted_overdue or is_sooner
        return math.inf if goes_first else due_at_s

    def _stalled_at_s(self, decode: Demand) -> float:
        """When prefills will have held up a waiting decode worker for `max_stall_s`; infinite without budget."""
        if self._mode == "adbs" and self._stall_budget.is_used_up(self._now_s):
            return math.inf
        return self._waits[decode.slot].held_up_at_s + self._config.max_stall_s

    def _goes_early(self, demand: Demand) -> bool:
        """Whether a waiting worker that is granted goes before others only for the sake of `max_stall_s`. Counts those
        that prefills have held up for longer, as the budget was used up.
        """
        if self._mode != "adbs" or demand.role is Role.PREFILL:
            return False
        wait, now_s = self._waits[demand.slot], self._now_s
        if wait.held_up_at_s + self._config.max_stall_s >= now_s + self._stall_slack_s:
            return False
        if self._stall_budget.is_used_up(now_s):
            self.num_held_up[demand.model] = self.num_held_up.get(demand.model, 0) + 1
            return False
        is_due_anyway = demand.lost_at_s < now_s and wait.overtaken >= _OVERTAKES_AFTER_A_MISS
        return not (is_due_anyway or self._is_urgent(demand) or wait.overtaken >= self._max_overtakes)

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
            due_at_s = demand.due_at_s if self._is_urgent(demand) else math.inf
            if (stalled_at_s := self._stalled_at_s(demand)) < min(due_at_s, self._now_s + self._stall_slack_s):
                return _URGENT, stalled_at_s
            return (_URGENT, due_at_s) if due_at_s < math.inf else (_DECODE, 0.0)
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
        if self._waits.pop(granted.slot).overtaken >= self._max_overtakes:
            self._granted_overdue.add(granted.slot)
        else:
            self._granted_overdue.discard(granted.slot)
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
