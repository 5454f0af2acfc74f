"""Copies between pool and swap region, with a real unit, its memory and its calls at the other end."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore.attach_server import AttachServer
from kvstore.device_memory import HostMemory, new_memfd
from kvstore.grant_page import Word
from kvstore.grant_table import GrantTable
from kvstore.service import KvStoreService
from kvstore.unit import Unit, UnitModel
from muxmesh.block_hashes import block_hashes
from muxmesh.clock import SystemClock
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.device.device_pool import HostPool
from muxmesh.device.kv_view import KvView
from muxmesh.errors import LeaseLost
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.models.model_spec import KvShape
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, LeaseRef, QueuedRequest, Role, SchedulingState
from worker.attachment import attach
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient

SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=8, dtype_bytes=4)
SLAB_BYTES = 8 * SHAPE.token_block_bytes
SWAP_BYTES = 16 * SWAP_PAGE_BYTES
ORDER = SchedulingState(0, 0.0)


class Parts:
    """A unit with one slab, and a decode worker's side of it, in this process."""

    def __init__(
        self, unit: Unit, service: KvStoreService, leases: LeaseClient, swapper: KvSwapper, view: KvView
    ) -> None:
        self.unit, self.service, self.leases, self.swapper, self.view = unit, service, leases, swapper, view
        self.capacity = unit.pool.capacity_blocks("m") * SHAPE.block_size
        self.num_leases = 0

    def lease(self, worker: str, num_tokens: int) -> Lease:
        """A lease that ``worker`` has; each of its blocks holds its own number."""
        self.num_leases += 1
        entry_id = self.num_leases
        self.unit.offer(
            "r", QueuedRequest(entry_id, "m", SchedulingState(0, float(entry_id)), KvDemand(num_tokens, num_tokens))
        )
        (given,) = self.unit.schedule(0.0, 0.0).credits
        held = self.unit.acquire(given.lease.ref, given.prefill.name)
        lease = self.unit.move(held.ref, given.prefill.name, worker, num_tokens, ())
        self.fill(lease.block_ids, 1.0)
        return lease

    def fill(self, block_ids: tuple[int, ...], base: float) -> None:
        size = SHAPE.token_block_bytes // 4
        for place, offset in enumerate(self.view.block_offsets(block_ids)):
            self.view.pool[offset : offset + size] = base + place

    def holds(self, block_ids: tuple[int, ...]) -> list[float]:
        """The one number that each block holds."""
        size = SHAPE.token_block_bytes // 4
        found = []
        for offset in self.view.block_offsets(block_ids):
            block = self.view.pool[offset : offset + size]
            assert (block == block[0]).all()
            found.append(float(block[0]))
        return found


@pytest_asyncio.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    unit = Unit(SLAB_BYTES, SLAB_BYTES, {"m": UnitModel(SHAPE, 8, 512)}, swap_bytes=SWAP_BYTES)
    memory, grants = HostMemory(SLAB_BYTES), GrantTable()
    swap_fd = new_memfd("swap", SWAP_BYTES)
    config = UnitConfig(models=(ModelConfig(name="m"),))
    service = KvStoreService(config, unit, grants, SystemClock())
    service._routers["r"] = asyncio.Queue()
    server = AttachServer(tmp_path / "a.sock", unit, memory, swap_fd, grants, service.changed, check_every_s=600)
    service.attach = server
    register = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, service)
    grpc_server = MeshServer({kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: register})
    address = f"unix:{tmp_path}/k.sock"
    await grpc_server.start([address])
    server.start()
    unit.attach(Role.PREFILL, "m", "unix:x", 1).ready = True
    attachment = await attach(tmp_path / "a.sock", Role.DECODE, "m", "unix:x")
    unit.workers[attachment.worker].ready = True
    assert isinstance(attachment.pool, HostPool) and attachment.pool.has_swap
    view = attachment.pool.view(SHAPE)
    async with internal_channel(address) as channel:
        leases = LeaseClient(channel, attachment.worker)
        swapper = KvSwapper(attachment, SHAPE, leases, SystemClock())
        yield Parts(unit, service, leases, swapper, view)
        await leases.close()
        swapper.close()
    unit.check_integrity()
    server.close()
    attachment.close()
    await grpc_server.stop(0)


def decode_worker(parts: Parts) -> str:
    return parts.unit.ready_workers(Role.DECODE, "m")[0].name


async def swap_out(parts: Parts, lease: Lease, num_tokens: int, hashes: tuple[bytes, ...] = ()) -> None:
    await parts.swapper.copy_out(lease.ref, lease.block_ids, num_tokens, "raw")
    await parts.leases.finish_swap_out(lease.ref, hashes)


async def swap_in(parts: Parts, lease: Lease, block_ids: tuple[int, ...], num_cached: int) -> None:
    await parts.swapper.copy_in(lease.ref, block_ids, num_cached)
    await parts.leases.finish_swap_in(lease.ref)


