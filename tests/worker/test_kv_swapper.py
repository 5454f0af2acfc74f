"""Copies between the pool and the swap region of a real unit."""

import asyncio
import functools
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.device_memory import new_memfd
from kvstore.grant_page import Word
from muxmesh.block_hashes import block_hashes
from muxmesh.clock import ManualClock, SystemClock
from muxmesh.device.cuda_pool import CudaPool
from muxmesh.device.device_pool import HostPool, KvCopy
from muxmesh.device.kv_view import KvView
from muxmesh.device.pinned_swap import PinnedSwap
from muxmesh.device.torch_device import InterpretedDevice
from muxmesh.errors import LeaseLost, Overloaded
from muxmesh.models.model_spec import KvShape
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, KvFormat, Lease, LeaseRef, Role, SchedulingState
from tests.support.worker_unit import SHAPE, SLAB_TOKENS, RunningUnit, running_unit
from worker.attachment import Attachment
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient

ORDER = SchedulingState(0, 0.0)
WHOLE_POOL = KvDemand(SLAB_TOKENS, SLAB_TOKENS)
BLOCK_ELEMENTS = SHAPE.token_block_bytes // 4
NUM_SWAP_PAGES = 16


def as_cuda_pool(view: KvView) -> CudaPool:
    """The memory of a pool as that of a device, with a swap region of its own."""
    device, swap_fd = InterpretedDevice(), new_memfd("swap", NUM_SWAP_PAGES * SWAP_PAGE_BYTES)
    swap = PinnedSwap(swap_fd, device, register=None)
    os.close(swap_fd)
    return CudaPool(torch.from_numpy(view.pool.view(np.uint8)), view.slab_bytes, swap, device)


@dataclass
class DecodeWorker:
    """A decode worker in a unit of one slab."""

    unit: RunningUnit
    attachment: Attachment
    prefill: LeaseClient
    leases: LeaseClient
    swapper: KvSwapper
    view: KvView

    async def lease(self, num_tokens: int) -> Lease:
        """A lease of this worker; its blocks hold 1, 2, 3, ..."""
        demand = KvDemand(num_tokens, num_tokens)
        lease = await self.unit.hand_off(self.prefill, self.attachment.worker, demand, num_tokens)
        self.fill(lease.block_ids, 1.0)
        return lease

    def fill(self, block_ids: tuple[int, ...], first: float) -> None:
        """Writes another number into each block, counting from ``first``."""
        for index, offset in enumerate(self.view.block_offsets(block_ids)):
            self.view.pool[offset : offset + BLOCK_ELEMENTS] = first + index

    def contents(self, block_ids: tuple[int, ...]) -> list[float]:
        """The number in each block."""
        blocks = [self.view.pool[offset : offset + BLOCK_ELEMENTS] for offset in self.view.block_offsets(block_ids)]
        assert all(np.all(block == block[0]) for block in blocks)
        return [float(block[0]) for block in blocks]

    async def swap_out(self, lease: Lease, num_tokens: int, hashes: tuple[bytes, ...] = ()) -> None:
        await self.swapper.copy_out(lease.ref, lease.block_ids, num_tokens, "raw")
        await self.leases.finish_swap_out(lease.ref, hashes)

    async def swap_in(self, lease: Lease, block_ids: tuple[int, ...], num_cached: int) -> None:
        await self.swapper.copy_in(lease.ref, block_ids, num_cached)
        await self.leases.finish_swap_in(lease.ref)

    def release(self, lease: Lease) -> None:
        """In the background, after its copy."""
        self.leases.release_after(functools.partial(self.swapper.quiesce, lease.ref.lease_id), lease.ref)

    def counter(self, word: Word) -> int:
        return self.attachment.page.read(self.attachment.slot, word)


