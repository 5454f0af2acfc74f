"""Engines for tests, and runners that a test holds up or makes fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from muxmesh.clock import Clock, SystemClock
from muxmesh.config.model_config import SimProfile
from muxmesh.engine.api import Failed, FreeGrant, Grant
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.engine.step import Runner, Step, StepOutcome
from muxmesh.engine.step_engine import StepEngine
from muxmesh.errors import SequenceFailed


def sim_runner(max_steps: int = 1) -> SimRunner:
    """Takes no time; its outputs never end by themselves."""
    return SimRunner(SimProfile(), range(35, 93), 0, max_steps=max_steps)


class StepGate:
    """Steps that wait in their thread until the test lets them run."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False
        self.num_begun = 0

    def _begin(self) -> None:
        self.num_begun += 1
        if not self._open:
            self._permits.acquire()

    def let(self, num_steps: int = 1) -> None:
        """Lets this many steps run."""
        self._permits.release(num_steps)

    async def begun(self, num_steps: int) -> None:
        """Waits until this many steps have begun."""
        async with asyncio.timeout(20):
            while self.num_begun < num_steps:
                await asyncio.sleep(0)

    def open(self) -> None:
        """Lets every step run from now on."""
        self._open = True
        self._permits.release()


class GatedSteps(StepGate):
    """The ``sleep`` of a `SimRunner`: every step waits, also in the middle of a run."""

    def __call__(self, seconds: float) -> None:
        self._begin()


class GatedRunner(StepGate):
    """A `Runner` whose runs of steps wait before they begin. Keeps the first step of each."""

    def __init__(self, inner: Runner | None = None) -> None:
        super().__init__()
        self._inner = inner or sim_runner()
        self.steps: list[Step] = []

    @property
    def max_steps(self) -> int:
        return self._inner.max_steps

    def unload(self, drop_weights: bool) -> None: ...

    def load(self) -> None:
        self._inner.load()

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        self.steps.append(step)
        self._begin()
        return self._inner.run(step, may_continue)


class FailingRunner:
    """A `Runner` that raises ``error`` in each step with a job of ``failing``; None: in every step."""

    def __init__(
        self, failing: Iterable[int] | None = None, inner: Runner | None = None, error: Exception | None = None
    ) -> None:
        self._error = error or ArithmeticError("nan in layer 3")
        self._failing = None if failing is None else set(failing)
        self._inner = inner or sim_runner()

    @property
    def max_steps(self) -> int:
        return self._inner.max_steps

    def unload(self, drop_weights: bool) -> None: ...

    def load(self) -> None:
        self._inner.load()

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        if self._failing is None or any(chunk.job_id in self._failing for chunk in step.chunks):
            raise self._error
        return self._inner.run(step, may_continue)


class UncomputableRunner:
    """A `Runner` in which every sequence fails after ``after`` steps, as one whose logits are not finite."""

    max_steps = 1

    def __init__(self, after: int) -> None:
        self._num_left = after

    def unload(self, drop_weights: bool) -> None: ...

    def load(self) -> None: ...

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        self._num_left -= 1
        if self._num_left >= 0:
            return sim_runner().run(step)
        failed = Failed("logits that are not finite", SequenceFailed)
        return StepOutcome({}, failed={chunk.job_id: failed for chunk in step.chunks})


@asynccontextmanager
async def running_engine(
    runner: Runner | None = None,
    max_num_seqs: int = 8,
    token_budget: int = 64,
    vocab_size: int = 1000,
    clock: Clock | None = None,
    grant: Grant | None = None,
) -> AsyncIterator[StepEngine]:
    """A started engine, on a device of its own unless ``grant`` is another's; a gated runner is opened at the end."""
    scheduler = Scheduler(max_num_seqs, token_budget, vocab_size)
    engine = StepEngine(scheduler, runner or sim_runner(), grant or FreeGrant(), clock or SystemClock())
    await engine.start()
    try:
        yield engine
    finally:
        if isinstance(runner, GatedRunner):
            runner.open()
        await engine.stop()
