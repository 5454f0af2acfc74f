"""A worker's calls to a real unit, over its socket."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.leases import LeaseState
from muxmesh.block_hashes import block_hashes
from muxmesh.clock import ManualClock
from muxmesh.errors import LeaseLost, Overloaded, Unavailable, WorkerLost
from muxmesh.execution import PreemptionReason
from muxmesh.rpc.channels import internal_channel
from muxmesh.types import KvDemand, Lease, LeaseRef, Role, SchedulingState
from tests.support.worker_unit import SHAPE, SLAB_TOKENS, RunningUnit, running_unit
from worker.attachment import Attachment
from worker.lease_client import LeaseClient, PreemptLease

DEMAND = KvDemand(20, 40)
HASHES = block_hashes(range(24), SHAPE.block_size, b"root")


@pytest.fixture
async def unit(tmp_path: Path) -> AsyncIterator[RunningUnit]:
    async with running_unit(tmp_path, num_swap_pages=4) as running:
        yield running


@pytest.fixture
async def prefill(unit: RunningUnit) -> AsyncIterator[LeaseClient]:
    client = unit.lease_client(await unit.attach(Role.PREFILL))
    yield client
    await client.close()


@pytest.fixture
async def worker(unit: RunningUnit) -> Attachment:
    """The decode worker."""
    return await unit.attach(Role.DECODE)


@pytest.fixture
async def decode(unit: RunningUnit, worker: Attachment) -> AsyncIterator[LeaseClient]:
    client = unit.lease_client(worker)
    yield client
    await client.close()


async def nothing() -> None:
    """Quiesces what was never computed."""


async def test_a_credit_becomes_a_lease_of_the_worker_at_the_next_epoch(
    unit: RunningUnit, prefill: LeaseClient, worker: Attachment
) -> None:
    ref = await unit.credit(DEMAND)
    lease = await prefill.acquire(ref)
    assert lease.ref == LeaseRef(ref.lease_id, ref.epoch + 1)
    assert (len(lease.block_ids), lease.num_computed_tokens, lease.sampled_token_ids) == (3, 0, ())


async def test_a_credit_is_acquired_once(unit: RunningUnit, prefill: LeaseClient, worker: Attachment) -> None:
    ref = await unit.credit(DEMAND)
    await prefill.acquire(ref)
    with pytest.raises(LeaseLost, match="epoch"):
        await prefill.acquire(ref)


async def test_a_lease_that_is_acquired_for_a_cancelled_caller_is_released(
    unit: RunningUnit, prefill: LeaseClient, worker: Attachment
) -> None:
    acquiring = asyncio.create_task(prefill.acquire(await unit.credit(DEMAND)))
    await asyncio.sleep(0)
    acquiring.cancel()
    await asyncio.wait([acquiring])
    assert acquiring.cancelled() and not unit.is_empty()
    await prefill.close()
    assert unit.is_empty()


async def test_a_cancelled_caller_of_an_unknown_credit_leaves_nothing_behind(
    unit: RunningUnit, prefill: LeaseClient
) -> None:
    acquiring = asyncio.create_task(prefill.acquire(LeaseRef(99, 1)))
    await asyncio.sleep(0)
    acquiring.cancel()
    await prefill.close()
    assert acquiring.cancelled() and unit.is_empty()


async def test_the_hand_off_moves_blocks_computed_count_and_sampled_tokens(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, worker: Attachment
) -> None:
    before = await prefill.acquire(await unit.credit(DEMAND))
    await prefill.move(before.ref, worker.worker, 19, (7, 8))
    (after,) = unit.state.leases.of_owner(worker.worker)
    assert after == Lease(LeaseRef(before.ref.lease_id, before.ref.epoch + 1), "m", before.block_ids, 19, (7, 8))
    with pytest.raises(LeaseLost):
        await prefill.release(before.ref, ())


async def test_a_hand_off_to_a_worker_that_is_gone_leaves_the_lease_where_it_is(
    unit: RunningUnit, prefill: LeaseClient, worker: Attachment
) -> None:
    lease = await prefill.acquire(await unit.credit(DEMAND))
    with pytest.raises(WorkerLost, match="decode-m#99 is not attached"):
        await prefill.move(lease.ref, "decode-m#99", 19, (7,))
    await prefill.release(lease.ref, ())
    assert unit.is_empty()


async def test_growth_returns_the_new_blocks_alone_until_the_pool_is_full(
    unit: RunningUnit, prefill: LeaseClient, worker: Attachment
) -> None:
    lease = await prefill.acquire(await unit.credit(DEMAND))
    grown = await prefill.grow(lease.ref, 4)
    assert len(grown) == 4 and not set(grown) & set(lease.block_ids)
    with pytest.raises(Overloaded, match=r"^2 token blocks are not available to this lease"):
        await prefill.grow(lease.ref, 2)
    assert len(await prefill.grow(lease.ref, 1)) == 1


@pytest.mark.parametrize("owns", [True, False])
async def test_a_call_with_an_old_epoch_or_by_another_worker_is_refused(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, owns: bool
) -> None:
    lease = await prefill.acquire(await unit.credit(DEMAND))
    client, ref = (prefill, replace(lease.ref, epoch=1)) if owns else (decode, lease.ref)
    for call in (
        client.grow(ref, 1),
        client.begin_swap_out(ref, 100),
        client.finish_swap_out(ref, ()),
        client.begin_swap_in(ref, SchedulingState(0, 0.0), DEMAND),
        client.finish_swap_in(ref),
        client.release(ref, ()),
    ):
        with pytest.raises(LeaseLost):
            await call


async def test_a_lease_is_swapped_out_and_in_through_its_states(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, worker: Attachment
) -> None:
    def state() -> LeaseState:
        return unit.state.leases.state_of(lease.ref, worker.worker)

    lease = await unit.hand_off(prefill, worker.worker, DEMAND, 19)
    pages = await decode.begin_swap_out(lease.ref, 3 * SHAPE.token_block_bytes)
    assert (state(), len(pages), unit.num_in_use) == (LeaseState.SWAPPING_OUT, 1, 3)
    await decode.finish_swap_out(lease.ref, HASHES[:2])
    assert (state(), unit.num_in_use) == (LeaseState.SWAPPED, 0)
    demand = KvDemand(24, 40, HASHES[:2], 19)
    block_ids, num_cached = await decode.begin_swap_in(lease.ref, SchedulingState(0, 0.0), demand)
    assert (state(), len(block_ids), num_cached) == (LeaseState.SWAPPING_IN, 3, 2)
    assert block_ids[:2] == lease.block_ids[:2], "the cached blocks are the lease's again"
    await decode.finish_swap_in(lease.ref)
    assert state() is LeaseState.RESIDENT
    assert unit.state.swap.num_free_pages == unit.state.swap.num_pages


async def test_a_full_swap_region_is_reported_and_leaves_the_lease_resident(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, worker: Attachment
) -> None:
    lease = await unit.hand_off(prefill, worker.worker, DEMAND, 19)
    with pytest.raises(Overloaded, match="999999 free bytes"):
        await decode.begin_swap_out(lease.ref, 999_999)
    assert unit.state.leases.state_of(lease.ref, worker.worker) is LeaseState.RESIDENT


async def waiting_swap_in(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, worker: Attachment
) -> tuple[Lease, Lease, asyncio.Task[tuple[tuple[int, ...], int]]]:
    """A swapped lease, the lease that fills the pool, and the call that waits to swap the first one in."""
    whole = KvDemand(SLAB_TOKENS, SLAB_TOKENS)
    swapped = await unit.hand_off(prefill, worker.worker, whole, 60)
    await decode.begin_swap_out(swapped.ref, 100)
    await decode.finish_swap_out(swapped.ref, ())
    resident = await unit.hand_off(prefill, worker.worker, whole, 60)
    waiting = asyncio.create_task(decode.begin_swap_in(swapped.ref, SchedulingState(0, 0.0), whole))
    await unit.until(lambda: unit.state.admission.count("m") == 1)
    return swapped, resident, waiting


async def test_a_swap_in_waits_for_free_capacity(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, worker: Attachment
) -> None:
    _, second, waiting = await waiting_swap_in(unit, prefill, decode, worker)
    assert not waiting.done()
    await decode.release(second.ref, ())
    block_ids, num_cached = await waiting
    assert (len(block_ids), num_cached) == (8, 0)


async def test_a_cancelled_swap_in_waits_no_longer(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, worker: Attachment
) -> None:
    first, _, waiting = await waiting_swap_in(unit, prefill, decode, worker)
    waiting.cancel()
    await unit.until(lambda: unit.state.admission.count("m") == 0)
    assert unit.state.leases.state_of(first.ref, worker.worker) is LeaseState.SWAPPED


async def test_released_blocks_are_cached_under_the_hashes_of_what_was_computed(
    unit: RunningUnit, prefill: LeaseClient, worker: Attachment
) -> None:
    demand = KvDemand(24, 40, HASHES, 23)
    lease = await prefill.acquire(await unit.credit(demand))
    await prefill.release(lease.ref, HASHES[:2])
    again = await prefill.acquire(await unit.credit(demand))
    assert again.num_computed_tokens == 2 * SHAPE.block_size
    assert again.block_ids[:2] == lease.block_ids[:2]


async def test_a_background_release_waits_until_the_memory_is_quiet(
    unit: RunningUnit, prefill: LeaseClient, worker: Attachment
) -> None:
    lease, quiet = await prefill.acquire(await unit.credit(DEMAND)), asyncio.Event()

    async def quiesce() -> None:
        await quiet.wait()

    prefill.release_after(quiesce, lease.ref)
    for _ in range(5):  # a release that did not wait would be served before these calls
        with pytest.raises(LeaseLost):
            await prefill.grow(LeaseRef(99, 1), 1)
    assert unit.num_in_use == 3
    quiet.set()
    await prefill.close()
    assert unit.is_empty()


async def test_a_background_release_of_a_lost_lease_is_silent(
    unit: RunningUnit, prefill: LeaseClient, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.release_after(nothing, LeaseRef(99, 1))
    await prefill.close()
    assert "could not be released" not in caplog.text


async def test_a_background_release_without_a_unit_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with internal_channel(f"unix:{tmp_path}/none.sock") as channel:
        client = LeaseClient(channel, "decode-m#1")
        client.release_after(nothing, LeaseRef(5, 1))
        await client.close()
        with pytest.raises(Unavailable):
            await client.grow(LeaseRef(5, 1), 1)
    assert "lease 5 could not be released" in caplog.text


async def test_a_watch_begins_with_the_leases_that_the_worker_has_and_goes_on_with_those_that_arrive(
    unit: RunningUnit, prefill: LeaseClient, decode: LeaseClient, worker: Attachment
) -> None:
    first = await unit.hand_off(prefill, worker.worker, DEMAND, 19, (7,))
    events = decode.watch()
    async with asyncio.timeout(20):
        assert await anext(events) == first
        second = await unit.hand_off(prefill, worker.worker, DEMAND, 19, (8,))
        assert await anext(events) == second


async def test_a_watch_by_a_worker_that_is_not_attached_is_refused(unit: RunningUnit) -> None:
    client = LeaseClient(unit.channel, "decode-m#99")
    with pytest.raises(WorkerLost, match="decode-m#99 is not attached"):
        await anext(client.watch())


async def test_a_watch_reports_a_lease_that_another_model_claims(tmp_path: Path) -> None:
    clock = ManualClock(100.0)
    async with running_unit(tmp_path, num_slabs=2, models=("m", "other"), clock=clock) as unit:
        prefill, worker = unit.lease_client(await unit.attach(Role.PREFILL)), await unit.attach(Role.DECODE)
        for role in Role:
            await unit.attach(role, "other")
        decode = unit.lease_client(worker)
        lease = await unit.hand_off(prefill, worker.worker, KvDemand(2 * SLAB_TOKENS, 2 * SLAB_TOKENS), 60)
        events = decode.watch()
        assert await anext(events) == lease
        unit.offer(KvDemand(8, 8), "other")
        await unit.until(lambda: unit.state.next_change_s() is not None)
        clock.advance(1.5)
        unit.service.changed()
        async with asyncio.timeout(20):
            assert await anext(events) == PreemptLease(lease.ref.lease_id, PreemptionReason.KV_QUOTA)


async def test_a_watch_ends_with_the_unit(tmp_path: Path) -> None:
    async with running_unit(tmp_path) as unit:
        worker = await unit.attach(Role.DECODE)
        channel = internal_channel(unit.address)
        watching = asyncio.ensure_future(anext(LeaseClient(channel, worker.worker).watch()))
        await unit.until(lambda: bool(unit.service._watchers))
    with pytest.raises(Unavailable):
        await watching
    await channel.close()
