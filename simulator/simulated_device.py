"""The workers of one unit, and the device on which they compute, in virtual time.

The code of the mesh decides what they compute: the arbiter (`kvstore.arbiter`) and the engine's division of a step's
token budget (`muxmesh.engine.scheduler.divide_token_budget`). Steps only take time. Consecutive decode steps in which
nothing changes except the number of tokens are one run of steps, whose time is computed in closed form. This module
knows no requests, no leases and no KV blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.arbiter import STEPS_PER_GRANT, ArbiterPolicy, Demand, decide, one_at_a_time
from muxmesh.engine.scheduler import divide_token_budget
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.step_cost import CostFit, StepCost, StepShape, context_of
from muxmesh.types import Role, SchedulingState
from simulator.timeline import NO_DELAYS, Delays, Timeline

_OBSERVE_EVERY = 16
"""Of this many runs of steps, the cost fit observes one. A real worker observes each step; the fits hardly differ."""


class Worker(Protocol):
    """A prefill or a decode worker. For each run of steps, the device calls `plan`, `duration_s` and `apply`."""

    role: Role
    fit: CostFit

    def has_work(self) -> bool:
        """True if there is something to compute."""

    def plan(self, now_s: float) -> None:
        """Plans the next step."""

    def max_steps(self) -> int:
        """Steps from the planned one on until something other than the number of tokens changes; at least 1."""

    def duration_s(self, num_steps: int) -> float:
        """Seconds of the planned step and those after it, ``num_steps`` in all."""

    def apply(self, num_steps: int) -> None:
        """Ends the run after ``num_steps`` steps. Calls back the jobs that end or need attention then."""


@dataclass(slots=True)
class PrefillJob:
    """A prompt to compute. ``done`` is called when it is computed and its first token sampled."""

    scheduling: SchedulingState
    num_computed_tokens: int
    num_uncomputed_tokens: int
    done: Callable[[], None]


class PrefillWorker:
    """Computes prompts in single steps, divided as by the engine's scheduler."""

    role = Role.PREFILL

    def __init__(self, cost: StepCost, policy: SchedulingPolicy, token_budget: int, max_num_seqs: int) -> None:
        self.fit = CostFit()
        self._cost = cost
        self._policy = policy
        self._token_budget = token_budget
        self._max_num_seqs = max_num_seqs
        self._jobs: list[PrefillJob] = []
        self._planned: list[tuple[PrefillJob, int]] = []
        self._shape = StepShape(0, 0, 0)

    def add(self, job: PrefillJob) -> None:
        self._jobs.append(job)

    def has_work(self) -> bool:
        return bool(self._jobs)

    def max_steps(self) -> int:
        return 1

    def plan(self, now_s: float) -> None:
        self._planned = divide_token_budget(self._jobs, self._policy, now_s, self._max_num_seqs, self._token_budget)
        context = sum(context_of(job.num_computed_tokens, count) for job, count in self._planned)
        self._shape = StepShape(sum(count for _, count in self._planned), context, len(self._planned))

    def duration_s(self, num_steps: int) -> float:
        return self._cost.step_s(self._shape.num_tokens, self._shape.num_context)

    def apply(self, num_steps: int) -> None:
        self.fit.observe(self._shape, self.duration_s(1))
        for job, count in self._planned:
            job.num_computed_tokens += count
            job.num_uncomputed_tokens -= count
        finished = [job for job, _ in self._planned if job.num_uncomputed_tokens == 0]
        self._jobs = [job for job in self._jobs if job.num_uncomputed_tokens]
        for job in finished:
            job.done()


@dataclass(slots=True)
class DecodeJob:
    """A sequence after its first token, with ``num_context`` computed tokens and ``num_left`` tokens to sample."""

    num_context: int
    num_left: int
    done: Callable[[], None]
    """Called when the last token is sampled."""
    next_check: Callable[[], int | None]
    """Returns after how many more tokens the sequence needs attention; None: never."""
    check: Callable[[], None]
    """Called then. May remove the job."""
    joined_at: int = -1
    """The worker's step before the first one that includes the job; -1 before that step is planned."""
    is_removed: bool = False


