"""Copies between pool and swap region, with a real unit, its memory and its calls at the other end."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore.admission import WaitingKey
from kvstore.attach import AttachServer
from kvstore.client.attachment import attach
from kvstore.client.leases import LeaseClient
from kvstore.client.swapper import Swapper
from kvstore.grant import Word
from kvstore.memory import UnitMemory
from kvstore.service import KvStoreService
from kvstore.swap import PAGE_BYTES
from kvstore.unit import ModelShare, Unit
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import Role
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.engine.kv_view import KvView
from muxmesh.errors import LeaseLost
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.models.spec import KvShape
from muxmesh.prefix import block_hashes
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.types import KvDemand, Lease, LeaseRef, Standing

SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=8, dtype_bytes=4)
SLAB_BYTES = 8 * SHAPE.token_block_bytes
SWAP_BYTES = 16 * PAGE_BYTES
ORDER = Standing(0, 0.0)


class Parts:
    """A unit with one slab, and a decode worker's side of it, in this process."""

    def __init__(
        self, unit: Unit, service: KvStoreService, leases: LeaseClient, swapper: Swapper, view: KvView
    ) -> None:
        self.unit, self.service, self.leases, self.swapper, self.view = unit, service, leases, swapper, view
        self.capacity = unit.pool.capacity_blocks("m") * SHAPE.block_size
        self.num_leases = 0

    def lease(self, worker: str, num_tokens: int) -> Lease:
        """A lease that ``worker`` has; each of its blocks holds its own number."""
        self.num_leases += 1
        key_id = self.num_leases
        self.unit.offer(WaitingKey("r", key_id, "m", Standing(0, float(key_id)), KvDemand(num_tokens, num_tokens)))
        (given,) = self.unit.give_room(0.0).credits
        held = self.unit.acquire(given.lease.ref, given.prefill.name)
        lease = self.unit.move(held.ref, given.prefill.name, worker, num_tokens, (), b"")
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
    unit = Unit(SLAB_BYTES, SLAB_BYTES, {"m": ModelShare(SHAPE, 8, 512)}, swap_bytes=SWAP_BYTES)
    memory = UnitMemory(SLAB_BYTES, SWAP_BYTES)
    config = UnitConfig(models=(ModelConfig(name="m"),))
    service = KvStoreService(config, unit, memory, SystemClock())
    service._routers["r"] = asyncio.Queue()
    server = AttachServer(tmp_path / "a.sock", unit, memory, service.changed, look_every_s=600)
    service.attach = server
    register = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, service)
    grpc_server = MeshServer({kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: register})
    address = f"unix:{tmp_path}/k.sock"
    await grpc_server.start([address])
    server.start()
    unit.attach(Role.PREFILL, "m", "unix:x", 1).ready = True
    attachment = await attach(tmp_path / "a.sock", Role.DECODE, "m", "unix:x")
    unit.workers[attachment.worker].ready = True
    assert attachment.swap is not None
    view = KvView(attachment.pool, SHAPE, SLAB_BYTES)
    async with internal_channel(address) as channel:
        leases = LeaseClient(channel, attachment.worker)
        swapper = Swapper(attachment, attachment.swap, view, leases, SystemClock())
        yield Parts(unit, service, leases, swapper, view)
        await leases.close()
        swapper.close()
    unit.check_integrity()
    server.close()
    attachment.close()
    await grpc_server.stop(0)


def decode_worker(parts: Parts) -> str:
    worker = parts.unit.ready_worker(Role.DECODE, "m")
    assert worker is not None
    return worker.name


async def test_kv_goes_out_and_comes_back_into_other_blocks(parts: Parts) -> None:
    lease = parts.lease(decode_worker(parts), 30)
    await parts.swapper.copy_out(lease.ref, lease.block_ids, 30, "raw", ())
    assert parts.unit.blocks.num_in_use("m") == 0
    other = parts.lease(decode_worker(parts), 30)
    assert set(other.block_ids) & set(lease.block_ids), "others have its blocks now"
    parts.fill(other.block_ids, 100.0)
    block_ids, num_cached = await parts.leases.swap_in(lease.ref, ORDER, KvDemand(30, 30))
    await parts.swapper.copy_in(lease.ref, block_ids, 30, num_cached)
    assert parts.holds(block_ids) == [1.0, 2.0, 3.0, 4.0]
    assert parts.holds(other.block_ids) == [100.0, 101.0, 102.0, 103.0]
    assert parts.unit.swap.num_free_pages == parts.unit.swap.num_pages
    page, slot = parts.swapper._page, parts.swapper._slot
    copied = [page.read(slot, word) for word in (Word.SWAP_OUT_BYTES, Word.SWAP_IN_BYTES)]
    assert copied == [4 * SHAPE.token_block_bytes] * 2


async def test_cached_blocks_are_not_copied_back(parts: Parts) -> None:
    lease = parts.lease(decode_worker(parts), 30)
    hashes = block_hashes(range(30), 8, "")
    await parts.swapper.copy_out(lease.ref, lease.block_ids, 30, "raw", hashes)
    parts.fill(lease.block_ids[:3], 50.0)  # still in the cache: whoever copies would write 1, 2 and 3
    block_ids, num_cached = await parts.leases.swap_in(lease.ref, ORDER, KvDemand(40, 40, hashes, 30))
    await parts.swapper.copy_in(lease.ref, block_ids, 30, num_cached)
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
            await parts.swapper.copy_out(lease.ref, lease.block_ids, 30, "raw", ())
            block_ids, _ = await parts.leases.swap_in(lease.ref, ORDER, KvDemand(30, 30))
        gate = threading.Event()
        parts.swapper._thread.submit(gate.wait)  # a copy that takes its time
        if direction == "out":
            copying = asyncio.create_task(parts.swapper.copy_out(lease.ref, block_ids, 30, "raw", ()))
        else:
            copying = asyncio.create_task(parts.swapper.copy_in(lease.ref, block_ids, 30, 0))
        async with asyncio.timeout(20):
            while lease.ref.lease_id not in parts.swapper._under_way:
                await asyncio.sleep(0)
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
        parts.leases.release_after(functools.partial(parts.swapper.quiesce, lease.ref.lease_id), lease.ref)
        for _ in range(20):  # a release that did not wait would have come long before the last of these calls
            with pytest.raises(LeaseLost):
                await parts.leases.swap_out(LeaseRef(0, 1), 1)
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
    parts.unit.offer(WaitingKey("r", 99, "m", Standing(0, 9.0), demand))
    await parts.swapper.copy_out(lease.ref, lease.block_ids, parts.capacity, "raw", ())
    block_ids, num_cached = await parts.leases.swap_in(lease.ref, ORDER, demand)
    assert len(block_ids) * SHAPE.block_size == parts.capacity
    await parts.swapper.copy_in(lease.ref, block_ids, parts.capacity, num_cached)
    assert parts.unit.admission.count("m") == 1, "the younger one still waits"
    parts.leases.release_after(functools.partial(parts.swapper.quiesce, lease.ref.lease_id), lease.ref)
    await parts.leases.close()
    assert parts.unit.admission.count("m") == 0


async def test_who_waits_no_longer_gets_nothing(parts: Parts) -> None:
    first = parts.lease(decode_worker(parts), parts.capacity)
    await parts.swapper.copy_out(first.ref, first.block_ids, parts.capacity, "raw", ())
    second = parts.lease(decode_worker(parts), parts.capacity)
    waiting = asyncio.create_task(parts.leases.swap_in(first.ref, ORDER, KvDemand(parts.capacity, parts.capacity)))
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
