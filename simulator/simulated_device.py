"""The workers of one unit, and the device on which they compute.

What they compute is decided as in the mesh: by the arbiter (`kvstore.arbiter`) and by the engine's division of a step's
token budget (`muxmesh.engine.scheduler.divide_token_budget`) in the mesh's order. Only the steps themselves are not
run, but counted: decode steps in which nothing changes but the number of tokens are taken together, and their time is
added up in closed form.
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
"""Runs of steps of which the cost fit observes one: a live worker observes each step, which changes little."""


class Worker(Protocol):
    """A prefill or a decode worker."""

    role: Role
    fit: CostFit

    def has_work(self) -> bool:
        """True if there is something to compute."""

    def max_steps(self) -> int:
        """Steps until something other than the number of tokens changes."""

    def begin(self, now_s: float) -> None:
        """Plans the next step."""

    def seconds(self, num_steps: int) -> float:
        """Duration of the planned step and those after it."""

    def end(self, num_steps: int) -> None:
        """Applies the steps."""


@dataclass(slots=True)
class PrefillJob:
    """A prompt to compute; ``done`` is called with its first token."""

    scheduling: SchedulingState
    num_computed_tokens: int
    num_uncomputed_tokens: int
    done: Callable[[], None]


class PrefillWorker:
    """Computes prompts, step by step, as the engine's scheduler divides them."""

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
        """Adds a prompt."""
        self._jobs.append(job)

    def has_work(self) -> bool:
        """See `Worker`."""
        return bool(self._jobs)

    def max_steps(self) -> int:
        """See `Worker`."""
        return 1

    def begin(self, now_s: float) -> None:
        """See `Worker`."""
        self._planned = divide_token_budget(self._jobs, self._policy, now_s, self._max_num_seqs, self._token_budget)
        context = sum(context_of(job.num_computed_tokens, count) for job, count in self._planned)
        self._shape = StepShape(sum(count for _, count in self._planned), context, len(self._planned))

    def seconds(self, num_steps: int) -> float:
        """See `Worker`."""
        return self._cost.step_s(self._shape.num_tokens, self._shape.num_context)

    def end(self, num_steps: int) -> None:
        """See `Worker`."""
        self.fit.observe(self._shape, self.seconds(1))
        for job, count in self._planned:
            job.num_computed_tokens += count
            job.num_uncomputed_tokens -= count
        finished = [job for job, _ in self._planned if job.num_uncomputed_tokens == 0]
        self._jobs = [job for job in self._jobs if job.num_uncomputed_tokens]
        for job in finished:
            job.done()


@dataclass(slots=True)
class DecodeJob:
    """A sequence after its first token. ``num_left``: tokens to come.

    ``next_check`` returns after how many more tokens the sequence needs attention, or None; then ``check`` is called,
    and may remove the job. ``joined_at``: the worker's step before the job's first, -1 until then.
    """

    num_context: int
    num_left: int
    done: Callable[[], None]
    next_check: Callable[[], int | None]
    check: Callable[[], None]
    joined_at: int = -1
    is_removed: bool = False


