"""The loop over scheduler and runner, with runners that a test holds up or makes fail."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from muxmesh.clock import ManualClock, SystemClock
from muxmesh.config.model_config import SimProfile
from muxmesh.engine.api import (
    ComputeDemand,
    EngineJob,
    Event,
    Failed,
    Finished,
    FreeGrant,
    Grant,
    JobDone,
    Preempted,
    Tokens,
)
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.engine.step import Runner, Step, StepOutcome
from muxmesh.engine.step_engine import StepEngine
from muxmesh.engine.step_limit import StepLimit
from muxmesh.errors import DeviceLost, ModelUnsupported, SequenceFailed, WorkerLost
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping
from tests.support.engines import FailingRunner, GatedRunner, GatedSteps, running_engine, sim_runner


def job(job_id: int = 1, max_new_tokens: int = 5, limit: int | None = None, num_blocks: int = 8) -> EngineJob:
    prompt = tuple(range(40, 50))
    scheduling = SchedulingState(0, float(job_id))
    request = EngineRequest("r", "m", prompt, Sampling(seed=3), Stopping(max_new_tokens), scheduling)
    return EngineJob(job_id, SequenceRecord(request, 8, b"root", tuple(range(num_blocks))), limit)


async def rest(events: AsyncIterator[Event]) -> list[Event]:
    """The events until the last one."""
    async with asyncio.timeout(20):
        return [event async for event in events]


async def next_of(events: AsyncIterator[Event]) -> Event:
    async with asyncio.timeout(20):
        return await anext(events)


class CountingGrant:
    """A grant that a test gives and recalls, and that counts the calls."""

    def __init__(self) -> None:
        self.is_recalled = False
        self.step_limit: StepLimit | None = None
        self.given = asyncio.Event()
        self.calls: list[str] = []
        self.revised: list[ComputeDemand] = []
        self.num_released_steps: list[int] = []

    async def acquire(self, demand: ComputeDemand) -> None:
        self.calls.append("acquire")
        await self.given.wait()

    def revise(self, demand: ComputeDemand) -> None:
        self.revised.append(demand)

    def release(self, num_steps: int) -> None:
        self.calls.append("release")
        self.num_released_steps.append(num_steps)

    def drop(self) -> None:
        self.calls.append("drop")

    async def called(self, name: str) -> None:
        """Waits until the last call is this one."""
        async with asyncio.timeout(20):
            while self.calls[-1:] != [name]:
                await asyncio.sleep(0)


async def started(runner: Runner, grant: Grant | None = None, **options: Any) -> StepEngine:
    engine = StepEngine(Scheduler(8, 32, 1000), runner, grant or FreeGrant(), SystemClock(), **options)
    await engine.start()
    return engine


async def test_events_of_a_job_are_its_tokens_in_order_and_then_the_last_one() -> None:
    async with running_engine() as engine:
        *tokens, last = await rest(engine.submit(job()))
    assert [event.start_index for event in tokens if isinstance(event, Tokens)] == [0, 1, 2, 3, 4]
    assert isinstance(last, Finished)


async def test_a_job_with_a_limit_is_done_there_and_may_be_continued_under_its_id() -> None:
    async with running_engine() as engine:
        first = job(limit=2)
        assert isinstance((await rest(engine.submit(first)))[-1], JobDone)
        events = await rest(engine.submit(EngineJob(1, first.sequence)))
    assert [type(event) for event in events] == [Tokens, Tokens, Tokens, Finished]


async def test_a_job_that_has_not_ended_is_refused_a_second_time() -> None:
    runner = GatedRunner()
    async with running_engine(runner) as engine:
        engine.submit(job())
        with pytest.raises(ValueError, match="job 1 is known already"):
            engine.submit(job())


async def test_a_job_that_is_submitted_during_a_step_runs_in_the_next() -> None:
    runner = GatedRunner()
    async with running_engine(runner) as engine:
        first = engine.submit(job(1))
        await runner.begun(1)
        second = engine.submit(job(2))
        runner.let()
        await runner.begun(2)
        assert [[chunk.job_id for chunk in step.chunks] for step in runner.steps] == [[1], [1, 2]]
        runner.open()
        await asyncio.gather(rest(first), rest(second))


async def test_a_cancel_returns_when_the_step_in_flight_is_done() -> None:
    runner = GatedRunner()
    async with running_engine(runner) as engine:
        events = engine.submit(job())
        runner.let()
        assert isinstance(await next_of(events), Tokens)
        await runner.begun(2)
        cancels = [asyncio.create_task(engine.cancel(1)) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(cancel.done() for cancel in cancels)
        runner.let()
        async with asyncio.timeout(20):
            await asyncio.gather(*cancels)
        assert len(runner.steps) == 2
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(events)


async def test_a_job_that_is_in_no_step_is_cancelled_at_once() -> None:
    runner = GatedRunner()
    async with running_engine(runner) as engine:
        engine.submit(job(1))
        await runner.begun(1)
        engine.submit(job(2))
        await asyncio.wait_for(engine.cancel(2), 20)
        await asyncio.wait_for(engine.cancel(99), 20)
        runner.open()
        await engine.cancel(1)


async def test_a_job_is_pre_empted_at_the_end_of_its_step_and_does_not_run_until_it_is_resumed() -> None:
    runner = GatedRunner()
    async with running_engine(runner) as engine:
        events = engine.submit(job())
        await runner.begun(1)
        engine.preempt(1)
        engine.preempt(1)
        runner.let(10)
        assert isinstance(await next_of(events), Tokens)
        assert await next_of(events) == Preempted()
        other = await rest(engine.submit(job(2)))  # the loop goes on without the paused job
        assert isinstance(other[-1], Finished)
        assert [chunk.job_id for step in runner.steps for chunk in step.chunks] == [1, 2, 2, 2, 2, 2]
        engine.resume(1)
        assert [type(event) for event in await rest(events)] == [Tokens, Tokens, Tokens, Tokens, Finished]


async def test_a_job_that_waits_for_blocks_is_pre_empted_at_once() -> None:
    async with running_engine() as engine:
        events = engine.submit(job(max_new_tokens=30, num_blocks=2))
        for _ in range(2 * 8 + 1 - 10):
            assert isinstance(await next_of(events), Tokens)
        engine.preempt(1)
        assert await next_of(events) == Preempted()


async def test_an_idle_loop_runs_a_job_whose_blocks_are_extended() -> None:
    async with running_engine() as engine:
        waiting = job(max_new_tokens=30, num_blocks=2)
        events = engine.submit(waiting)
        for _ in range(2 * 8 + 1 - 10):
            await next_of(events)
        waiting.sequence.add_blocks((2, 3, 4))
        engine.sequence_changed(1)
        assert isinstance((await rest(events))[-1], Finished)


async def test_no_step_is_computed_without_the_grant_and_an_idle_engine_drops_it() -> None:
    runner, grant = GatedRunner(), CountingGrant()
    runner.open()
    engine = await started(runner, grant)
    events = engine.submit(job(max_new_tokens=2))
    await grant.called("acquire")
    for _ in range(10):
        await asyncio.sleep(0)
    assert runner.steps == []
    grant.given.set()
    await rest(events)
    await grant.called("drop")
    assert [call for call in grant.calls if call != "drop"] == ["acquire", "release"] * 2
    await engine.stop()


async def test_a_job_that_is_cancelled_while_the_engine_waits_for_the_grant_is_not_computed() -> None:
    runner, grant = GatedRunner(), CountingGrant()
    runner.open()
    engine = await started(runner, grant)
    engine.submit(job(1))
    await grant.called("acquire")
    await engine.cancel(1)
    grant.given.set()
    await grant.called("drop")
    assert isinstance((await rest(engine.submit(job(2))))[-1], Finished)
    assert {chunk.job_id for step in runner.steps for chunk in step.chunks} == {2}
    await engine.stop()


async def test_a_worker_that_waits_for_the_grant_says_when_something_more_urgent_has_come() -> None:
    runner, grant = GatedRunner(), CountingGrant()
    runner.open()
    engine = await started(runner, grant)
    engine.submit(job(5))
    await grant.called("acquire")
    engine.submit(job(7))
    assert grant.revised == [], "it is younger"
    urgent = job(3)
    urgent.sequence.work.state = SchedulingState(-1, 3.0)
    engine.submit(urgent)
    assert grant.revised == [ComputeDemand(-1, 3.0)]
    engine.resume(5)
    assert len(grant.revised) == 1
    for job_id in (3, 5, 7):
        await engine.cancel(job_id)
    engine.sequence_changed(5)
    assert len(grant.revised) == 1, "nothing is left to compute"
    await engine.stop()


async def test_each_step_is_observed_with_its_duration() -> None:
    clock = ManualClock()

    class SlowRunner:
        max_steps = 1

        def unload(self, drop_weights: bool) -> None: ...

        def load(self) -> None: ...

        def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
            clock.advance(0.25)
            return sim_runner().run(step)

    observed: list[tuple[int, float]] = []
    engine = StepEngine(
        Scheduler(8, 32, 1000), SlowRunner(), FreeGrant(), clock,
        lambda step, outcome, seconds: observed.append((step.num_tokens, seconds)),
    )  # fmt: skip
    await engine.start()
    await rest(engine.submit(job(max_new_tokens=3)))
    await engine.stop()
    assert observed == [(10, 0.25), (1, 0.25), (1, 0.25)]


async def test_a_failed_step_fails_its_jobs_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with running_engine(FailingRunner({1})) as engine:
        assert await rest(engine.submit(job(1))) == [Failed("ArithmeticError: nan in layer 3")]
        assert isinstance((await rest(engine.submit(job(2))))[-1], Finished)
        assert isinstance((await rest(engine.submit(job(3))))[-1], Finished)
    assert "a step with 1 jobs failed" in caplog.text and "nan in layer 3" in caplog.text


async def test_of_a_step_that_fails_only_the_sequences_fail_that_fail_alone(caplog: pytest.LogCaptureFixture) -> None:
    runner = GatedRunner(FailingRunner({2, 4}))
    async with running_engine(runner) as engine:
        events = [engine.submit(job(job_id)) for job_id in range(1, 6)]
        runner.open()
        found = await asyncio.gather(*map(rest, events))
    async with running_engine() as engine:
        alone = [await rest(engine.submit(job(job_id))) for job_id in (1, 3, 5)]
    assert [found[0], found[2], found[4]] == alone, "every token once, as without the others"
    assert found[1] == found[3] == [Failed("ArithmeticError: nan in layer 3")]
    assert [len(step.chunks) for step in runner.steps[:6]] == [5, 1, 1, 1, 1, 1]


async def test_a_sequence_that_its_runner_cannot_compute_fails_and_no_step_is_repeated() -> None:
    class Runner(FailingRunner):
        num_steps = 0

        def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
            self.num_steps += 1
            outcome, failed = sim_runner().run(step), Failed("logits are not finite", SequenceFailed)
            return StepOutcome(
                {job_id: token for job_id, token in outcome.sampled.items() if job_id != 2},
                failed={chunk.job_id: failed for chunk in step.chunks if chunk.job_id == 2},
            )

    runner = Runner()
    async with running_engine(runner) as engine:
        first, second = await asyncio.gather(*(rest(engine.submit(job(job_id))) for job_id in (1, 2)))
    assert second == [Failed("logits are not finite", SequenceFailed)]
    assert isinstance(first[-1], Finished) and runner.num_steps == 5


async def test_a_cancel_during_a_step_that_fails_returns(caplog: pytest.LogCaptureFixture) -> None:
    runner = GatedRunner(FailingRunner())
    async with running_engine(runner) as engine:
        engine.submit(job())
        await runner.begun(1)
        cancel = asyncio.create_task(engine.cancel(1))
        await asyncio.sleep(0)
        runner.let()
        await asyncio.wait_for(cancel, 20)


async def test_an_engine_whose_loop_fails_is_dead_and_all_its_jobs_fail(caplog: pytest.LogCaptureFixture) -> None:
    def observe(step: Step, outcome: StepOutcome, seconds: float) -> None:
        raise KeyError("a bug")

    grant = CountingGrant()
    grant.given.set()
    engine = await started(sim_runner(), grant, observe=observe)
    dead = asyncio.create_task(engine.wait_dead())
    events = [engine.submit(job(job_id)) for job_id in (1, 2)]
    for found in await asyncio.gather(*map(rest, events)):
        assert found[-1] == Failed("the engine is dead: 'a bug'")
    assert await asyncio.wait_for(dead, 20) == await engine.wait_dead() == "KeyError: 'a bug'"
    assert grant.calls[-1] == "drop", "another worker may compute"
    await asyncio.wait_for(engine.cancel(1), 20)
    await engine.stop()
    assert "the engine loop failed" in caplog.text


async def test_an_engine_that_is_stopped_under_the_grant_returns_it_after_its_step() -> None:
    grant, runner = CountingGrant(), GatedRunner(sim_runner())
    grant.given.set()
    engine = await started(runner, grant)
    engine.submit(job())
    await runner.begun(1)
    assert grant.calls[-1] == "acquire"
    runner.let()
    await engine.stop()
    assert grant.calls[-1] == "drop", "the process may take a while to exit"


async def test_an_engine_whose_device_is_lost_is_dead_and_its_jobs_continue_in_another_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = DeviceLost("a step of 2 tokens: CUDA error: an illegal memory access was encountered")
    runner = GatedRunner(FailingRunner({2}, error=lost))
    async with running_engine(runner) as engine:
        events = [engine.submit(job(job_id)) for job_id in (1, 2)]
        runner.open()
        found = await asyncio.gather(*map(rest, events))
        assert [events[-1] for events in found] == [Failed(f"the engine is dead: {lost}", WorkerLost)] * 2
        assert await asyncio.wait_for(engine.wait_dead(), 20) == f"DeviceLost: {lost}"
    assert len(runner.steps) == 1, "no step is repeated on a device that is lost"


async def test_a_device_that_is_lost_while_the_sequences_of_a_step_are_computed_alone_ends_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = GatedRunner(FailingRunner({2}, FailingRunner({1}, error=DeviceLost("CUDA error: unspecified"))))
    async with running_engine(runner) as engine:
        events = [engine.submit(job(job_id)) for job_id in (1, 2, 3)]
        runner.open()
        found = await asyncio.gather(*map(rest, events))
        failed = Failed("the engine is dead: CUDA error: unspecified", WorkerLost)
        assert [events[-1] for events in found] == [failed] * 3
    assert len(runner.steps) == 2


async def test_an_engine_that_dies_wakes_its_waiters_and_a_cancelled_one_does_no_harm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def observe(step: Step, outcome: StepOutcome, seconds: float) -> None:
        raise KeyError("a bug")

    runner = GatedRunner()
    engine = await started(runner, observe=observe)
    waiters = [asyncio.create_task(engine.wait_dead()) for _ in range(2)]
    engine.submit(job())
    await runner.begun(1)
    cancel = asyncio.create_task(engine.cancel(1))
    await asyncio.sleep(0)
    waiters[0].cancel()
    runner.open()
    assert await asyncio.wait_for(waiters[1], 20) == "KeyError: 'a bug'"
    await asyncio.wait_for(cancel, 20)
    await engine.stop()


async def test_stopping_waits_for_the_step_in_flight_and_fails_every_job() -> None:
    runner = GatedRunner()
    engine = await started(runner)
    events = [engine.submit(job(job_id)) for job_id in (1, 2)]
    await runner.begun(1)
    asyncio.get_running_loop().call_soon(runner.open)  # after the loop of the engine is cancelled
    await engine.stop()
    assert [await rest(one) for one in events] == [[Failed("the engine was stopped", WorkerLost)]] * 2
    assert len(runner.steps) == 1


async def test_an_engine_that_was_never_started_can_be_stopped() -> None:
    engine = StepEngine(Scheduler(8, 32, 1000), sim_runner(), FreeGrant(), SystemClock())
    events = engine.submit(job())
    await engine.stop()
    assert await rest(events) == [Failed("the engine was stopped", WorkerLost)]


async def test_a_model_that_cannot_be_loaded_fails_the_start() -> None:
    class BadRunner(FailingRunner):
        def unload(self, drop_weights: bool) -> None: ...

        def load(self) -> None:
            raise ModelUnsupported("no such architecture")

    engine = StepEngine(Scheduler(8, 32, 1000), BadRunner(), FreeGrant(), SystemClock())
    with pytest.raises(ModelUnsupported, match="no such architecture"):
        await engine.start()
    await engine.stop()


async def test_the_runner_is_loaded_and_run_in_one_thread_of_the_engine() -> None:
    threads: set[str] = set()

    class NamingRunner(FailingRunner):
        def unload(self, drop_weights: bool) -> None: ...

        def load(self) -> None:
            threads.add(threading.current_thread().name)

        def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
            threads.add(threading.current_thread().name)
            return sim_runner().run(step)

    async with running_engine(NamingRunner()) as engine:
        await rest(engine.submit(job()))
    assert threads == {"engine_0"}


@dataclass
class InRuns:
    """An engine that computes runs of up to 8 steps, each of which waits for the test, with its grant and its clock."""

    engine: StepEngine
    runner: GatedRunner
    steps: GatedSteps
    grant: CountingGrant
    clock: ManualClock


@pytest.fixture
async def in_runs() -> AsyncIterator[InRuns]:
    steps, grant, clock = GatedSteps(), CountingGrant(), ManualClock()
    runner = GatedRunner(SimRunner(SimProfile(base_s=1.0), range(35, 93), 0, steps, max_steps=8))
    runner.open()
    grant.given.set()
    engine = StepEngine(Scheduler(8, 32, 1000), runner, grant, clock)
    await engine.start()
    try:
        yield InRuns(engine, runner, steps, grant, clock)
    finally:
        steps.open()
        await engine.stop()


async def test_the_tokens_of_a_run_of_steps_are_one_event_and_the_grant_counts_each_step(in_runs: InRuns) -> None:
    in_runs.steps.open()
    events = await rest(in_runs.engine.submit(job(max_new_tokens=12)))
    assert [len(event.token_ids) for event in events if isinstance(event, Tokens)] == [1, 8, 3]
    assert isinstance(events[-1], Finished)
    assert in_runs.grant.num_released_steps == [1, 8, 3]


Change = Callable[[InRuns], object]
CHANGES: dict[str, Change] = {
    "another worker waits": lambda it: setattr(it.grant, "is_recalled", True),
    "a job is added": lambda it: it.engine.submit(job(2)),
    "a job is pre-empted": lambda it: it.engine.preempt(1),
    "a job is resumed": lambda it: it.engine.resume(1),
    "it takes long": lambda it: it.clock.advance(0.02),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_a_run_ends_with_its_present_step_when(change: Change, in_runs: InRuns) -> None:
    in_runs.engine.submit(job(max_new_tokens=30))
    in_runs.steps.let(3)
    await in_runs.steps.begun(4)  # the prompt, and the third step of the first run
    change(in_runs)
    in_runs.steps.let()
    async with asyncio.timeout(20):
        while len(in_runs.grant.num_released_steps) < 2:
            await asyncio.sleep(0)
    assert in_runs.grant.num_released_steps == [1, 3]


async def test_a_run_goes_on_while_its_own_sequences_get_blocks(in_runs: InRuns) -> None:
    growing = job(max_new_tokens=9)
    in_runs.engine.submit(growing)
    in_runs.steps.let(3)
    await in_runs.steps.begun(4)
    growing.sequence.add_blocks((9,))
    in_runs.engine.sequence_changed(1)
    in_runs.steps.open()
    await in_runs.grant.called("drop")
    assert in_runs.grant.num_released_steps == [1, 8]


async def test_a_job_that_waited_for_blocks_joins_at_the_next_step(in_runs: InRuns) -> None:
    waiting = job(1, max_new_tokens=30, num_blocks=2)
    in_runs.steps.let(7)
    in_runs.engine.submit(waiting)
    await in_runs.steps.begun(7)
    await in_runs.grant.called("drop")  # the last slot of its blocks is used
    in_runs.engine.submit(job(2, max_new_tokens=30))
    in_runs.steps.let(2)
    await in_runs.steps.begun(10)
    waiting.sequence.add_blocks((9, 10))
    in_runs.engine.sequence_changed(1)
    in_runs.steps.open()
    await in_runs.steps.begun(11)
    assert [len(step.chunks) for step in in_runs.runner.steps[:5]] == [1, 1, 1, 1, 2]
    assert in_runs.grant.num_released_steps[:4] == [1, 6, 1, 2]


async def test_a_cancel_waits_for_one_step_of_a_run_only(in_runs: InRuns) -> None:
    in_runs.engine.submit(job(max_new_tokens=30))
    in_runs.steps.let(3)
    await in_runs.steps.begun(4)
    cancel = asyncio.create_task(in_runs.engine.cancel(1))
    await asyncio.sleep(0)
    in_runs.steps.let()
    await asyncio.wait_for(cancel, 20)
    assert in_runs.steps.num_begun == 4


async def test_stopping_waits_for_one_step_of_a_run_only(in_runs: InRuns) -> None:
    events = in_runs.engine.submit(job(max_new_tokens=30))
    in_runs.steps.let(3)
    await in_runs.steps.begun(4)
    asyncio.get_running_loop().call_soon(in_runs.steps.open)
    await in_runs.engine.stop()
    assert isinstance((await rest(events))[-1], Failed)
    assert in_runs.steps.num_begun == 4


async def test_a_change_before_a_run_does_not_end_it(in_runs: InRuns) -> None:
    in_runs.engine.submit(job(1, max_new_tokens=30))
    in_runs.engine.submit(job(2, max_new_tokens=30))
    in_runs.steps.let(3)
    await in_runs.steps.begun(4)
    assert [step.num_steps for step in in_runs.runner.steps] == [1, 8]


async def test_while_another_worker_waits_every_run_is_a_single_step(in_runs: InRuns) -> None:
    in_runs.grant.is_recalled = True
    in_runs.steps.open()
    await rest(in_runs.engine.submit(job(max_new_tokens=6)))
    assert in_runs.grant.num_released_steps == [1] * 6


async def test_a_run_that_raises_is_computed_again_one_step_of_one_sequence_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Runner(FailingRunner):
        def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
            if step.num_steps > 1 and len(step.chunks) > 1:
                raise ArithmeticError("in the middle of a run")
            return super().run(step, may_continue)

    runner = GatedRunner(Runner({}, sim_runner(max_steps=8)))
    async with running_engine(runner) as engine:
        events = [engine.submit(job(job_id)) for job_id in (1, 2)]
        runner.open()
        found = await asyncio.gather(*map(rest, events))
    async with running_engine() as engine:
        alone = [await rest(engine.submit(job(job_id))) for job_id in (1, 2)]
    assert found == alone, "every token once"
    assert [(len(step.chunks), step.num_steps) for step in runner.steps[:5]] == [(2, 1), (2, 4), (1, 1), (1, 1), (2, 3)]


@pytest.mark.parametrize("max_steps", [1, 8])
async def test_a_sequence_whose_step_raises_in_the_middle_of_a_run_has_the_tokens_before(
    max_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Runner(FailingRunner):
        def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
            (chunk,) = step.chunks
            if chunk.sample and chunk.sample.output_index + step.num_steps > 3:
                raise ArithmeticError("at the fourth token")
            return super().run(step, may_continue)

    async with running_engine() as engine:
        expected = await rest(engine.submit(job(max_new_tokens=9)))
    async with running_engine(Runner({}, sim_runner(max_steps)), clock=ManualClock()) as engine:
        events = await rest(engine.submit(job(max_new_tokens=9)))
    assert events == [*expected[:3], Failed("ArithmeticError: at the fourth token")]


async def test_a_run_is_observed_with_the_steps_that_were_computed() -> None:
    observed: list[tuple[int, int]] = []
    engine = StepEngine(
        Scheduler(8, 32, 1000), sim_runner(max_steps=8), FreeGrant(), ManualClock(),
        lambda step, outcome, seconds: observed.append((step.num_tokens, outcome.num_steps)),
    )  # fmt: skip
    await engine.start()
    await rest(engine.submit(job(max_new_tokens=6)))
    await engine.stop()
    assert observed == [(10, 1), (1, 5)]