class DecodeWorker:
    """Samples one token of every sequence in each step.

    Invariant: ``_num_jobs`` and ``_context`` are the number and the context of the sequences that are in the steps.
    """

    role = Role.DECODE

    def __init__(self, cost: StepCost) -> None:
        self.fit = CostFit()
        self._cost = cost
        self._num_steps = 0
        self._num_runs = 0
        self._num_jobs = 0
        self._context = 0
        self._added: list[DecodeJob] = []
        """Sequences that the next plan includes."""
        self._stops: list[tuple[int, int, bool, DecodeJob]] = []
        """A heap of (step, order of insertion, is the end, job): ends and checks of the jobs."""
        self._num_stops = 0

    def add(self, job: DecodeJob) -> None:
        """Includes a sequence from the next plan on."""
        self._added.append(job)

    def num_tokens(self, job: DecodeJob) -> int:
        """Tokens that the job has sampled here."""
        return self._num_steps - job.joined_at

    def schedule_check(self, job: DecodeJob) -> None:
        """Schedules the job's next check, if it has one."""
        if (after := job.next_check()) is not None:
            self._push(self._num_steps + max(1, after), False, job)

    def check_soon(self, job: DecodeJob) -> None:
        """Schedules a check of the job at the end of the current step, or of the next one if none runs."""
        self._push(self._num_steps + 1, False, job)

    def remove(self, job: DecodeJob) -> None:
        """Removes a job that is in the steps. Its ``done`` is not called."""
        job.is_removed = True
        self._num_jobs -= 1
        self._context -= job.num_context + self.num_tokens(job)

    def has_work(self) -> bool:
        return bool(self._num_jobs or self._added)

    def max_steps(self) -> int:
        self._pop_removed()
        return self._stops[0][0] - self._num_steps

    def plan(self, now_s: float) -> None:
        for job in self._added:
            job.joined_at = self._num_steps
            self._num_jobs += 1
            self._context += job.num_context
            self._push(self._num_steps + job.num_left, True, job)
            self.schedule_check(job)
        self._added.clear()

    def duration_s(self, num_steps: int) -> float:
        """See `Worker`. Each step attends to one more token of each sequence than the step before."""
        growing = self._cost.per_context_s * self._num_jobs * num_steps * (num_steps - 1) / 2
        return num_steps * self._cost.step_s(self._num_jobs, self._context) + growing

    def apply(self, num_steps: int) -> None:
        self._num_runs += 1
        if self._num_runs % _OBSERVE_EVERY == 1:
            self.fit.observe(StepShape(self._num_jobs, self._context, self._num_jobs), self.duration_s(1))
        self._num_steps += num_steps
        self._context += num_steps * self._num_jobs
        self._pop_removed()
        while self._stops and self._stops[0][0] <= self._num_steps:
            _, _, is_end, job = heapq.heappop(self._stops)
            if is_end:
                self.remove(job)
                job.done()
            else:
                job.check()
            self._pop_removed()

    def _push(self, step: int, is_end: bool, job: DecodeJob) -> None:
        self._num_stops += 1
        heapq.heappush(self._stops, (step, self._num_stops, is_end, job))

    def _pop_removed(self) -> None:
        while self._stops and self._stops[0][3].is_removed:
            heapq.heappop(self._stops)


class Device:
    """Owns the grant of the device, and its runs of steps.

    `wake` has to be called after each change of the workers' work. The current run then ends with its current step.
    """

    def __init__(
        self,
        timeline: Timeline,
        workers: Sequence[Worker],
        delays: Delays = NO_DELAYS,
        policy: ArbiterPolicy = one_at_a_time,
    ) -> None:
        """``policy`` has to grant one worker at a time. The index of a worker is its slot."""
        self._timeline = timeline
        self._delays = delays
        self._policy = policy
        self._turn_s = 0.0
        self._workers = workers
        self._demands = [Demand(slot, worker.role, "") for slot, worker in enumerate(workers)]
        self._last_slot = -1
        self._computing: int | None = None
        """The slot of the worker that computes, or ``_BETWEEN_STEPS``; None: the device is idle."""
        self._started_at_s = 0.0
        self._num_steps = 0
        self._end_id = 0
        self.busy_s = 0.0

    def wake(self) -> None:
        """Work was added or removed."""
        if self._computing is None:
            self._start()
        elif self._computing != _BETWEEN_STEPS and self._num_steps > 1:
            self._shorten(self._workers[self._computing])

    def _start(self) -> None:
        demands = [demand for demand in self._demands if self._workers[demand.slot].has_work()]
        granted, kept = decide(self._policy, demands, (), self._last_slot)
        self._computing = next(iter(granted), None)
        if self._computing is None:
            return
        worker = self._workers[self._computing]
        self._turn_s = self._delays.turn_s if self._computing != self._last_slot else 0.0
        self._last_slot = self._computing
        worker.plan(self._timeline.now_s)
        self._started_at_s = self._timeline.now_s
        num_steps = worker.max_steps()
        self._schedule_end(worker, num_steps if self._computing in kept else min(num_steps, STEPS_PER_GRANT))

    def _schedule_end(self, worker: Worker, num_steps: int) -> None:
        """The run takes ``num_steps`` steps. An end that was scheduled for it before has no effect."""
        self._num_steps = num_steps
        self._end_id += 1
        end_id = self._end_id
        ends_at_s = self._started_at_s + self._duration_s(worker, num_steps)
        self._timeline.at(ends_at_s, lambda: self._end(worker, end_id))

    def _duration_s(self, worker: Worker, num_steps: int) -> float:
        return self._turn_s + num_steps * self._delays.step_s + worker.duration_s(num_steps)

    def _shorten(self, worker: Worker) -> None:
        """Ends the run with its current step, which is found by bisection."""
        passed_s = self._timeline.now_s - self._started_at_s
        first, last = 1, self._num_steps
        while first < last:
            middle = (first + last) // 2
            if self._duration_s(worker, middle) >= passed_s - 1e-12:
                last = middle
            else:
                first = middle + 1
        if first < self._num_steps:
            self._schedule_end(worker, first)

    def _end(self, worker: Worker, end_id: int) -> None:
        if end_id != self._end_id:
            return
        self.busy_s += self._timeline.now_s - self._started_at_s
        self._computing = _BETWEEN_STEPS
        worker.apply(self._num_steps)
        self._computing = None
        self._start()


_BETWEEN_STEPS = -1
"""A run has ended and the next one is not chosen yet. The choice will see all changes, so `Device.wake` returns."""