async def test_kv_goes_out_and_comes_back_into_other_blocks(parts: Parts) -> None:
    lease = parts.lease(decode_worker(parts), 30)
    await swap_out(parts, lease, 30, ())
    assert parts.unit.blocks.num_in_use("m") == 0
    other = parts.lease(decode_worker(parts), 30)
    assert set(other.block_ids) & set(lease.block_ids), "others have its blocks now"
    parts.fill(other.block_ids, 100.0)
    block_ids, num_cached = await parts.leases.begin_swap_in(lease.ref, ORDER, KvDemand(30, 30))
    await swap_in(parts, lease, block_ids, num_cached)
    assert parts.holds(block_ids) == [1.0, 2.0, 3.0, 4.0]
    assert parts.holds(other.block_ids) == [100.0, 101.0, 102.0, 103.0]
    assert parts.unit.swap.num_free_pages == parts.unit.swap.num_pages
    page, slot = parts.swapper._page, parts.swapper._slot
    copied = [page.read(slot, word) for word in (Word.SWAP_OUT_BYTES, Word.SWAP_IN_BYTES)]
    assert copied == [4 * SHAPE.token_block_bytes] * 2


async def test_cached_blocks_are_not_copied_back(parts: Parts) -> None:
    lease = parts.lease(decode_worker(parts), 30)
    hashes = block_hashes(range(30), 8, b"root")
    await swap_out(parts, lease, 30, hashes)
    parts.fill(lease.block_ids[:3], 50.0)  # still in the cache: whoever copies would write 1, 2 and 3
    block_ids, num_cached = await parts.leases.begin_swap_in(lease.ref, ORDER, KvDemand(40, 40, hashes, 30))
    await swap_in(parts, lease, block_ids, num_cached)
    assert (num_cached, block_ids[:3]) == (3, lease.block_ids[:3])
    assert parts.holds(block_ids[:4]) == [50.0, 51.0, 52.0, 4.0]
    page, slot = parts.swapper._page, parts.swapper._slot
    assert page.read(slot, Word.SWAP_IN_BYTES) == SHAPE.token_block_bytes


async def test_a_lease_is_not_released_while_it_is_copied(parts: Parts) -> None:
    """The caller is cancelled in the middle of a copy: its memory may be reused only after the copy has ended."""
    for direction in ("out", "in"):
        lease = parts.lease(decode_worker(parts), 30)
        block_ids = lease.block_ids
        if direction == "in":
            await swap_out(parts, lease, 30, ())
            block_ids, _ = await parts.leases.begin_swap_in(lease.ref, ORDER, KvDemand(30, 30))
        gate = threading.Event()
        parts.swapper._thread.submit(gate.wait)  # a copy that takes its time
        if direction == "out":
            copying = asyncio.create_task(parts.swapper.copy_out(lease.ref, block_ids, 30, "raw"))
        else:
            copying = asyncio.create_task(parts.swapper.copy_in(lease.ref, block_ids, 0))
        async with asyncio.timeout(20):
            while lease.ref.lease_id not in parts.swapper._in_progress:
                await asyncio.sleep(0)
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
        parts.leases.release_after(functools.partial(parts.swapper.quiesce, lease.ref.lease_id), lease.ref)
        for _ in range(20):  # a release that did not wait would have come long before the last of these calls
            with pytest.raises(LeaseLost):
                await parts.leases.begin_swap_out(LeaseRef(0, 1), 1)
        num_in_use = parts.unit.blocks.num_in_use("m")
        gate.set()
        assert num_in_use == 4, "the blocks were given away under a copy"
        await parts.leases.close()
        assert parts.unit.blocks.num_in_use("m") == 0
        assert parts.unit.swap.num_free_pages == parts.unit.swap.num_pages


async def test_a_younger_request_does_not_get_the_room_of_who_gave_way(parts: Parts) -> None:
    """The room of a swapped answer is given out only when the answer itself asks again, in order."""
    lease = parts.lease(decode_worker(parts), parts.capacity)
    demand = KvDemand(parts.capacity, parts.capacity)
    parts.unit.offer("r", QueuedRequest(99, "m", SchedulingState(0, 9.0), demand))
    await swap_out(parts, lease, parts.capacity, ())
    block_ids, num_cached = await parts.leases.begin_swap_in(lease.ref, ORDER, demand)
    assert len(block_ids) * SHAPE.block_size == parts.capacity
    await swap_in(parts, lease, block_ids, num_cached)
    assert parts.unit.admission.count("m") == 1, "the younger one still waits"
    parts.leases.release_after(functools.partial(parts.swapper.quiesce, lease.ref.lease_id), lease.ref)
    await parts.leases.close()
    assert parts.unit.admission.count("m") == 0


async def test_who_waits_no_longer_gets_nothing(parts: Parts) -> None:
    first = parts.lease(decode_worker(parts), parts.capacity)
    await swap_out(parts, first, parts.capacity, ())
    second = parts.lease(decode_worker(parts), parts.capacity)
    waiting = asyncio.create_task(
        parts.leases.begin_swap_in(first.ref, ORDER, KvDemand(parts.capacity, parts.capacity))
    )
    async with asyncio.timeout(20):
        while parts.unit.admission.count("m") == 0:
            await asyncio.sleep(0)
        waiting.cancel()
        while parts.unit.admission.count("m") == 1:
            await asyncio.sleep(0)
    for lease in (second, first):
        parts.leases.release_after(functools.partial(parts.swapper.quiesce, lease.ref.lease_id), lease.ref)
    await parts.leases.close()
    assert parts.unit.blocks.num_in_use("m") == 0
    assert parts.unit.swap.num_free_pages == parts.unit.swap.num_pages
