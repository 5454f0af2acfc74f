"""The KV of one sequence, over a real unit and a real engine.

The engine's steps take no time, so a sequence runs until its blocks are full or its output is complete, and waits.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import kvstore.victim_choice
from kvstore.grant_page import Word
from kvstore.leases import LeaseState
from kvstore.sequence_progress import SequenceProgress
from muxmesh.block_hashes import block_hashes
from muxmesh.clock import SystemClock
from muxmesh.device.device_pool import DevicePool, HostPool, KvCopy
from muxmesh.engine.api import EngineJob, Event, Finished, Preempted, Tokens
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import Runner
from muxmesh.engine.step_engine import StepEngine
from muxmesh.errors import InternalError, LeaseLost, RequestPreempted
from muxmesh.models.model_spec import KvShape
from muxmesh.types import (
    SWAP_PAGE_BYTES,
    EngineRequest,
    FinishReason,
    KvDemand,
    KvFormat,
    Lease,
    LeaseRef,
    Role,
    Sampling,
    SchedulingState,
    Stopping,
)
from tests.support.engines import GatedRunner, running_engine
from tests.support.worker_unit import SHAPE, RunningUnit, running_unit
from worker.attachment import Attachment
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient
from worker.sequence_kv import SequenceKv

BLOCK, ROOT = SHAPE.block_size, b"root"
PROMPT = tuple(range(40, 60))
NUM_SLOTS = 24
"""Of a new sequence: for its prompt, the token that prefill sampled, and three more."""
SWAP_BYTES = (Word.SWAP_OUT_BYTES, Word.SWAP_IN_BYTES)


class GatedPool:
    """A pool whose copies wait while the gate is closed."""

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        self.gate = threading.Event()
        self.gate.set()
        self.num_copies = 0

    @property
    def has_swap(self) -> bool:
        return self.pool.has_swap

    def copy_bytes(self, shape: KvShape, num_tokens: int, kv_format: KvFormat) -> int:
        return self.pool.copy_bytes(shape, num_tokens, kv_format)

    def copy_out(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy) -> int:
        self.num_copies += 1
        assert self.gate.wait(20)
        return self.pool.copy_out(shape, block_ids, copy)

    def copy_in(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy, num_cached_blocks: int) -> int:
        self.num_copies += 1
        assert self.gate.wait(20)
        return self.pool.copy_in(shape, block_ids, copy, num_cached_blocks)


class GatedLeases(LeaseClient):
    """A lease client whose growth waits while the gate is closed."""

    def __init__(self, channel: grpc.aio.Channel, worker: str) -> None:
        super().__init__(channel, worker)
        self.growth_gate = asyncio.Event()
        self.growth_gate.set()

    async def grow(self, ref: LeaseRef, num_blocks: int) -> tuple[int, ...]:
        await self.growth_gate.wait()
        return await super().grow(ref, num_blocks)

    async def round_trips(self) -> None:
        """Makes calls that end after every call that was sent before them."""
        for _ in range(5):
            with pytest.raises(LeaseLost):
                await self.finish_swap_in(LeaseRef(99, 1))


@dataclass
class DecodeWorker:
    """A decode worker, and the prefill worker before it."""

    unit: RunningUnit
    attachment: Attachment
    pool: GatedPool
    prefill: LeaseClient
    leases: GatedLeases
    swapper: KvSwapper | None
    engine: StepEngine

    async def sequence(
        self, max_new_tokens: int = 40, kv_format: KvFormat = "raw", bypass_prefix_cache: bool = False
    ) -> "RunningSequence":
        """A sequence that was just handed off, and runs."""
        demand = KvDemand(NUM_SLOTS, len(PROMPT) + max_new_tokens)
        lease = await self.unit.hand_off(self.prefill, self.attachment.worker, demand, len(PROMPT), (7,))
        request = EngineRequest(
            "r", "m", PROMPT, Sampling(seed=1), Stopping(max_new_tokens), SchedulingState(0, 0.0),
            bypass_prefix_cache=bypass_prefix_cache,
        )  # fmt: skip
        record = SequenceRecord(request, BLOCK, ROOT, lease.block_ids, len(PROMPT), lease.sampled_token_ids)
        kv = SequenceKv(lease.ref, record, self.engine, self.leases, self.attachment.progress, self.swapper, kv_format)
        return RunningSequence(self, lease, record, kv, self.engine.submit(EngineJob(lease.ref.lease_id, record)))

    async def growing_sequence(self) -> "RunningSequence":
        """A sequence that is paused while its growth waits at the gate."""
        sequence = await self.sequence()
        await sequence.until_blocks_are_full()
        self.leases.growth_gate.clear()
        sequence.kv.on_tokens()
        self.engine.preempt(sequence.lease.ref.lease_id)
        await sequence.until_paused()
        return sequence

    async def fill_pool(self, num_left: int = 0) -> Lease:
        """A lease of another sequence that takes all free blocks but ``num_left``."""
        num_tokens = (self.unit.state.blocks.num_available("m") - num_left) * BLOCK
        return await self.unit.hand_off(self.prefill, self.attachment.worker, KvDemand(num_tokens, num_tokens), 0)

    def state_of(self, sequence: "RunningSequence") -> LeaseState:
        return self.unit.state.leases.state_of(sequence.lease.ref, self.attachment.worker)

    def progress(self, lease: Lease) -> tuple[bytes, ...] | None:
        return self.attachment.progress.read().get(lease.ref.lease_id)


@dataclass
class RunningSequence:
    """One sequence with its KV and the events of its job."""

    worker: DecodeWorker
    lease: Lease
    record: SequenceRecord
    kv: SequenceKv
    events: AsyncIterator[Event]

    async def next_event(self) -> Event:
        async with asyncio.timeout(20):
            return await anext(self.events)

    async def until_blocks_are_full(self) -> None:
        """Reads the events until the last known token has no slot."""
        while self.record.num_free_slots >= 0:
            assert isinstance(await self.next_event(), Tokens)

    async def until_paused(self) -> None:
        """Reads the events until the job is paused."""
        while not isinstance(await self.next_event(), Preempted):
            pass

    async def run(self) -> Finished:
        """Does what the decode service does, until the output is complete."""
        while not isinstance(event := await self.next_event(), Finished):
            if isinstance(event, Tokens):
                self.kv.on_tokens()
            else:
                await self.kv.on_preempted()
        return event

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """Of the full blocks that are computed."""
        return block_hashes(self.record.tokens(0, self.record.num_computed_tokens), BLOCK, ROOT)

    def fill(self, first: float) -> None:
        """Writes a different number into each block."""
        view = self.worker.pool.pool.view(SHAPE)  # type: ignore[attr-defined]
        for index, offset in enumerate(view.block_offsets(self.record.block_ids)):
            view.pool[offset : offset + SHAPE.token_block_bytes // 4] = first + index

    def contents(self) -> list[float]:
        """The number in each block."""
        view = self.worker.pool.pool.view(SHAPE)  # type: ignore[attr-defined]
        size = SHAPE.token_block_bytes // 4
        blocks = [view.pool[offset : offset + size] for offset in view.block_offsets(self.record.block_ids)]
        assert all(np.all(block == block[0]) for block in blocks)
        return [float(block[0]) for block in blocks]


@asynccontextmanager
async def decode_worker(
    directory: Path, num_slabs: int = 1, num_swap_pages: int = 16, runner: Runner | None = None
) -> AsyncIterator[DecodeWorker]:
    async with AsyncExitStack() as stack:
        unit = await stack.enter_async_context(running_unit(directory, num_slabs, num_swap_pages))
        prefill = unit.lease_client(await unit.attach(Role.PREFILL))
        attachment = await unit.attach(Role.DECODE)
        assert isinstance(attachment.pool, HostPool)
        attachment.pool = pool = GatedPool(attachment.pool)
        leases = GatedLeases(unit.channel, attachment.worker)
        stack.push_async_callback(leases.close)
        swapper = KvSwapper(attachment, SHAPE, leases, SystemClock()) if pool.has_swap else None
        if swapper is not None:
            stack.callback(swapper.close)
        stack.callback(pool.gate.set)
        engine = await stack.enter_async_context(running_engine(runner))
        yield DecodeWorker(unit, attachment, pool, prefill, leases, swapper, engine)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[DecodeWorker]:
    """In a unit of one slab: a new sequence leaves five of its eight blocks free."""
    async with decode_worker(tmp_path) as running:
        yield running


async def test_a_sequence_grows_ahead_of_need_and_finishes(tmp_path: Path) -> None:
    async with decode_worker(tmp_path, num_slabs=3) as worker:
        sequence = await worker.sequence(max_new_tokens=100)
        await sequence.run()
        assert sequence.record.num_tokens == 120
        assert len(sequence.record.block_ids) == sequence.record.max_blocks == 15
        sequence.kv.end()
        await worker.leases.close()
        assert worker.unit.is_empty()
        assert worker.unit.state.blocks.num_cached("m") == 119 // BLOCK, "the last token's KV is not computed"


async def test_a_sequence_halves_its_request_until_the_pool_has_the_blocks(worker: DecodeWorker) -> None:
    sequence = await worker.sequence()
    await worker.fill_pool(num_left=3)
    for num_blocks in (3 + 2, 3 + 2 + 1):  # requests 5, then 2; requests 3, then 1
        num_before = len(sequence.record.block_ids)
        sequence.kv.on_tokens()
        await worker.unit.until(lambda before=num_before: len(sequence.record.block_ids) > before)  # type: ignore[misc]
        assert len(sequence.record.block_ids) == num_blocks
    sequence.kv.end()


async def test_one_request_for_blocks_is_in_progress_at_a_time(tmp_path: Path) -> None:
    async with decode_worker(tmp_path, num_slabs=8) as worker:
        sequence = await worker.sequence(max_new_tokens=400)
        for _ in range(3):
            sequence.kv.on_tokens()
        await worker.unit.until(lambda: len(sequence.record.block_ids) > 3)
        assert len(sequence.record.block_ids) == 3 + 16 == worker.unit.num_in_use
        sequence.kv.end()


async def test_a_sequence_in_a_full_pool_uses_all_of_its_slots_and_is_pre_empted(worker: DecodeWorker) -> None:
    sequence = await worker.sequence()
    await worker.fill_pool()
    num_tokens = 0
    while isinstance(await sequence.next_event(), Tokens):
        num_tokens += 1
        sequence.kv.on_tokens()
    assert num_tokens == NUM_SLOTS + 1 - len(PROMPT) - 1, "the last token has no slot"
    sequence.kv.end()


async def test_a_sequence_without_slots_waits_for_the_blocks_of_one_that_follows_it(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.victim_choice, "MAX_PREEMPTION_REQUESTS", 10**9)
    sequence, other = await worker.sequence(), await worker.fill_pool()
    leases = worker.unit.state.leases
    leases.owned(other.ref, worker.attachment.worker).scheduling = SchedulingState(0, 1e12)
    running = asyncio.create_task(sequence.run())
    await worker.unit.until(lambda: leases.owned(other.ref, worker.attachment.worker).num_preemption_requests > 0)
    await worker.leases.round_trips()
    assert worker.state_of(sequence) is LeaseState.RESIDENT and not running.done()
    await worker.leases.release(other.ref, ())
    assert (await running).finish.reason is FinishReason.LENGTH
    assert worker.state_of(sequence) is LeaseState.RESIDENT, "it was never swapped"


async def test_a_sequence_that_ends_while_it_waits_for_another_one_claims_no_more(worker: DecodeWorker) -> None:
    sequence, other = await worker.sequence(), await worker.fill_pool()
    record = worker.unit.state.leases.owned(other.ref, worker.attachment.worker)
    record.scheduling = SchedulingState(0, 1e12)
    running = asyncio.create_task(sequence.run())
    await worker.unit.until(lambda: record.num_preemption_requests > 0)
    running.cancel()
    sequence.kv.end()
    await worker.leases.close()
    assert len(worker.unit.state.leases) == 1, "only that of the other one"


async def test_a_failed_growth_is_raised_when_the_job_is_paused(tmp_path: Path) -> None:
    async with decode_worker(tmp_path, num_swap_pages=0) as worker:
        sequence = await worker.sequence()
        await worker.leases.release(sequence.lease.ref, ())
        sequence.kv.on_tokens()
        await sequence.until_paused()
        with pytest.raises(LeaseLost):
            await sequence.kv.on_preempted()
        sequence.kv.end()


async def test_a_growth_that_fails_in_any_way_ends_the_attempt_instead_of_waiting_for_ever(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = await worker.sequence()

    async def failing(ref: LeaseRef, num_blocks: int) -> tuple[int, ...]:
        raise BufferError("a bug")

    monkeypatch.setattr(worker.leases, "grow", failing)
    sequence.kv.on_tokens()
    await sequence.until_paused()
    with pytest.raises(InternalError, match="BufferError: a bug"):
        await sequence.kv.on_preempted()
    sequence.kv.end(publishes=False)
    await worker.leases.close()
    assert worker.unit.is_empty()


async def test_the_lease_is_released_even_if_its_blocks_cannot_be_named(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = await worker.sequence(max_new_tokens=4)
    await sequence.run()

    def failing(lease_id: int) -> None:
        raise BufferError("the page is damaged")

    monkeypatch.setattr(worker.attachment.progress, "end", failing)
    with pytest.raises(BufferError):
        sequence.kv.end()
    await worker.leases.close()
    assert worker.unit.is_empty()


async def test_full_blocks_are_committed_as_they_are_computed(worker: DecodeWorker) -> None:
    sequence = await worker.sequence(max_new_tokens=12)
    assert worker.progress(sequence.lease) == ()
    sequence.kv.on_tokens()
    assert worker.progress(sequence.lease) == sequence.hashes[:2], "20 tokens are computed"
    await sequence.run()
    assert worker.progress(sequence.lease) == sequence.hashes and len(sequence.hashes) == 3
    sequence.kv.end()
    assert worker.progress(sequence.lease) is None


async def test_the_unit_knows_what_is_left_and_whether_the_batch_has_the_sequence(worker: DecodeWorker) -> None:
    sequence = await worker.sequence(max_new_tokens=12)
    reports = worker.attachment.progress.reports
    lease_id = sequence.lease.ref.lease_id
    assert reports()[lease_id] == SequenceProgress(is_batched=True)
    sequence.record.num_preemptions = 1
    sequence.kv.on_batch_changed(False)
    state = sequence.record.scheduling
    expected = SequenceProgress(False, state.decode_s, state.served_s, False, 1)
    assert reports()[lease_id] == expected
    sequence.kv.on_batch_changed(True)
    assert reports()[lease_id].is_batched
    sequence.kv.end()
    assert lease_id not in reports()


async def test_a_released_sequence_leaves_its_full_blocks_in_the_prefix_cache(worker: DecodeWorker) -> None:
    sequence = await worker.sequence(max_new_tokens=4)
    await sequence.run()
    sequence.kv.end()
    await worker.leases.close()
    assert worker.unit.is_empty()
    assert worker.unit.state.blocks.count_cached("m", sequence.hashes) == 23 // BLOCK == 2


@pytest.mark.parametrize(("bypass", "num_copied"), [(True, 3), (False, 0)])
async def test_a_pre_empted_sequence_is_swapped_out_and_in_and_continues(
    worker: DecodeWorker, bypass: bool, num_copied: int
) -> None:
    sequence = await worker.sequence(bypass_prefix_cache=bypass)
    sequence.fill(1.0)
    other = await worker.fill_pool()
    running = asyncio.create_task(sequence.run())
    await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
    assert sequence.record.block_ids == () and worker.progress(sequence.lease) is None
    assert worker.state_of(sequence) is LeaseState.SWAPPED
    await worker.leases.release(other.ref, ())
    await running
    assert worker.state_of(sequence) is LeaseState.RESIDENT
    assert sequence.record.num_output_tokens == 40 and sequence.contents()[:3] == [1.0, 2.0, 3.0]
    assert worker.progress(sequence.lease) == sequence.hashes
    copied = [worker.attachment.page.read(worker.attachment.slot, word) for word in SWAP_BYTES]
    assert copied == [3 * SHAPE.token_block_bytes, num_copied * SHAPE.token_block_bytes], "the cached are not copied"
    sequence.kv.end()
    await worker.leases.close()
    assert worker.unit.is_empty()


@pytest.mark.parametrize("direction", ["copy_out", "copy_in"])
async def test_a_copy_that_fails_ends_only_its_sequence_and_frees_what_it_had(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    def failing(*arguments: object) -> int:
        raise BufferError("the region is damaged")

    monkeypatch.setattr(worker.pool, direction, failing)
    sequence = await worker.sequence()
    other = await worker.fill_pool()
    running = asyncio.create_task(sequence.run())
    if direction == "copy_in":
        await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
        await worker.leases.release(other.ref, ())
    with pytest.raises(BufferError, match="the region is damaged"):
        await running
    sequence.kv.end()
    monkeypatch.undo()
    if direction == "copy_out":
        await worker.leases.release(other.ref, ())
    finished = await (await worker.sequence(max_new_tokens=4)).run()
    assert finished.finish.reason is FinishReason.LENGTH, "another sequence goes on"
    await worker.leases.close()
    assert worker.unit.state.swap.num_free_pages == worker.unit.state.swap.num_pages


async def test_the_blocks_of_a_swapped_in_sequence_are_committed_at_once(worker: DecodeWorker) -> None:
    sequence, other = await worker.sequence(), await worker.fill_pool()
    await sequence.until_blocks_are_full()
    sequence.kv.on_tokens()
    await sequence.until_paused()
    preempting = asyncio.create_task(sequence.kv.on_preempted())
    await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
    worker.attachment.progress.begin(other.ref.lease_id)  # has the slot of the page that the sequence had
    worker.attachment.progress.commit(other.ref.lease_id, 0, [b"x" * 16] * 3)
    await worker.leases.release(other.ref, ())
    await preempting
    assert worker.progress(sequence.lease) == sequence.hashes[:3]
    sequence.kv.end()


@pytest.mark.parametrize(("kv_format", "num_shared"), [("raw", 7), ("int8", 3)])
async def test_only_kv_from_an_exact_copy_is_shared(worker: DecodeWorker, kv_format: KvFormat, num_shared: int) -> None:
    sequence = await worker.sequence(kv_format=kv_format)
    other = await worker.fill_pool()
    running = asyncio.create_task(sequence.run())
    await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
    await worker.leases.release(other.ref, ())
    await running
    assert worker.progress(sequence.lease) == (sequence.hashes if kv_format == "raw" else ())
    sequence.kv.end()
    await worker.leases.close()
    shared = worker.unit.state.blocks.count_cached("m", sequence.hashes)
    assert shared == num_shared, "three blocks were published before the copy"


async def test_without_a_swap_region_a_pre_empted_request_is_given_back(tmp_path: Path) -> None:
    async with decode_worker(tmp_path, num_swap_pages=0) as worker:
        sequence = await worker.sequence()
        await worker.fill_pool()
        with pytest.raises(RequestPreempted, match="not swapped: the unit has no swap region"):
            await sequence.run()
        sequence.kv.end()
        await worker.leases.close()
        assert worker.unit.state.blocks.count_cached("m", sequence.hashes) == 3, "its next attempt finds its KV"


async def test_with_a_full_swap_region_a_pre_empted_request_is_given_back(worker: DecodeWorker) -> None:
    sequence, other = await worker.sequence(), await worker.fill_pool()
    await worker.leases.begin_swap_out(other.ref, worker.unit.state.swap.num_pages * SWAP_PAGE_BYTES)
    with pytest.raises(RequestPreempted, match=f"not swapped: .* {3 * SHAPE.token_block_bytes} free bytes"):
        await sequence.run()
    assert worker.state_of(sequence) is LeaseState.RESIDENT
    sequence.kv.end()


async def test_a_pre_emption_waits_for_the_growth_in_progress(worker: DecodeWorker) -> None:
    sequence = await worker.growing_sequence()
    preempting = asyncio.create_task(sequence.kv.on_preempted())
    await worker.leases.round_trips()
    assert worker.pool.num_copies == 0
    worker.leases.growth_gate.set()
    await preempting
    assert worker.pool.num_copies == 2
    sequence.kv.end()


async def test_a_sequence_that_ends_during_its_growth_is_released_after_it(worker: DecodeWorker) -> None:
    sequence = await worker.growing_sequence()
    sequence.kv.end()
    await worker.leases.round_trips()
    assert len(worker.unit.state.leases) == 1
    worker.leases.growth_gate.set()
    await worker.leases.close()
    assert len(sequence.record.block_ids) == 8
    assert worker.unit.is_empty()


async def test_a_sequence_that_is_cancelled_during_its_growth_is_released(worker: DecodeWorker) -> None:
    sequence = await worker.growing_sequence()
    preempting = asyncio.create_task(sequence.kv.on_preempted())
    await worker.leases.round_trips()
    await cancel(preempting)
    sequence.kv.end()
    worker.leases.growth_gate.set()
    await worker.leases.close()
    assert worker.unit.is_empty()


@pytest.mark.parametrize("direction", ["out", "in"])
async def test_a_sequence_that_is_cancelled_during_a_copy_is_released_after_it(
    worker: DecodeWorker, direction: str
) -> None:
    sequence = await worker.sequence(bypass_prefix_cache=True)
    await sequence.until_blocks_are_full()
    worker.engine.preempt(sequence.lease.ref.lease_id)
    await sequence.until_paused()
    other = await worker.fill_pool()
    preempting = asyncio.create_task(sequence.kv.on_preempted())
    if direction == "in":
        await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
    worker.pool.gate.clear()
    await worker.leases.release(other.ref, ())
    await worker.unit.until(lambda: worker.pool.num_copies == 1 + (direction == "in"))
    num_in_use = worker.unit.num_in_use
    await cancel(preempting)
    sequence.kv.end()
    await worker.leases.round_trips()
    assert worker.unit.num_in_use == num_in_use > 0
    worker.pool.gate.set()
    await worker.leases.close()
    assert worker.unit.is_empty()


async def test_a_swapped_sequence_that_is_cancelled_waits_no_longer_and_frees_its_copy(worker: DecodeWorker) -> None:
    sequence = await worker.sequence()
    await worker.fill_pool()
    running = asyncio.create_task(sequence.run())
    await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
    await cancel(running)
    sequence.kv.end()
    await worker.leases.close()
    state = worker.unit.state
    assert (state.admission.count("m"), len(state.leases)) == (0, 1)
    assert state.swap.num_free_pages == state.swap.num_pages


async def test_the_blocks_of_a_running_step_are_released_after_it(tmp_path: Path) -> None:
    runner = GatedRunner()
    async with decode_worker(tmp_path, runner=runner) as worker:
        sequence = await worker.sequence()
        await runner.begun(1)
        sequence.kv.end()
        await worker.leases.round_trips()
        assert worker.unit.num_in_use == 3
        runner.open()
        await worker.leases.close()
        assert worker.unit.is_empty()


async def cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
