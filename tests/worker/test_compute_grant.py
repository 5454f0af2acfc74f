"""The worker's side of the compute grant, against kvstore's grant table on the same event loop."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from kvstore.grant_page import GrantPage, Word
from kvstore.grant_table import GrantTable
from muxmesh.clock import ManualClock
from muxmesh.config.model_config import SimProfile
from muxmesh.engine.api import ComputeDemand, EngineJob
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.engine.step import Chunk, Step, StepOutcome
from muxmesh.engine.step_engine import StepEngine
from muxmesh.step_cost import StepCost
from muxmesh.types import EngineRequest, Role, Sampling, SchedulingState, Stopping
from worker.compute_grant import ComputeGrant
from worker.share_pacer import SharePacer


class SharedWords:
    """The part of an attachment that ComputeGrant uses, over the same memory."""

    def __init__(self, table: GrantTable) -> None:
        self.slot, self.bell_fd = table.allocate_slot(Role.DECODE, "m")
        self.page = GrantPage(table.page_fd)
        self.doorbell_fd = table.doorbell_fd


@pytest.fixture
async def table() -> AsyncIterator[GrantTable]:
    grants = GrantTable()
    loop = asyncio.get_running_loop()
    loop.add_reader(grants.doorbell_fd, grants.on_doorbell)
    try:
        yield grants
    finally:
        loop.remove_reader(grants.doorbell_fd)
        grants.close()


def grant_for(table: GrantTable, clock: ManualClock | None = None) -> tuple[ComputeGrant, SharedWords]:
    attachment = SharedWords(table)
    return ComputeGrant(attachment, clock or ManualClock()), attachment  # type: ignore[arg-type]


async def test_a_worker_that_computes_alone_keeps_the_grant_and_rings_no_bell(table: GrantTable) -> None:
    grant, _ = grant_for(table)
    await grant.acquire(ComputeDemand())
    asyncio.get_running_loop().remove_reader(table.doorbell_fd)
    for _ in range(5):
        grant.release(1)
        await grant.acquire(ComputeDemand())
    with pytest.raises(BlockingIOError):
        os.eventfd_read(table.doorbell_fd)


async def test_workers_take_turns_and_never_have_the_grant_together(table: GrantTable) -> None:
    order: list[str] = []
    holding: set[str] = set()

    async def work(name: str, grant: ComputeGrant) -> None:
        for _ in range(20):
            await grant.acquire(ComputeDemand())
            holding.add(name)
            assert holding == {name}
            order.append(name)
            await asyncio.sleep(0)
            holding.discard(name)
            grant.release(1)
        grant.drop()

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for name in ("prefill", "decode", "other"):
            tasks.create_task(work(name, grant_for(table)[0]))
    assert order.count("prefill") == order.count("decode") == 20
    longest_run = max(len(run) for run in _runs(order[10:40]))
    assert longest_run <= 2


async def test_a_recalled_grant_is_returned_with_the_next_demand_after_the_steps_that_it_covers(
    table: GrantTable,
) -> None:
    grant, attachment = grant_for(table)
    await grant.acquire(ComputeDemand())
    for num_steps in (1, 1, 1):
        table.page.write(attachment.slot, Word.GRANTED_STEPS, 3)
        table.page.write(attachment.slot, Word.RECALLED, 1)
        grant.release(num_steps)
    asyncio.get_running_loop().remove_reader(table.doorbell_fd)
    waiting = asyncio.create_task(grant.acquire(ComputeDemand()))
    await asyncio.sleep(0)
    words = [table.page.read(attachment.slot, word) for word in (Word.DEMAND, Word.GRANTED_STEPS)]
    assert words == [1, 0], "the arbiter sees the return and the demand together"
    table.on_doorbell()
    await waiting


async def test_a_recalled_grant_is_returned_once_by_a_worker_that_has_nothing_more_to_compute(
    table: GrantTable,
) -> None:
    grant, attachment = grant_for(table)
    await grant.acquire(ComputeDemand())
    table.page.write(attachment.slot, Word.RECALLED, 1)
    grant.release(1)
    grant.drop()
    words = [table.page.read(attachment.slot, word) for word in (Word.DEMAND, Word.GRANTED_STEPS)]
    assert words == [0, 0]


async def test_the_arbiter_sees_what_the_sequences_need(table: GrantTable) -> None:
    clock = ManualClock(50.0)
    grant, attachment = grant_for(table, clock)
    await grant.acquire(ComputeDemand(-3, 1234.5, 0.25, 2.0))
    words = (Word.PRIORITY, Word.ARRIVED_US, Word.DUE_US)
    assert [table.page.read(attachment.slot, word) for word in words] == [-3, 1_234_500_000, 50_250_000]
    grant.release(1)
    await grant.acquire(ComputeDemand())
    assert [table.page.read(attachment.slot, word) for word in words] == [0, 0, 0], "also for a grant that it keeps"


async def test_a_worker_waits_for_its_share_without_the_grant(table: GrantTable) -> None:
    clock, used_s, slept_s, attachment = ManualClock(), 0.0, list[float](), SharedWords(table)

    async def sleep(seconds: float) -> None:
        assert not table.page.read(attachment.slot, Word.GRANTED_STEPS)
        slept_s.append(seconds)
        clock.advance(seconds)

    grant = ComputeGrant(attachment, clock, SharePacer(0.5), lambda: used_s, sleep)  # type: ignore[arg-type]
    for _ in range(10):
        await grant.acquire(ComputeDemand())
        clock.advance(0.1)
        used_s += 0.1
        grant.release(1)
    assert len(slept_s) == 8 and clock.monotonic_s() == pytest.approx(2 * used_s, abs=0.3)


async def test_while_a_worker_waits_for_its_share_its_time_runs_and_a_more_urgent_demand_replaces_the_first(
    table: GrantTable,
) -> None:
    clock, used_s, attachment = ManualClock(50.0), 0.0, SharedWords(table)

    async def sleep(seconds: float) -> None:
        assert table.page.read(attachment.slot, Word.DUE_US) == 51_500_000, "half a second from the demand on"
        clock.advance(seconds)
        grant.revise(ComputeDemand(priority=-1, slack_s=0.25, lost_s=0.5))

    grant = ComputeGrant(attachment, clock, SharePacer(0.5), lambda: used_s, sleep)  # type: ignore[arg-type]
    await grant.acquire(ComputeDemand())
    clock.advance(1.0)
    used_s += 0.75
    grant.release(1)
    await grant.acquire(ComputeDemand(slack_s=0.5, lost_s=0.5))
    due_us, lost_us = (int((clock.monotonic_s() + in_s) * 1e6) for in_s in (0.25, 0.5))
    assert clock.monotonic_s() > 51.0, "it had to wait"
    written = [table.page.read(attachment.slot, word) for word in (Word.PRIORITY, Word.DUE_US, Word.LOST_US)]
    assert written == [-1, due_us, lost_us]


async def test_a_worker_that_is_stopped_while_it_waits_demands_nothing_any_more(table: GrantTable) -> None:
    (holder, _), (stopped, attachment) = grant_for(table), grant_for(table)
    await holder.acquire(ComputeDemand())
    waiting = asyncio.create_task(stopped.acquire(ComputeDemand()))
    while not table.page.read(attachment.slot, Word.DEMAND):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    holder.drop()
    table.on_doorbell()
    assert not table.page.read(attachment.slot, Word.GRANTED_STEPS)


async def test_an_idle_worker_returns_the_grant(table: GrantTable) -> None:
    first, _ = grant_for(table)
    second, _ = grant_for(table)
    await first.acquire(ComputeDemand())
    waiting = asyncio.create_task(second.acquire(ComputeDemand()))
    await asyncio.sleep(0)
    first.release(1)
    first.drop()
    async with asyncio.timeout(30):
        await waiting


async def test_the_grant_of_a_dead_worker_passes_to_another(table: GrantTable) -> None:
    first, attachment = grant_for(table)
    second, _ = grant_for(table)
    await first.acquire(ComputeDemand())
    waiting = asyncio.create_task(second.acquire(ComputeDemand()))
    await asyncio.sleep(0)
    table.free_slot(attachment.slot)
    async with asyncio.timeout(30):
        await waiting


async def test_dropping_a_grant_that_a_worker_does_not_have_rings_no_bell(table: GrantTable) -> None:
    grant, _ = grant_for(table)
    asyncio.get_running_loop().remove_reader(table.doorbell_fd)
    grant.drop()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(table.doorbell_fd)


async def test_busy_time_is_the_time_between_acquire_and_release(table: GrantTable) -> None:
    clock = ManualClock()
    grant, attachment = grant_for(table, clock)
    for seconds in (0.25, 0.5):
        await grant.acquire(ComputeDemand())
        clock.advance(seconds)
        grant.release(1)
        clock.advance(100)
    assert table.page.read(attachment.slot, Word.BUSY_NS) == 750_000_000


async def test_steps_are_counted_and_their_cost_is_written_to_the_page(table: GrantTable) -> None:
    grant, attachment = grant_for(table)
    for num_tokens in (1, 2, 4, 8):
        step = Step((Chunk(1, 0, tuple(range(num_tokens)), (0,)),))
        grant.count_step(step, StepOutcome({}, kv_bytes_written=10 * num_tokens), 0.01 + 0.002 * num_tokens)
    read = [table.page.read(attachment.slot, word) for word in (
        Word.NUM_STEPS, Word.NUM_COMPUTED_TOKENS, Word.KV_BYTES_WRITTEN)]  # fmt: skip
    assert read == [4, 15, 150]
    cost = table.page.read_cost(attachment.slot)
    assert cost is not None and cost.step_s(4, 6) == pytest.approx(0.018, rel=0.05)


async def test_a_run_of_steps_counts_each_step_and_its_mean_step_is_what_the_cost_is_fitted_to(
    table: GrantTable,
) -> None:
    (single, attachment), (in_runs, of_runs) = grant_for(table), grant_for(table)
    true = StepCost(0.01, 0.002, 0.0001)
    for num_seqs, start, num_steps in ((1, 100, 4), (3, 50, 5), (8, 900, 2), (5, 7, 3), (2, 400, 7)):
        steps = [Step(_decoding(num_seqs, start + index)) for index in range(num_steps)]
        seconds = [true.step_s(step.shape.num_tokens, step.shape.num_context) for step in steps]
        for step, step_s in zip(steps, seconds, strict=True):
            single.count_step(step, StepOutcome({}), step_s)
        run = Step(_decoding(num_seqs, start), num_steps=8)
        in_runs.count_step(
            run, StepOutcome({}, num_steps=num_steps, kv_bytes_written=num_seqs * num_steps), sum(seconds)
        )
    words = (Word.NUM_STEPS, Word.NUM_COMPUTED_TOKENS, Word.KV_BYTES_WRITTEN)
    assert [table.page.read(of_runs.slot, word) for word in words] == [21, 64, 64]
    assert [table.page.read(attachment.slot, word) for word in words[:2]] == [21, 64]
    for slot in (attachment.slot, of_runs.slot):
        cost = table.page.read_cost(slot)
        assert cost is not None
        assert (cost.base_s, cost.per_token_s, cost.per_context_s) == pytest.approx((0.01, 0.002, 0.0001), rel=0.02)


async def test_a_run_of_steps_counts_towards_the_steps_of_the_grant(table: GrantTable) -> None:
    grant, attachment = grant_for(table)
    await grant.acquire(ComputeDemand())
    table.page.write(attachment.slot, Word.GRANTED_STEPS, 5)
    assert not grant.is_recalled
    table.page.write(attachment.slot, Word.RECALLED, 1)
    assert grant.is_recalled
    for num_steps in (4, 0):
        grant.release(num_steps)
        await grant.acquire(ComputeDemand())
        assert table.page.read(attachment.slot, Word.NUM_GRANTS) == 1
    grant.release(1)
    await grant.acquire(ComputeDemand())
    assert table.page.read(attachment.slot, Word.NUM_GRANTS) == 2


async def test_a_worker_that_waits_waits_for_one_step_however_long_the_runs_of_the_other_are(table: GrantTable) -> None:
    waiting, demanding = grant_for(table)
    grant, attachment = grant_for(table)
    turn, recalled_steps = 0, Counter[int]()

    def on_step(seconds: float) -> None:  # in the thread of the engine
        recalled_steps[turn] += table.page.read(attachment.slot, Word.RECALLED)
        while table.page.read(demanding.slot, Word.DEMAND) and not table.page.read(attachment.slot, Word.RECALLED):
            time.sleep(0)  # the step goes on when kvstore has recalled the grant

    outcomes: list[int] = []
    runner = SimRunner(SimProfile(base_s=1.0), range(35, 93), 0, on_step, max_steps=64)
    engine = StepEngine(
        Scheduler(8, 64, 1000),
        runner,
        grant,
        ManualClock(),
        lambda step, outcome, _: outcomes.append(outcome.num_steps),
    )
    await engine.start()
    request = EngineRequest("r", "m", (1, 2), Sampling(), Stopping(1_000_000), SchedulingState(0, 0.0))
    events = engine.submit(EngineJob(1, SequenceRecord(request, 16, b"", tuple(range(62_501)))))
    async with asyncio.timeout(60):
        while max(outcomes, default=0) < 64:
            await anext(events)
        while turn < 30:
            await waiting.acquire(ComputeDemand())
            turn += 1
            assert not table.page.read(attachment.slot, Word.GRANTED_STEPS)
            waiting.release(1)
            waiting.drop()
            await anext(events)
        await engine.cancel(1)
    await engine.stop()
    assert max(recalled_steps.values()) <= 1


def _decoding(num_seqs: int, start: int) -> tuple[Chunk, ...]:
    return tuple(Chunk(job_id, start, (5,), (0,)) for job_id in range(num_seqs))


async def test_a_waiting_worker_shows_its_demand_until_it_is_granted(table: GrantTable) -> None:
    first, _ = grant_for(table)
    second, attachment = grant_for(table)
    await first.acquire(ComputeDemand())
    waiting = asyncio.create_task(second.acquire(ComputeDemand()))
    await asyncio.sleep(0)
    assert table.page.read(attachment.slot, Word.DEMAND) == 1
    first.drop()
    async with asyncio.timeout(30):
        await waiting
    assert table.page.read(attachment.slot, Word.DEMAND) == 0


async def test_a_bell_without_a_grant_leaves_the_worker_waiting(table: GrantTable) -> None:
    first, _ = grant_for(table)
    second, attachment = grant_for(table)
    await first.acquire(ComputeDemand())
    waiting = asyncio.create_task(second.acquire(ComputeDemand()))
    await asyncio.sleep(0)
    os.eventfd_write(attachment.bell_fd, 1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    first.drop()
    async with asyncio.timeout(30):
        await waiting


async def test_a_step_that_took_no_time_leaves_the_cost_unmeasured(table: GrantTable) -> None:
    grant, attachment = grant_for(table)
    grant.count_step(Step((Chunk(1, 0, (5,), (0,)),)), StepOutcome({}), 0.0)
    assert table.page.read_cost(attachment.slot) is None
    assert table.page.read(attachment.slot, Word.NUM_STEPS) == 1


def _runs(names: list[str]) -> Iterator[list[str]]:
    run: list[str] = []
    for name in names:
        if run and run[-1] != name:
            yield run
            run = []
        run.append(name)
    yield run


async def test_a_worker_that_waits_is_decided_upon_again_when_its_demand_is_more_urgent(table: GrantTable) -> None:
    (holder, _), (other, _), (revised, attachment) = grant_for(table), grant_for(table), grant_for(table)
    await holder.acquire(ComputeDemand())
    waiting = [asyncio.create_task(one.acquire(ComputeDemand(priority=5))) for one in (other, revised)]
    while not table.page.read(attachment.slot, Word.DEMAND):
        await asyncio.sleep(0)
    revised.revise(ComputeDemand(priority=-1))
    assert table.page.read(attachment.slot, Word.PRIORITY) == -1
    while not holder.is_recalled:
        await asyncio.sleep(0)
    holder.release(1)
    holder.drop()
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert done == {waiting[1]}, "it has the better class"
    waiting[0].cancel()


async def test_the_demand_of_a_worker_that_computes_rings_no_bell(table: GrantTable) -> None:
    grant, attachment = grant_for(table)
    await grant.acquire(ComputeDemand())
    asyncio.get_running_loop().remove_reader(table.doorbell_fd)
    grant.revise(ComputeDemand(priority=-1))
    assert table.page.read(attachment.slot, Word.PRIORITY) == -1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(table.doorbell_fd)


async def test_a_step_may_take_until_those_that_wait_need_the_device(table: GrantTable) -> None:
    clock = ManualClock(100.0)
    grant, attachment = grant_for(table, clock)
    page, slot = attachment.page, attachment.slot
    page.write(slot, Word.LONGEST_STEP_US, 500_000)
    assert grant.step_limit is None, "its steps have no cost yet"
    step = Step((Chunk(1, 0, (5,) * 100, ()),))
    grant.count_step(step, StepOutcome({}), 0.2)
    assert grant.step_limit is not None and grant.step_limit.longest_s == 0.5
    page.write(slot, Word.STEP_END_US, 100_250_000)
    clock.advance(0.125)
    assert grant.step_limit is not None and grant.step_limit.longest_s == pytest.approx(0.125)
    page.write(slot, Word.STEP_END_US, 0)
    page.write(slot, Word.LONGEST_STEP_US, 0)
    assert grant.step_limit is None
