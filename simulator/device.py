"""The workers of one unit, and the device on which one of them computes at a time.

What they compute is decided as in the mesh: the arbiter's turn (`kvstore.arbiter`), the engine's shares of a step
(`muxmesh.engine.scheduler.share_out`) in the mesh's order. Only the steps themselves are not run, but counted: decode
steps in which nothing changes but the number of tokens are taken together, and their time is added up in closed form.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.arbiter import next_slot
from muxmesh.cost import CostFit, StepCost, StepShape, context_of
from muxmesh.engine.scheduler import share_out
from muxmesh.order import Order
from muxmesh.types import Standing
from simulator.timeline import NO_DELAYS, Delays, Timeline

_LEARN_EVERY = 16
"""Stretches of steps of which one is shown to the cost fit: a live worker shows each step, which changes little."""


class Worker(Protocol):
    """A prefill or a decode worker."""

    fit: CostFit

    def has_work(self) -> bool:
        """There is something to compute."""

    def most_steps(self) -> int:
        """Steps until something other than the number of tokens changes."""

    def begin(self, now_s: float) -> None:
        """The next step is planned."""

    def seconds(self, num_steps: int) -> float:
        """What the planned step, and those after it, take."""

    def end(self, num_steps: int) -> None:
        """So many steps are done."""


@dataclass(slots=True)
class PrefillJob:
    """A prompt that is computed; ``done`` is called with its first token."""

    standing: Standing
    num_computed_tokens: int
    num_uncomputed_tokens: int
    done: Callable[[], None]


class PrefillWorker:
    """Computes prompts, step by step, as the engine's scheduler shares its steps out."""

    def __init__(self, cost: StepCost, order: Order, token_budget: int, max_num_seqs: int) -> None:
        self.fit = CostFit()
        self._cost = cost
        self._order = order
        self._token_budget = token_budget
        self._max_num_seqs = max_num_seqs
        self._jobs: list[PrefillJob] = []
        self._planned: list[tuple[PrefillJob, int]] = []
        self._shape = StepShape(0, 0, 0)

    def add(self, job: PrefillJob) -> None:
        """Another prompt."""
        self._jobs.append(job)

    def has_work(self) -> bool:
        """See `Worker`."""
        return bool(self._jobs)

    def most_steps(self) -> int:
        """See `Worker`."""
        return 1

    def begin(self, now_s: float) -> None:
        """See `Worker`."""
        self._planned = share_out(self._jobs, self._order, now_s, self._max_num_seqs, self._token_budget)
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
    """An answer after its first token. ``left``: tokens to come.

    ``next_halt`` says after how many more tokens something has to be asked for, or None; then ``halt`` is called, and
    may take the job out. ``joined_at``: the worker's step before its first, -1 until then.
    """

    num_context: int
    left: int
    done: Callable[[], None]
    next_halt: Callable[[], int | None]
    halt: Callable[[], None]
    joined_at: int = -1
    is_out: bool = False


