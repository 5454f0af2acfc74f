"""The device of one unit in virtual time: which workers compute, and how fast.

The mesh's own arbiter (`kvstore.arbiter.Arbiter`) decides who computes. A worker with a grant computes one run of steps
after the other until its grant is recalled or it has no work. A run has an amount of work: the seconds that it takes
while no other worker computes. Its speed depends on who else computes (`simulator.step_times.Slowdown`), so whenever
that changes, the ends of all runs are computed again.

    state of a worker    grant    run    next
    idle                 -        -      waits, once it has work (`Device.wake`)
    waits                -        -      computes, once the arbiter grants it the device
    computes             yes      yes    at the end of the run: idle without work, waits if recalled, else computes

A recall, and a change of the worker's own work, end a run with its current step. This module knows no requests, no
leases and no KV blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstore.arbiter import STEPS_PER_GRANT, Arbiter, Demand
from muxmesh.engine.api import ComputeDemand
from simulator.simulated_workers import Worker
from simulator.step_times import Slowdown, no_slowdown
from simulator.timeline import NO_DELAYS, Delays, Timeline

_NO_NEEDS = ComputeDemand()
_EPSILON_S = 1e-12
"""A step that ends this long after now has ended."""


@dataclass(slots=True)
class _Slot:
    """One worker, its grant and its run of steps.

    Invariant: a worker that computes has a grant. ``done_s`` is the work of the run that was done at ``updated_at_s``;
    since then a second of it takes ``slowdown`` seconds.
    """

    number: int
    worker: Worker
    demand: Demand
    """As the worker wrote it when it began to wait or started its last run."""
    needs: ComputeDemand = _NO_NEEDS
    """What it wrote then."""
    needs_at_s: float = 0.0
    waits: bool = False
    has_grant: bool = False
    is_recalled: bool = False
    is_used: bool = False
    """At least one step was computed under the grant."""
    granted_at_s: float = 0.0
    step_end_s: float = math.inf
    """By when its step has to end for those that wait, by the arbiter."""
    computes: bool = False
    num_steps: int = 0
    turn_s: float = 0.0
    """Of the run; see `Delays`."""
    started_at_s: float = 0.0
    work_s: float = 0.0
    done_s: float = 0.0
    updated_at_s: float = 0.0
    slowdown: float = 1.0
    ends_at_s: float = 0.0

    def read_demand(self, now_s: float) -> None:
        """Reads what the worker's sequences need, as a worker writes it to the grant page for each run of steps."""
        self._set_needs(self.worker.demand(now_s), now_s)

    def revise_demand(self, now_s: float) -> bool:
        """A waiting worker got a sequence: writes what its sequences need now if that is more urgent. True if it is."""
        needs = self.worker.demand(now_s)
        if not needs.is_more_urgent_than(self.needs, now_s - self.needs_at_s):
            return False
        self._set_needs(needs, now_s)
        return True

    def _set_needs(self, needs: ComputeDemand, now_s: float) -> None:
        old = self.demand
        if needs.slack_s == math.inf == old.due_at_s and (needs.priority, needs.arrived_at_s) == (
            old.priority, old.arrived_at_s
        ):  # fmt: skip
            return
        self.needs, self.needs_at_s = needs, now_s
        self.demand = Demand(
            old.slot, old.role, old.model, old.share, needs.priority, now_s + needs.slack_s, now_s + needs.lost_s,
            needs.arrived_at_s,
        )  # fmt: skip

    def done_at(self, now_s: float) -> float:
        """Seconds of the run's work that are done at ``now_s``."""
        return self.done_s + (now_s - self.updated_at_s) / self.slowdown

    def mean_slowdown(self, now_s: float) -> float:
        """The time that the run took until ``now_s``, relative to its work."""
        return round((now_s - self.started_at_s) / self.work_s, 9) if self.work_s else 1.0  # exactly 1 without any

    def advance(self, now_s: float, slowdown: float) -> None:
        """From ``now_s`` on, the run has another speed or another amount of work."""
        self.done_s = self.done_at(now_s)
        self.updated_at_s, self.slowdown = now_s, slowdown
        self.ends_at_s = now_s + max(0.0, self.work_s - self.done_s) * slowdown


