"""The engine for models that MuxMesh computes itself: a loop over the pure scheduler and a runner in a thread."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from muxmesh.clock import Clock
from muxmesh.engine.api import ComputeDemand, EngineJob, Event, Failed, Finished, Grant, JobDone
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.step import Runner, SampledToken, Step, StepOutcome
from muxmesh.errors import DeviceLost, EngineFailed, WorkerLost
from muxmesh.types import TokenLogprobs

_log = logging.getLogger(__name__)

_LONGEST_RUN_S = 0.02
"""A run of steps ends after this time. Its tokens are sent together, and a reader is not to see them come in bursts."""

StepObserver = Callable[[Step, StepOutcome, float], None]
"""Called after each run of steps that did not raise, with its duration in seconds."""


class StepEngine:
    """An `Engine` of one scheduler and one runner. The runner is called from one thread of the engine's own."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        grant: Grant,
        clock: Clock,
        observe: StepObserver = lambda step, outcome, seconds: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._grant = grant
        self._clock = clock
        self._observe = observe
        self._thread: ThreadPoolExecutor | None = None
        """None while nothing is loaded, or the engine sleeps."""
        self._is_asleep = False
        self._queues: dict[int, asyncio.Queue[Event]] = {}
        self._wake = asyncio.Event()
        self._has_change = threading.Event()
        """Set when a job changed since the step in flight was planned: its run of steps ends early."""
        self._step_done = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._demanded: tuple[ComputeDemand, float] | None = None
        """While the loop waits for the grant: its demand, and the unix time of that."""
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, asleep: bool = False) -> None:
        self._is_asleep = asleep
        if not asleep:
            await self.wake()
        self._loop_task = asyncio.create_task(self._loop(), name="engine loop")

    async def sleep(self, drop_weights: bool) -> None:
        if self._queues:
            raise ValueError(f"{len(self._queues)} jobs have not ended")
        thread = self._thread or _new_thread()
        self._thread, self._is_asleep = None, True
        await asyncio.get_running_loop().run_in_executor(thread, self._runner.unload, drop_weights)
        thread.shutdown()

    async def wake(self) -> None:
        if self._thread is not None:
            return
        thread = _new_thread()
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._runner.load)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        self._thread, self._is_asleep = thread, False

    async def stop(self) -> None:
        """See `Engine`. Blocks the event loop until the step in flight is done."""
        self._has_change.set()
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._grant.drop()  # the exit of the process, which returns it too, may take a while
        self._scheduler.fail_all(Failed("the engine was stopped", WorkerLost))
        self._deliver()
        self._step_done.set()

    def submit(self, job: EngineJob) -> AsyncIterator[Event]:
        """See `Engine`. Raises ValueError if a job with this id has not ended."""
        if self._is_asleep:
            raise WorkerLost("the engine sleeps")
        self._scheduler.add(job, self._clock.unix_s())
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[job.job_id] = queue
        self._on_change()
        return self._events(queue)

    async def cancel(self, job_id: int) -> None:
        self._queues.pop(job_id, None)
        if self._scheduler.cancel(job_id):
            self._has_change.set()
            await self._step_done.wait()

    def preempt(self, job_id: int) -> None:
        self._scheduler.preempt(job_id)
        self._has_change.set()
        self._deliver()

    def resume(self, job_id: int) -> None:
        self._scheduler.resume(job_id)
        self._on_change()

    def sequence_changed(self, job_id: int) -> None:
        """See `Engine`. The scheduler reads the records when it plans, so a plan is all that this may cause.

        A job in a run has the blocks for it: its growth, which comes every few steps of a large batch, ends no run.
        """
        if not self._scheduler.is_in_flight(job_id):
            self._on_change()

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._death)

    @staticmethod
    async def _events(queue: asyncio.Queue[Event]) -> AsyncIterator[Event]:
        while True:
            event = await queue.get()
            yield event
            if isinstance(event, JobDone | Finished | Failed):
                return

    async def _loop(self) -> None:
        try:
            await self._run_steps()
        except Exception as error:  # the engine loop: after a bug of ours, no job may wait for ever
            _log.exception("the engine loop failed")
            # Another worker continues what a lost device has begun, however often it happens at the same token.
            kind = WorkerLost if isinstance(error, DeviceLost) else EngineFailed
            self._scheduler.fail_all(Failed(f"the engine is dead: {error}", kind))
            self._deliver()
            self._step_done.set()
            self._grant.drop()
            self._death.set_result(f"{type(error).__name__}: {error}")

    async def _run_steps(self) -> None:
        while True:
            if not self._scheduler.has_work():
                self._grant.drop()
                self._wake.clear()
                await self._wake.wait()
                continue
            now_s = self._clock.unix_s()
            self._demanded = self._scheduler.demand(now_s), now_s
            await self._grant.acquire(self._demanded[0])
            self._demanded = None
            self._grant.release(await self._run_step())

    async def _run_step(self) -> int:
        """Plans, computes and applies a step or a run of steps. Returns how many were computed."""
        self._has_change.clear()
        step = self._scheduler.next_step(self._clock.unix_s(), self._runner.max_steps, self._grant.step_limit)
        if step is None:  # every job was cancelled while the loop waited for the grant
            return 0
        self._step_done.clear()
        started_at_s = self._clock.monotonic_s()
        try:
            outcome = await self._run(step)
        except DeviceLost:  # every further step would fail
            raise
        except Exception as error:  # the engine loop: an error of the runner fails jobs, not the process
            _log.exception("a step with %d jobs failed", len(step.chunks))
            outcome = await self._run_one_by_one(step, error)
            self._scheduler.apply(outcome)
        else:
            run_s = self._clock.monotonic_s() - started_at_s
            self._scheduler.apply(outcome, run_s)
            self._observe(step, outcome, run_s)
        self._step_done.set()
        self._deliver()
        return outcome.num_steps

    async def _run(self, step: Step) -> StepOutcome:
        assert self._thread is not None, "no job is submitted to an engine that sleeps"
        may_continue = functools.partial(self._may_continue, self._clock.monotonic_s() + _LONGEST_RUN_S)
        run = asyncio.get_running_loop().run_in_executor(self._thread, self._runner.run, step, may_continue)
        return await asyncio.shield(run)

    def _may_continue(self, ends_at_s: float) -> bool:
        """Called in the runner's thread. False once another worker waits, a job changed, or the run is long enough."""
        if self._grant.is_recalled or self._has_change.is_set():
            return False
        return self._clock.monotonic_s() < ends_at_s

    def _on_change(self) -> None:
        self._has_change.set()
        self._wake.set()
        if self._demanded is not None and self._scheduler.has_work():
            earlier, at_s = self._demanded
            now_s = self._clock.unix_s()
            demand = self._scheduler.demand(now_s)
            if demand.is_more_urgent_than(earlier, now_s - at_s):
                self._demanded = demand, now_s
                self._grant.revise(demand)

    async def _run_one_by_one(self, step: Step, error: Exception) -> StepOutcome:
        """Computes each chunk of a step that raised ``error`` alone, so that only the sequences that raise alone fail.

        Of a run of steps only the first is computed again, so that a sequence has all tokens before the one that it
        fails at. A chunk writes the same KV again, and its token depends on seed and index.
        """
        if len(step.chunks) == step.num_steps == 1:
            return StepOutcome({}, failed={step.chunks[0].job_id: _failed(error)})
        sampled: dict[int, tuple[SampledToken, ...]] = {}
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        failed: dict[int, Failed] = {}
        for chunk in step.chunks:
            try:
                outcome = await self._run(Step((chunk,)))
            except DeviceLost:
                raise
            except Exception as alone:  # the engine loop: this chunk is the cause
                failed[chunk.job_id] = _failed(alone)
            else:
                sampled.update(outcome.sampled)
                logprobs.update(outcome.prompt_logprobs)
                failed.update(outcome.failed)
        return StepOutcome(sampled, logprobs, failed=failed)

    def _deliver(self) -> None:
        for job_id, event in self._scheduler.drain_events():
            queue = self._queues.get(job_id)
            if queue is None:
                continue
            queue.put_nowait(event)
            if isinstance(event, JobDone | Finished | Failed):
                del self._queues[job_id]


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="engine")


def _failed(error: Exception) -> Failed:
    return Failed(f"{type(error).__name__}: {error}")
