"""The prefill and decode workers of one unit in virtual time: which jobs a step computes, and how long it takes alone.

The engine's division of a step's token budget (`muxmesh.engine.token_budget.divide_token_budget`) chooses the jobs of a
prefill step, its choice of a batch (`muxmesh.batch_choice`) those of a decode step. Consecutive decode steps in
which nothing changes except the number of tokens are one run of steps, whose time is computed in closed form. This
module knows no device, no arbiter, no leases and no KV blocks.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from muxmesh.batch_choice import NEARLY_DONE, choose_batch, is_protected
from muxmesh.engine.api import ComputeDemand
from muxmesh.engine.scheduler import TOKEN_TIME_RATE
from muxmesh.engine.step_limit import StepLimit
from muxmesh.engine.token_budget import divide_token_budget
from muxmesh.engine.urgency import Urgency
from muxmesh.remaining_work import RemainingWork
from muxmesh.running_mean import RunningMean
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.slo import slack_s
from muxmesh.step_cost import CostFit, StepShape, context_of
from muxmesh.types import Role, SchedulingState, TenantStanding
from simulator.step_times import StepTimes

_OBSERVE_EVERY = 16
"""Of this many runs of steps, the cost fit observes one. A real worker observes each step; the fits hardly differ."""

_OLDEST = SchedulingState(0, 0.0)


class Worker(Protocol):
    """A prefill or a decode worker. For each run of steps, the device calls `plan`, `duration_s` and `apply`."""

    role: Role
    model: str
    share: float
    """Of the device, in (0, 1]."""
    fit: CostFit

    def has_work(self) -> bool:
        """True if there is something to compute."""

    def plan(self, now_s: float, longest_s: float = math.inf) -> None:
        """Plans the next step, with prompts one of at most ``longest_s`` seconds, see `StepLimit`."""

    def max_steps(self) -> int:
        """Steps from the planned one on until something other than the number of tokens changes; at least 1."""

    def duration_s(self, num_steps: int) -> float:
        """Seconds of the planned step and those after it, ``num_steps`` in all, while no other worker computes."""

    def apply(self, num_steps: int, slowdown: float = 1.0) -> None:
        """Ends the run after ``num_steps`` steps. Calls back the jobs that end or need attention then.

        ``slowdown``: the time that the run took, relative to `duration_s`.
        """

    def demand(self, now_s: float) -> ComputeDemand:
        """What the jobs need, as `muxmesh.engine.scheduler` reports it."""


@dataclass(slots=True)
class PrefillJob:
    """A prompt to compute. ``done`` is called when it is computed and its first token sampled."""

    scheduling: SchedulingState
    num_computed_tokens: int
    num_uncomputed_tokens: int
    done: Callable[[], None]
    due_at_s: float = math.inf
    """When its token is due by its SLO."""


class PrefillWorker:
    """Computes prompts in single steps, divided as by the engine's scheduler."""

    role = Role.PREFILL

    def __init__(
        self,
        times: StepTimes,
        policy: SchedulingPolicy,
        token_budget: int,
        max_num_seqs: int,
        model: str = "",
        share: float = 1.0,
    ) -> None:
        self.model = model
        self.share = share
        self.fit = CostFit()
        self._times = times
        self._policy = policy
        self._token_budget = token_budget
        self._max_num_seqs = max_num_seqs
        self._jobs: list[PrefillJob] = []
        self._planned: list[tuple[PrefillJob, int]] = []
        self._shape = StepShape(0, 0, 0)
        self._step_s = 0.0
        self._prompt_token_s = RunningMean(TOKEN_TIME_RATE)

    def add(self, job: PrefillJob) -> None:
        self._jobs.append(job)

    def has_work(self) -> bool:
        return bool(self._jobs)

    def max_steps(self) -> int:
        return 1

    def plan(self, now_s: float, longest_s: float = math.inf) -> None:
        cost, budget = self.fit.cost, self._token_budget
        limit = None if cost is None or longest_s == math.inf else StepLimit(cost, longest_s)
        self._planned = divide_token_budget(self._jobs, self._policy, now_s, self._max_num_seqs, budget, limit)
        context = sum(context_of(job.num_computed_tokens, count) for job, count in self._planned)
        self._shape = StepShape(sum(count for _, count in self._planned), context, len(self._planned))
        self._step_s = self._times.prefill_s(self._shape, self.share)

    def duration_s(self, num_steps: int) -> float:
        return self._step_s

    def apply(self, num_steps: int, slowdown: float = 1.0) -> None:
        step_s, num_tokens = self._step_s * slowdown, self._shape.num_tokens
        self.fit.observe(self._shape, step_s)
        if step_s > 0 and num_tokens > self._shape.num_seqs:
            self._prompt_token_s.add(step_s / num_tokens)
        for job, count in self._planned:
            job.num_computed_tokens += count
            job.num_uncomputed_tokens -= count
        finished = [job for job, _ in self._planned if job.num_uncomputed_tokens == 0]
        self._jobs = [job for job in self._jobs if job.num_uncomputed_tokens]
        for job in finished:
            job.done()

    def demand(self, now_s: float) -> ComputeDemand:
        urgency, token_s = Urgency(), self._prompt_token_s.mean
        for job in self._jobs:
            start_by_s = job.due_at_s - job.num_uncomputed_tokens * token_s
            urgency.note(job.scheduling, start_by_s, job.due_at_s, now_s)
        return urgency.demand(now_s)


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
    work: RemainingWork = field(default_factory=lambda: RemainingWork(_OLDEST, None))
    num_output: int = 0
    """Output tokens before the job."""
    key: int = 0
    """Identifies the sequence to the caller of `DecodeWorker.changed`."""
    due_at_s: float = math.inf
    """When the first of the tokens is due by its SLO."""
    tpot_s: float = math.inf
    """By its SLO, how much later each further token is due."""
    lost_after_s: float = math.inf
    """How much later than due a token may be before the SLO is missed."""
    num_sampled: int = 0
    """Tokens that it sampled before it joined the batch last."""
    joined_at: int = -1
    """The worker's step before the first one that includes the job; -1 while it is not in the batch."""
    num_joins: int = 0
    is_displaced: bool = False
    """Whether the last choice of a batch left it out."""
    num_preemptions: int = 0
    """How often others displaced it from the batch."""
    slack_s: float = math.inf
    """Seconds until its next token is due, as noted when a batch was chosen or its progress reported."""
    update_step: int = -1
    """The worker's step from which on its remaining work has to be updated; -1: it is not known."""
    is_removed: bool = False

    @property
    def scheduling(self) -> SchedulingState:
        return self.work.state

    @property
    def is_batched(self) -> bool:
        return self.joined_at >= 0

    @property
    def is_protected(self) -> bool:
        return is_protected(self.work, self.slack_s)