@dataclass(slots=True)
class DeviceUse:
    """What the device was used for, in seconds.

    ``busy_s``: at least one worker computed. ``share_s``: the sum of the shares of the computing workers, over time.
    ``peak_share``: the largest sum of them. ``granted_s`` and ``num_grants``: by slot.
    """

    busy_s: float = 0.0
    share_s: float = 0.0
    peak_share: float = 0.0
    granted_s: list[float] = field(default_factory=list)
    num_grants: list[int] = field(default_factory=list)


class Device:
    """Owns the grants of the device, and the runs of steps of the workers that have one.

    `wake` has to be called after each change of a worker's work. Its run then ends with its current step.

    Invariant: between two events, every slot with a grant computes, and every other one with work waits.
    """

    def __init__(
        self,
        timeline: Timeline,
        workers: Sequence[Worker],
        arbiter: Arbiter,
        delays: Delays = NO_DELAYS,
        slowdown: Slowdown = no_slowdown,
    ) -> None:
        """The index of a worker is its slot."""
        self._timeline = timeline
        self._delays = delays
        self._arbiter = arbiter
        self._slowdown = slowdown
        self._slots = [
            _Slot(number, worker, Demand(number, worker.role, worker.model, worker.share))
            for number, worker in enumerate(workers)
        ]
        self._slot_of = {id(slot.worker): slot for slot in self._slots}
        self._granted: list[_Slot] = []
        """In the order of their slots."""
        self._waiting: list[_Slot] = []
        self._is_decided = True
        """No grant has ended and no worker has begun to wait since the arbiter's last decision."""
        self._last_granted = -1
        self._shares = 0.0
        """Of the slots with a grant."""
        self._accounted_until_s = 0.0
        self._is_settling = False
        self._event_id = 0
        self._event_at_s = -1.0
        """When the next run ends; negative: no event is scheduled."""
        self.use = DeviceUse(granted_s=[0.0] * len(workers), num_grants=[0] * len(workers))

    def wake(self, worker: Worker) -> None:
        """Work of ``worker`` was added or removed."""
        slot = self._slot_of[id(worker)]
        if slot.computes:
            if slot.num_steps > 1:
                self._end_with_current_step(slot)
                if not self._is_settling:
                    self._schedule_event()
        elif not slot.has_grant and worker.has_work():
            if not slot.waits:
                self._begin_to_wait(slot)
            elif slot.revise_demand(self._timeline.now_s):
                self._is_decided = False
            if not self._is_decided and not self._is_settling:
                self._settle()

    def _settle(self) -> None:
        """Decides who computes from now on, starts their runs, and schedules the next end of a run."""
        self._is_settling = False
        now_s = self._timeline.now_s
        stopped = [slot for slot in self._granted if not slot.computes]
        self._end_grants(stopped, now_s)
        if not self._is_decided:
            self._decide(now_s)
            if self._end_grants(stopped, now_s):  # between two runs: they need not compute another step
                self._decide(now_s)
            self._update_speeds(now_s)
        for slot in self._granted:
            if not slot.computes:
                self._start_run(slot, now_s)
        self._schedule_event()

    def _begin_to_wait(self, slot: _Slot) -> None:
        slot.waits, self._is_decided = True, False
        slot.read_demand(self._timeline.now_s)
        self._waiting.append(slot)

    def _end_grants(self, stopped: Sequence[_Slot], now_s: float) -> bool:
        """Of slots that do not compute, ends the grants that are recalled and used, and those of workers without work.
        True if there were any.
        """
        ended = [
            slot
            for slot in stopped
            if slot.has_grant and ((slot.is_recalled and slot.is_used) or not slot.worker.has_work())
        ]
        if not ended:
            return False
        self._account(now_s)
        for slot in ended:
            self._granted.remove(slot)
            slot.has_grant = slot.is_recalled = self._is_decided = False
            self.use.granted_s[slot.number] += now_s - slot.granted_at_s
            if slot.worker.has_work():
                self._begin_to_wait(slot)
        return True

    def _decide(self, now_s: float) -> None:
        """Lets the arbiter decide, and applies its decision. If no worker waits, there is nothing to decide."""
        self._is_decided = True
        if not self._waiting:
            for slot in self._granted:
                slot.step_end_s = math.inf
            return
        self._account(now_s)
        self._waiting.sort(key=_number)
        decision = self._arbiter.decide(
            [slot.demand for slot in self._waiting], [slot.demand for slot in self._granted], now_s
        )
        if decision.granted:
            for slot in [slot for slot in self._waiting if slot.number in decision.granted]:
                self._begin_grant(slot, now_s)
            self._granted.sort(key=_number)
        for slot in self._granted:
            slot.step_end_s = decision.step_ends_s.get(slot.number, math.inf)
            slot.is_recalled = slot.number not in decision.kept
            if slot.is_recalled and slot.computes and slot.num_steps > STEPS_PER_GRANT:
                self._end_with_current_step(slot)

    def _begin_grant(self, slot: _Slot, now_s: float) -> None:
        self._waiting.remove(slot)
        self._granted.append(slot)
        slot.waits, slot.has_grant, slot.is_used, slot.granted_at_s = False, True, False, now_s
        slot.turn_s = self._delays.turn_s if slot.number != self._last_granted else 0.0
        self._last_granted = slot.number
        self.use.num_grants[slot.number] += 1

    def _start_run(self, slot: _Slot, now_s: float) -> None:
        slot.read_demand(now_s)
        slot.worker.plan(now_s, min(slot.step_end_s - now_s, self._arbiter.longest_step_s))
        num_steps = slot.worker.max_steps()
        slot.num_steps = min(num_steps, STEPS_PER_GRANT) if slot.is_recalled else num_steps
        slot.computes = True
        slot.started_at_s = slot.updated_at_s = now_s
        slot.work_s, slot.done_s = self._work_s(slot, slot.num_steps), 0.0
        slot.ends_at_s = now_s + slot.work_s * slot.slowdown

    def _work_s(self, slot: _Slot, num_steps: int) -> float:
        return slot.turn_s + num_steps * self._delays.step_s + slot.worker.duration_s(num_steps)

    def _end_with_current_step(self, slot: _Slot) -> None:
        """Shortens a run to its current step, which is found by bisection."""
        now_s = self._timeline.now_s
        done_s = slot.done_at(now_s) - _EPSILON_S
        first, last = 1, slot.num_steps
        while first < last:
            middle = (first + last) // 2
            if self._work_s(slot, middle) >= done_s:
                last = middle
            else:
                first = middle + 1
        if first < slot.num_steps:
            slot.num_steps, slot.work_s = first, self._work_s(slot, first)
            slot.advance(now_s, slot.slowdown)

    def _update_speeds(self, now_s: float) -> None:
        """Sets the speed of each worker beside those that compute now."""
        self._shares = sum(slot.worker.share for slot in self._granted)
        self.use.peak_share = max(self.use.peak_share, self._shares)
        for slot in self._granted:
            slowdown = self._slowdown(self._shares - slot.worker.share if len(self._granted) > 1 else 0.0)
            if slowdown != slot.slowdown:
                slot.advance(now_s, slowdown)

    def _account(self, now_s: float) -> None:
        """Adds the time since the last change of the grants to `use`."""
        if self._granted:
            self.use.busy_s += now_s - self._accounted_until_s
            self.use.share_s += (now_s - self._accounted_until_s) * self._shares
        self._accounted_until_s = now_s

    def _schedule_event(self) -> None:
        """Schedules the earliest end of a run. An event that was scheduled for another time has no effect."""
        next_s = min([slot.ends_at_s for slot in self._granted], default=-1.0)
        if next_s == self._event_at_s:
            return
        self._event_at_s = next_s
        self._event_id += 1
        if next_s >= 0:
            self._timeline.at(next_s, partial(self._on_event, self._event_id))

    def _on_event(self, event_id: int) -> None:
        if event_id != self._event_id:
            return
        now_s = self._timeline.now_s
        self._event_at_s = -1.0
        self._is_settling = True
        for slot in self._granted:
            if slot.ends_at_s <= now_s:
                slot.computes, slot.is_used = False, True
                slot.turn_s = 0.0
                used_s = (now_s - slot.started_at_s) * slot.worker.share
                self._arbiter.count_use(slot.worker.model, used_s, now_s)
                slot.worker.apply(slot.num_steps, slot.mean_slowdown(now_s))
        self._settle()


def _number(slot: _Slot) -> int:
    return slot.number