@pytest.fixture(params=["host", "cuda"])
async def worker(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[DecodeWorker]:
    """With the pool in host memory, and with the same memory as that of a device that is interpreted."""
    async with running_unit(tmp_path, num_swap_pages=NUM_SWAP_PAGES) as unit:
        prefill, attachment = unit.lease_client(await unit.attach(Role.PREFILL)), await unit.attach(Role.DECODE)
        assert isinstance(attachment.pool, HostPool)
        view, leases = attachment.pool.view(SHAPE), unit.lease_client(attachment)
        if request.param == "cuda":
            attachment.pool = as_cuda_pool(view)
        swapper = KvSwapper(attachment, SHAPE, leases, SystemClock())
        yield DecodeWorker(unit, attachment, prefill, leases, swapper, view)
        await leases.close()
        swapper.close()


async def test_kv_is_swapped_out_and_into_other_blocks(worker: DecodeWorker) -> None:
    lease = await worker.lease(30)
    await worker.swap_out(lease, 30)
    assert worker.unit.num_in_use == 0
    other = await worker.lease(30)
    assert set(other.block_ids) & set(lease.block_ids), "another lease has the blocks"
    worker.fill(other.block_ids, 100.0)
    block_ids, num_cached = await worker.leases.begin_swap_in(lease.ref, ORDER, KvDemand(30, 30))
    await worker.swap_in(lease, block_ids, num_cached)
    assert worker.contents(block_ids) == [1.0, 2.0, 3.0, 4.0]
    assert worker.contents(other.block_ids) == [100.0, 101.0, 102.0, 103.0]
    assert worker.unit.state.swap.num_free_pages == worker.unit.state.swap.num_pages
    copied = [worker.counter(word) for word in (Word.SWAP_OUT_BYTES, Word.SWAP_IN_BYTES)]
    assert copied == [4 * SHAPE.token_block_bytes] * 2


async def test_cached_blocks_are_not_copied_back(worker: DecodeWorker) -> None:
    lease = await worker.lease(30)
    hashes = block_hashes(range(30), SHAPE.block_size, b"root")
    await worker.swap_out(lease, 30, hashes)
    worker.fill(lease.block_ids[:3], 50.0)  # they are in the cache; a copy would write 1, 2 and 3
    block_ids, num_cached = await worker.leases.begin_swap_in(lease.ref, ORDER, KvDemand(40, 40, hashes, 30))
    await worker.swap_in(lease, block_ids, num_cached)
    assert (num_cached, block_ids[:3]) == (3, lease.block_ids[:3])
    assert worker.contents(block_ids[:4]) == [50.0, 51.0, 52.0, 4.0]
    assert worker.counter(Word.SWAP_IN_BYTES) == SHAPE.token_block_bytes


@pytest.mark.parametrize("direction", ["out", "in"])
async def test_a_lease_is_not_released_during_a_copy_whose_caller_is_cancelled(
    worker: DecodeWorker, direction: str
) -> None:
    lease = await worker.lease(30)
    block_ids = lease.block_ids
    if direction == "in":
        await worker.swap_out(lease, 30)
        block_ids, _ = await worker.leases.begin_swap_in(lease.ref, ORDER, KvDemand(30, 30))
    gate = threading.Event()
    worker.swapper._thread.submit(gate.wait)  # the copy waits behind this
    if direction == "out":
        copying = asyncio.create_task(worker.swapper.copy_out(lease.ref, block_ids, 30, "raw"))
    else:
        copying = asyncio.create_task(worker.swapper.copy_in(lease.ref, block_ids, 0))
    await worker.unit.until(lambda: lease.ref.lease_id in worker.swapper._in_progress)
    copying.cancel()
    await asyncio.wait([copying])
    worker.release(lease)
    for _ in range(20):  # a release that did not wait would be served before these calls
        with pytest.raises(LeaseLost):
            await worker.leases.begin_swap_out(LeaseRef(0, 1), 1)
    num_in_use = worker.unit.num_in_use
    gate.set()
    assert num_in_use == 4, "the blocks were freed during a copy"
    await worker.leases.close()
    assert worker.unit.is_empty()


async def test_a_younger_request_does_not_get_the_capacity_of_a_swapped_sequence(worker: DecodeWorker) -> None:
    """Freed blocks are given out only when the swapped lease requests its own, so that the order decides."""
    lease = await worker.lease(SLAB_TOKENS)
    worker.unit.offer(WHOLE_POOL)
    await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
    await worker.swap_out(lease, SLAB_TOKENS)
    block_ids, num_cached = await worker.leases.begin_swap_in(lease.ref, ORDER, WHOLE_POOL)
    assert len(block_ids) * SHAPE.block_size == SLAB_TOKENS
    await worker.swap_in(lease, block_ids, num_cached)
    assert worker.unit.state.admission.count("m") == 1, "the younger request still waits"
    worker.release(lease)
    await worker.leases.close()
    assert worker.unit.state.admission.count("m") == 0


async def test_a_cancelled_swap_in_gets_no_blocks(worker: DecodeWorker) -> None:
    first = await worker.lease(SLAB_TOKENS)
    await worker.swap_out(first, SLAB_TOKENS)
    second = await worker.lease(SLAB_TOKENS)
    waiting = asyncio.create_task(worker.leases.begin_swap_in(first.ref, ORDER, WHOLE_POOL))
    await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 1)
    waiting.cancel()
    await worker.unit.until(lambda: worker.unit.state.admission.count("m") == 0)
    worker.release(second)
    worker.release(first)
    await worker.leases.close()
    assert worker.unit.is_empty()


async def test_a_full_swap_region_refuses_a_copy_before_it_begins(worker: DecodeWorker) -> None:
    first = await worker.lease(20)
    await worker.leases.begin_swap_out(first.ref, 16 * SWAP_PAGE_BYTES)
    second = await worker.lease(20)
    with pytest.raises(Overloaded, match=f"{3 * SHAPE.token_block_bytes} free bytes"):
        await worker.swapper.copy_out(second.ref, second.block_ids, 20, "raw")
    assert worker.counter(Word.SWAP_OUT_BYTES) == 0
    await worker.swapper.quiesce(second.ref.lease_id)


class SlowPool:
    """A pool whose copies take two seconds of a manual clock."""

    has_swap = True

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def copy_bytes(self, shape: KvShape, num_tokens: int, kv_format: KvFormat) -> int:
        return 1

    def copy_out(self, shape: KvShape, block_ids: tuple[int, ...], copy: KvCopy) -> int:
        self._clock.advance(2.0)
        return 5

    def copy_in(self, shape: KvShape, block_ids: tuple[int, ...], copy: KvCopy, num_cached_blocks: int) -> int:
        self._clock.advance(2.0)
        return 7


async def test_bytes_and_time_of_copies_are_counted(worker: DecodeWorker) -> None:
    clock = ManualClock()
    worker.attachment.pool = SlowPool(clock)  # type: ignore[assignment]
    worker.swapper = KvSwapper(worker.attachment, SHAPE, worker.leases, clock)
    lease = await worker.lease(20)
    await worker.swap_out(lease, 20)
    block_ids, _ = await worker.leases.begin_swap_in(lease.ref, ORDER, KvDemand(20, 20))
    await worker.swap_in(lease, block_ids, 0)
    words = (Word.SWAP_OUT_BYTES, Word.SWAP_IN_BYTES, Word.SWAP_NS)
    assert [worker.counter(word) for word in words] == [5, 7, 4_000_000_000]
    worker.swapper.close()