class DecodeWorker:
    """Computes one token of every answer in each step. Invariant: ``_context`` is the sum over the answers in it."""

    def __init__(self, cost: StepCost) -> None:
        self.fit = CostFit()
        self._cost = cost
        self._num_steps = 0
        self._num_stretches = 0
        self._jobs = 0
        self._context = 0
        self._fresh: list[DecodeJob] = []
        """Answers that are not in a step yet."""
        self._stops: list[tuple[int, int, bool, DecodeJob]] = []
        self._last = 0

    def add(self, job: DecodeJob) -> None:
        """Another answer; it is in the next step that is planned."""
        self._fresh.append(job)

    def progress(self, job: DecodeJob) -> int:
        """Tokens that the job has got here."""
        return self._num_steps - job.joined_at

    def watch(self, job: DecodeJob) -> None:
        """Asks the job anew when it has to halt."""
        if (after := job.next_halt()) is not None:
            self._push(self._num_steps + max(1, after), False, job)

    def halt_next(self, job: DecodeJob) -> None:
        """The job halts at the end of the step that is under way, or of the next one."""
        self._push(self._num_steps + 1, False, job)

    def take_out(self, job: DecodeJob) -> None:
        """The job leaves, unfinished."""
        job.is_out = True
        self._jobs -= 1
        self._context -= job.num_context + self.progress(job)

    def has_work(self) -> bool:
        """See `Worker`."""
        return bool(self._jobs or self._fresh)

    def most_steps(self) -> int:
        """See `Worker`."""
        self._forget_those_out()
        return self._stops[0][0] - self._num_steps

    def begin(self, now_s: float) -> None:
        """See `Worker`."""
        for job in self._fresh:
            job.joined_at = self._num_steps
            self._jobs += 1
            self._context += job.num_context
            self._push(self._num_steps + job.left, True, job)
            self.watch(job)
        self._fresh.clear()

    def seconds(self, num_steps: int) -> float:
        """See `Worker`. Each step looks back at one token more of each answer."""
        growing = self._cost.per_context_s * self._jobs * num_steps * (num_steps - 1) / 2
        return num_steps * self._cost.step_s(self._jobs, self._context) + growing

    def end(self, num_steps: int) -> None:
        """See `Worker`."""
        self._num_stretches += 1
        if self._num_stretches % _LEARN_EVERY == 1:
            self.fit.observe(StepShape(self._jobs, self._context, self._jobs), self.seconds(1))
        self._num_steps += num_steps
        self._context += num_steps * self._jobs
        self._forget_those_out()
        while self._stops and self._stops[0][0] <= self._num_steps:
            _, _, is_end, job = heapq.heappop(self._stops)
            if is_end:
                self.take_out(job)
                job.done()
            else:
                job.halt()
            self._forget_those_out()

    def _push(self, step: int, is_end: bool, job: DecodeJob) -> None:
        self._last += 1
        heapq.heappush(self._stops, (step, self._last, is_end, job))

    def _forget_those_out(self) -> None:
        while self._stops and self._stops[0][3].is_out:
            heapq.heappop(self._stops)


class Device:
    """Owns the turn. ``wake`` it after each change of the workers' work: a stretch of steps is then cut short."""

    def __init__(self, timeline: Timeline, workers: Sequence[Worker], delays: Delays = NO_DELAYS) -> None:
        self._timeline = timeline
        self._delays = delays
        self._turn_s = 0.0
        self._workers = workers
        self._last_slot = -1
        self._running: int | None = None
        self._began_at_s = 0.0
        self._num_steps = 0
        self._version = 0
        self.busy_s = 0.0

    def wake(self) -> None:
        """Work came, or went."""
        if self._running is None:
            self._start()
        elif self._running != _BETWEEN and self._num_steps > 1:
            self._cut(self._workers[self._running])

    def _start(self) -> None:
        working = {slot for slot, worker in enumerate(self._workers) if worker.has_work()}
        chosen = next_slot(working, self._last_slot)
        self._running = chosen
        if chosen is None:
            return
        worker = self._workers[chosen]
        self._turn_s = self._delays.turn_s if chosen != self._last_slot else 0.0
        self._last_slot = chosen
        worker.begin(self._timeline.now_s)
        self._began_at_s = self._timeline.now_s
        self._run(worker, worker.most_steps() if len(working) == 1 else 1)

    def _run(self, worker: Worker, num_steps: int) -> None:
        self._num_steps = num_steps
        self._version += 1
        version = self._version
        ends_at_s = self._began_at_s + self._seconds(worker, num_steps)
        self._timeline.at(ends_at_s, lambda: self._end(worker, version))

    def _seconds(self, worker: Worker, num_steps: int) -> float:
        return self._turn_s + num_steps * self._delays.step_s + worker.seconds(num_steps)

    def _cut(self, worker: Worker) -> None:
        """The stretch ends with the step that is under way now."""
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
"""A step has ended and the next is not chosen: who wakes the device meanwhile changes nothing."""