class DecodeWorker:
    """Samples one token of every sequence of its batch in each step.

    Invariant: ``_num_jobs`` and ``_context`` are the number and the context of the sequences of the batch.
    """

    role = Role.DECODE

    def __init__(
        self,
        times: StepTimes,
        model: str = "",
        share: float = 1.0,
        policy: SchedulingPolicy = FCFS,
        max_num_seqs: int = sys.maxsize,
    ) -> None:
        self.model = model
        self.share = share
        self.fit = CostFit()
        self.num_displaced = 0
        """Sequences that others displaced from the batch, each time."""
        self._times = times
        self._policy = policy
        self._max_num_seqs = max_num_seqs
        self._num_steps = 0
        self._num_runs = 0
        self._num_jobs = 0
        self._context = 0
        self._costs: dict[int, tuple[float, float]] = {}
        """Number of sequences → cost of a step."""
        self._cost = (0.0, 0.0)
        """Of the planned step."""
        self._batch: dict[int, DecodeJob] = {}
        """The sequences of the batch, by their identity."""
        self._waiting: list[DecodeJob] = []
        """Sequences that are not in the batch: added since the last plan, or displaced."""
        self._stops: list[tuple[int, int, bool, DecodeJob, int]] = []
        """A heap of (step, order of insertion, is the end, job, its joins by then): ends and checks of the jobs. Those
        of a job that left the batch since then are outdated.
        """
        self._num_stops = 0
        self._replans = False
        """Whether the next step has to be planned, as the last plan displaced as many sequences as it may."""
        self._arrivals: list[tuple[float, int, DecodeJob]] = []
        """A heap of (arrival, order of insertion, job). Removed jobs stay until they are first."""
        self._priorities = Counter[int]()
        """Class → number of jobs."""
        self._with_slo: dict[int, DecodeJob] = {}
        """The jobs whose tokens are due at some time, by their identity."""
        self._changed: dict[int, DecodeJob] = {}
        """The jobs whose progress has changed since the last call of `changed`, by their identity."""
        self._updates: list[tuple[int, int, DecodeJob]] = []
        """A heap of (`DecodeJob.update_step`, order of insertion, job); those with another step are outdated."""

    def add(self, job: DecodeJob) -> None:
        """Considers a sequence from the next plan on."""
        self._waiting.append(job)
        self._num_stops += 1
        heapq.heappush(self._arrivals, (job.scheduling.arrived_at_s, self._num_stops, job))
        self._count_class(job, 1)
        if job.due_at_s < math.inf:
            self._with_slo[id(job)] = job

    def num_tokens(self, job: DecodeJob) -> int:
        """Tokens that the job has sampled here."""
        return job.num_sampled + (self._num_steps - job.joined_at if job.is_batched else 0)

    def next_due_s(self, job: DecodeJob) -> float:
        """When the next token of the job is due."""
        return job.due_at_s + self.num_tokens(job) * job.tpot_s if job.due_at_s < math.inf else math.inf

    def update_slack(self, job: DecodeJob, now_s: float) -> None:
        """Notes the slack of the job."""
        if job.due_at_s < math.inf:
            job.slack_s = slack_s(self.next_due_s(job), job.lost_after_s, now_s)

    def update(self, job: DecodeJob) -> SchedulingState:
        """The state of the job with its remaining work of now."""
        job.work.update(job.num_output + self.num_tokens(job))
        return job.scheduling

    def note_change(self, job: DecodeJob) -> None:
        """`changed` will return the job. To be called for one that is not added yet; for others the worker does it."""
        self._changed[id(job)] = job

    def changed(self, now_s: float) -> list[DecodeJob]:
        """The jobs whose progress may have changed since the last call, with their remaining work and slack of now.

        That is so if one entered or left the batch, if its remaining work has to be updated, or if it has an SLO.
        """
        while self._updates and self._updates[0][0] <= self._num_steps:
            step, _, job = heapq.heappop(self._updates)
            if job.update_step == step and not job.is_removed:
                self._changed[id(job)] = job
        jobs = list({**self._changed, **self._with_slo}.values() if self._with_slo else self._changed.values())
        self._changed.clear()
        for job in jobs:
            num_output_tokens = job.num_output + self.num_tokens(job)
            job.work.update(num_output_tokens)
            self.update_slack(job, now_s)
            if job.is_batched:
                self._schedule_update(job, num_output_tokens)
        return jobs

    def schedule_check(self, job: DecodeJob) -> None:
        """Schedules the next check of a job of the batch, if it has one."""
        if (after := job.next_check()) is not None:
            self._push(self._num_steps + max(1, after), False, job)

    def check_soon(self, job: DecodeJob) -> None:
        """Schedules a check of a job of the batch at the end of the current step, or of the next one if none runs."""
        self._push(self._num_steps + 1, False, job)

    def remove(self, job: DecodeJob) -> None:
        """Removes a job. Its ``done`` is not called."""
        if job.is_batched:
            self._leave(job)
        else:
            self._waiting.remove(job)
        job.is_removed = True
        self._changed.pop(id(job), None)
        self._with_slo.pop(id(job), None)
        self._count_class(job, -1)

    def set_standing(self, job: DecodeJob, standing: TenantStanding) -> None:
        """Orders a job by another standing of its tenant from the next plan on; it may not be added yet."""
        is_counted = job.is_batched or job in self._waiting
        if is_counted:
            self._count_class(job, -1)
        job.work.set_standing(standing)
        if is_counted:
            self._count_class(job, 1)

    def plan_soon(self) -> None:
        """Ends the current run of steps after its current step if sequences wait, so that a batch is chosen again."""
        if self._waiting and self._batch:
            self.check_soon(next(iter(self._batch.values())))

    def _count_class(self, job: DecodeJob, number: int) -> None:
        rank = job.scheduling.class_rank
        self._priorities[rank] += number
        if not self._priorities[rank]:
            del self._priorities[rank]

    def has_work(self) -> bool:
        return bool(self._batch or self._waiting)

    def max_steps(self) -> int:
        """See `Worker`. While a sequence waits, a new prediction for one of the batch may change the choice."""
        self._pop_outdated()
        steps = self._stops[0][0] - self._num_steps
        if self._waiting:
            if self._replans or any(job.due_at_s < math.inf for job in self._waiting):
                return 1
            for job in self._batch.values():
                if (after := job.work.tokens_until_prediction(job.num_output + self.num_tokens(job))) is not None:
                    steps = min(steps, after)
        return steps

    def plan(self, now_s: float, longest_s: float = math.inf) -> None:
        if self._waiting:
            self._choose(now_s)
        cost = self._costs.get(self._num_jobs)
        if cost is None:
            cost = self._costs[self._num_jobs] = self._times.decode_cost(self._num_jobs, self.share)
        self._cost = cost

    def duration_s(self, num_steps: int) -> float:
        """See `Worker`. Each step attends to one more token of each sequence than the step before."""
        base_s, per_context_s = self._cost
        context = num_steps * self._context + self._num_jobs * num_steps * (num_steps - 1) / 2
        return num_steps * base_s + per_context_s * context

    def apply(self, num_steps: int, slowdown: float = 1.0) -> None:
        self._num_runs += 1
        if self._num_runs % _OBSERVE_EVERY == 1:
            self.fit.observe(StepShape(self._num_jobs, self._context, self._num_jobs), self.duration_s(1) * slowdown)
        self._num_steps += num_steps
        self._context += num_steps * self._num_jobs
        self._pop_outdated()
        while self._stops and self._stops[0][0] <= self._num_steps:
            _, _, is_end, job, _ = heapq.heappop(self._stops)
            if is_end:
                self.remove(job)
                job.done()
            else:
                job.check()
            self._pop_outdated()

    def demand(self, now_s: float) -> ComputeDemand:
        while self._arrivals[0][2].is_removed:
            heapq.heappop(self._arrivals)
        priority, arrived_at_s = min(self._priorities), self._arrivals[0][0]
        if not self._with_slo:
            return ComputeDemand(priority, arrived_at_s)
        urgency = Urgency()
        for job in self._with_slo.values():
            due_s = self.next_due_s(job)
            urgency.note(job.scheduling, due_s, due_s + job.lost_after_s, now_s)
        return replace(urgency.demand(now_s), priority=priority, arrived_at_s=arrived_at_s)

    def _choose(self, now_s: float) -> None:
        """Chooses the batch as the engine's scheduler does."""
        if self._num_jobs + len(self._waiting) <= self._max_num_seqs:
            joining, self._waiting = self._waiting, []
        else:
            jobs = [*self._batch.values(), *self._waiting]
            for job in jobs:
                if not job.is_batched or job.update_step <= self._num_steps:
                    state = job.scheduling
                    if self.update(job) is not state:
                        self.note_change(job)
                self.update_slack(job, now_s)
            chosen = choose_batch(jobs, self._policy, now_s, self._max_num_seqs)
            chosen_ids = {id(job) for job in chosen}
            num_displaced = 0
            for job in [job for one, job in self._batch.items() if one not in chosen_ids]:
                self._leave(job)
                job.num_preemptions += 1
                num_displaced += 1
            self.num_displaced += num_displaced
            self._replans = num_displaced >= max(1, self._max_num_seqs // 2)
            joining = [job for job in chosen if not job.is_batched]
            self._waiting = [job for job in jobs if id(job) not in chosen_ids]
            for job in self._waiting:
                if not job.is_displaced:
                    self.note_change(job)
                job.is_displaced = True
        for job in joining:
            self._join(job)

    def _join(self, job: DecodeJob) -> None:
        job.joined_at, job.is_displaced = self._num_steps, False
        job.num_joins += 1
        self.note_change(job)
        self._batch[id(job)] = job
        self._num_jobs += 1
        self._context += job.num_context + job.num_sampled
        self._push(self._num_steps + job.num_left - job.num_sampled, True, job)
        self.schedule_check(job)

    def _leave(self, job: DecodeJob) -> None:
        del self._batch[id(job)]
        job.num_sampled = self.num_tokens(job)
        job.joined_at = -1
        self._num_jobs -= 1
        self._context -= job.num_context + job.num_sampled

    def _schedule_update(self, job: DecodeJob, num_output_tokens: int) -> None:
        """Lets `changed` return a job of the batch once its remaining work has to be updated."""
        after = job.work.tokens_until_change(num_output_tokens, NEARLY_DONE)
        step = -1 if after is None else self._num_steps + after
        if step != job.update_step:
            job.update_step = step
            if after is not None:
                self._num_stops += 1
                heapq.heappush(self._updates, (step, self._num_stops, job))

    def _push(self, step: int, is_end: bool, job: DecodeJob) -> None:
        self._num_stops += 1
        heapq.heappush(self._stops, (step, self._num_stops, is_end, job, job.num_joins))

    def _pop_outdated(self) -> None:
        while self._stops and (not self._stops[0][3].is_batched or self._stops[0][4] != self._stops[0][3].num_joins):
            heapq.heappop(self._stops)
