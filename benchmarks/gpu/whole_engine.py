"""Decoding on a whole engine: scheduler, thread, events. Shows what the host adds to the runner's time of a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from muxmesh.clock import Clock
from muxmesh.engine.api import EngineJob, Event, Failed, FreeGrant
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.step import Runner, Step, StepOutcome
from muxmesh.engine.step_engine import StepEngine


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner that is loaded already, with runs of at most ``max_steps`` steps."""

    inner: Runner
    max_steps: int

    def unload(self, drop_weights: bool) -> None: ...

    def load(self) -> None: ...

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        return self.inner.run(step, may_continue)


@dataclass(frozen=True, slots=True)
class ServedRun:
    """A run of steps in which all sequences decoded. ``seconds``: from its plan to its outcome."""

    ended_at_s: float
    num_steps: int
    seconds: float


async def serve(
    runner: Runner, batch: int, vocab_size: int, jobs: Sequence[EngineJob], clock: Clock
) -> list[ServedRun]:
    """Computes the jobs on an engine of their own. Returns the runs of steps with a token of all ``batch`` of them."""
    runs: list[ServedRun] = []

    def observe(step: Step, outcome: StepOutcome, seconds: float) -> None:
        if step.num_tokens == len(step.chunks) == batch:
            runs.append(ServedRun(clock.monotonic_s(), outcome.num_steps, seconds))

    async def consume(events: AsyncIterator[Event]) -> None:
        async for event in events:
            assert not isinstance(event, Failed), event

    engine = StepEngine(Scheduler(batch, batch, vocab_size), runner, FreeGrant(), clock, observe)
    await engine.start()
    await asyncio.gather(*(consume(engine.submit(job)) for job in jobs))
    await engine.stop()
    return runs