class DecodeWorker:
    """Computes one token of every sequence in each step. Invariant: ``_context`` is the sum over its sequences."""

    role = Role.DECODE

    def __init__(self, cost: StepCost) -> None:
        self.fit = CostFit()
        self._cost = cost
        self._num_steps = 0
        self._num_runs = 0
        self._num_jobs = 0
        self._context = 0
        self._added: list[DecodeJob] = []
        """Sequences that are not in a step yet."""
        self._stops: list[tuple[int, int, bool, DecodeJob]] = []
        self._last = 0

    def add(self, job: DecodeJob) -> None:
        """Adds a sequence to the next step that is planned."""
        self._added.append(job)

    def num_tokens(self, job: DecodeJob) -> int:
        """Tokens that the job has sampled here."""
        return self._num_steps - job.joined_at

    def watch(self, job: DecodeJob) -> None:
        """Schedules the next check of the job."""
        if (after := job.next_check()) is not None:
            self._push(self._num_steps + max(1, after), False, job)

    def check_next(self, job: DecodeJob) -> None:
        """Checks the job at the end of the step in progress, or of the next one."""
        self._push(self._num_steps + 1, False, job)

    def remove(self, job: DecodeJob) -> None:
        """Removes an unfinished job."""
        job.is_removed = True
        self._num_jobs -= 1
        self._context -= job.num_context + self.num_tokens(job)

    def has_work(self) -> bool:
        """See `Worker`."""
        return bool(self._num_jobs or self._added)

    def max_steps(self) -> int:
        """See `Worker`."""
        self._pop_removed()
        return self._stops[0][0] - self._num_steps

    def begin(self, now_s: float) -> None:
        """See `Worker`."""
        for job in self._added:
            job.joined_at = self._num_steps
            self._num_jobs += 1
            self._context += job.num_context
            self._push(self._num_steps + job.num_left, True, job)
            self.watch(job)
        self._added.clear()

    def seconds(self, num_steps: int) -> float:
        """See `Worker`. Each step attends to one token more of each sequence."""
        growing = self._cost.per_context_s * self._num_jobs * num_steps * (num_steps - 1) / 2
        return num_steps * self._cost.step_s(self._num_jobs, self._context) + growing

    def end(self, num_steps: int) -> None:
        """See `Worker`."""
        self._num_runs += 1
        if self._num_runs % _OBSERVE_EVERY == 1:
            self.fit.observe(StepShape(self._num_jobs, self._context, self._num_jobs), self.seconds(1))
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
        self._last += 1
        heapq.heappush(self._stops, (step, self._last, is_end, job))

    def _pop_removed(self) -> None:
        while self._stops and self._stops[0][3].is_removed:
            heapq.heappop(self._stops)


class Device:
    """Owns the grant. `wake` it after each change of the workers' work: a run of steps is then cut short."""

    def __init__(
        self,
        timeline: Timeline,
        workers: Sequence[Worker],
        delays: Delays = NO_DELAYS,
        policy: ArbiterPolicy = one_at_a_time,
    ) -> None:
        """``policy``: grants one worker at a time."""
        self._timeline = timeline
        self._delays = delays
        self._policy = policy
        self._turn_s = 0.0
        self._workers = workers
        self._demands = [Demand(slot, worker.role, "") for slot, worker in enumerate(workers)]
        self._last_slot = -1
        self._running: int | None = None
        self._began_at_s = 0.0
        self._num_steps = 0
        self._version = 0
        self.busy_s = 0.0

    def wake(self) -> None:
        """Work was added, or removed."""
        if self._running is None:
            self._start()
        elif self._running != _BETWEEN and self._num_steps > 1:
            self._cut(self._workers[self._running])

    def _start(self) -> None:
        demands = [demand for demand in self._demands if self._workers[demand.slot].has_work()]
        granted, kept = decide(self._policy, demands, frozenset(), self._last_slot)
        self._running = next(iter(granted), None)
        if self._running is None:
            return
        worker = self._workers[self._running]
        self._turn_s = self._delays.turn_s if self._running != self._last_slot else 0.0
        self._last_slot = self._running
        worker.begin(self._timeline.now_s)
        self._began_at_s = self._timeline.now_s
        self._run(worker, worker.max_steps() if self._running in kept else STEPS_PER_GRANT)

    def _run(self, worker: Worker, num_steps: int) -> None:
        self._num_steps = num_steps
        self._version += 1
        version = self._version
        ends_at_s = self._began_at_s + self._seconds(worker, num_steps)
        self._timeline.at(ends_at_s, lambda: self._end(worker, version))

    def _seconds(self, worker: Worker, num_steps: int) -> float:
        return self._turn_s + num_steps * self._delays.step_s + worker.seconds(num_steps)

    def _cut(self, worker: Worker) -> None:
        """The run ends with the step that is in progress now."""
        passed_s = self._timeline.now_s - self._began_at_s
        first, last = 1, self._num_steps
        while first < last:
            middle = (first + last) // 2
            if self._seconds(worker, middle) >= passed_s - 1e-12:
                last = middle
            else:
                first = middle + 1
        if first < self._num_steps:
            self._run(worker, first)

    def _end(self, worker: Worker, version: int) -> None:
        if version != self._version:
            return
        self.busy_s += self._timeline.now_s - self._began_at_s
        self._running = _BETWEEN
        worker.end(self._num_steps)
        self._running = None
        self._start()


_BETWEEN = -1
"""A step has ended and the next is not chosen: waking the device changes nothing then."""
