"""Copies between a pool and the swap region, in host memory and on a device that is interpreted."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.device_memory import new_memfd
from kvstore.swap_space import SwapSpace
from muxmesh.device.cuda_pool import CudaPool
from muxmesh.device.device_pool import DevicePool, HostPool, KvCopy
from muxmesh.device.kv_codec import encoded_bytes
from muxmesh.device.kv_view import KvGeometry
from muxmesh.device.pinned_swap import PinnedSwap
from muxmesh.device.torch_device import InterpretedDevice
from muxmesh.models.model_spec import KvShape
from muxmesh.types import SWAP_PAGE_BYTES, KvFormat, blocks_for
from tests.support.triton_interpreter import INTERPRETED

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype_bytes=4)
SLAB_BYTES = 3 * SHAPE.token_block_bytes + 64
NUM_SLABS, NUM_PAGES = 6, 40
NUM_TOKENS = 70
BEFORE, AFTER = (7, 2, 11, 0, 5), (1, 3, 4, 6, 8)
"""Token blocks of a sequence of 70 tokens before it is swapped out, and after it is swapped in."""


NewPool = Callable[[int], tuple[DevicePool, np.ndarray]]
"""Makes a pool of random KV with a number of swap pages. Returns it and its memory (f32)."""


def new_host_pool(num_pages: int) -> tuple[DevicePool, np.ndarray]:
    fd, swap_fd = new_memfd("pool", NUM_SLABS * SLAB_BYTES), new_memfd("swap", num_pages * SWAP_PAGE_BYTES)
    pool = HostPool.map(fd, SLAB_BYTES, swap_fd if num_pages else None)
    os.close(fd)
    os.close(swap_fd)
    return pool, filled(pool.view(SHAPE).pool)


def new_cuda_pool(num_pages: int) -> tuple[DevicePool, np.ndarray]:
    device, swap_fd = InterpretedDevice(), new_memfd("swap", num_pages * SWAP_PAGE_BYTES)
    memory = torch.empty(NUM_SLABS * SLAB_BYTES, dtype=torch.uint8)
    # Three token blocks in a buffer: a copy takes two.
    swap = PinnedSwap(swap_fd, device, register=None) if num_pages else None
    pool = CudaPool(memory, SLAB_BYTES, swap, device, buffer_bytes=3 * SHAPE.token_block_bytes)
    os.close(swap_fd)
    return pool, filled(pool.elements(torch.float32).numpy())


def filled(memory: np.ndarray) -> np.ndarray:
    memory[:] = np.random.default_rng(3).standard_normal(memory.size)
    return memory


POOLS = [new_host_pool, new_cuda_pool] if INTERPRETED else [new_host_pool]
"""The memory of a real device is no array; `test_cuda_pool` has it."""


@pytest.fixture(params=POOLS)
def new_pool(request: pytest.FixtureRequest) -> NewPool:
    make: NewPool = request.param
    return make


def copy_of(kv_format: KvFormat, num_tokens: int = NUM_TOKENS) -> KvCopy:
    num_pages = blocks_for(encoded_bytes(SHAPE, num_tokens, kv_format), SWAP_PAGE_BYTES)
    return KvCopy(num_tokens, kv_format, tuple(range(num_pages, 0, -1)))


def blocks(memory: np.ndarray, block_ids: tuple[int, ...]) -> np.ndarray:
    """[len(block_ids), elements], a copy."""
    size, offsets = SHAPE.token_block_bytes // 4, KvGeometry(SHAPE, SLAB_BYTES).block_offsets(block_ids)
    return np.stack([memory[offset : offset + size] for offset in offsets])


@pytest.mark.parametrize("num_pages", [0, NUM_PAGES])
def test_a_pool_has_swap_if_a_swap_region_is_mapped(new_pool: NewPool, num_pages: int) -> None:
    assert new_pool(num_pages)[0].has_swap is (num_pages > 0)


def test_mappings_of_one_pool_share_its_memory() -> None:
    fd = new_memfd("pool", NUM_SLABS * SLAB_BYTES)
    one, other = (HostPool.map(fd, SLAB_BYTES, None).view(SHAPE) for _ in range(2))
    os.close(fd)
    one.pool[17] = 3.5
    assert other.pool[17] == 3.5 and other.pool.nbytes == NUM_SLABS * SLAB_BYTES


def test_an_exact_copy_restores_every_bit_in_other_blocks(new_pool: NewPool) -> None:
    (pool, memory), copy = new_pool(NUM_PAGES), copy_of("raw")
    expected = blocks(memory, BEFORE)
    num_bytes = pool.copy_out(SHAPE, BEFORE, copy)
    assert pool.copy_in(SHAPE, AFTER, copy, 0) == num_bytes == 5 * SHAPE.token_block_bytes
    assert np.array_equal(blocks(memory, AFTER).view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(blocks(memory, BEFORE), expected), "a copy leaves its source as it is"


def test_a_quantized_copy_restores_nearly_the_same_kv_from_a_quarter_of_the_bytes(new_pool: NewPool) -> None:
    (pool, memory), copy = new_pool(NUM_PAGES), copy_of("int8")
    expected = blocks(memory, BEFORE)
    num_bytes = pool.copy_out(SHAPE, BEFORE, copy)
    assert pool.copy_in(SHAPE, AFTER, copy, 0) == num_bytes < 0.3 * 5 * SHAPE.token_block_bytes
    full = slice(NUM_TOKENS // SHAPE.block_size)
    assert np.abs(blocks(memory, AFTER)[full] - expected[full]).max() < 0.03


@pytest.mark.parametrize("kv_format", ["raw", "int8"])
def test_cached_blocks_are_left_as_they_are(new_pool: NewPool, kv_format: KvFormat) -> None:
    (pool, memory), copy = new_pool(NUM_PAGES), copy_of(kv_format)
    untouched, expected = blocks(memory, AFTER), blocks(memory, BEFORE)
    num_bytes = pool.copy_out(SHAPE, BEFORE, copy)
    num_read = pool.copy_in(SHAPE, AFTER, copy, 2)
    restored = blocks(memory, AFTER)
    assert np.array_equal(restored[:2], untouched[:2])
    assert np.abs(restored[2:4] - expected[2:4]).max() < 0.03
    assert num_read == num_bytes - (2 * SHAPE.token_block_bytes if kv_format == "raw" else 0), "int8 reads its scales"


def test_only_the_blocks_of_the_copied_tokens_are_copied(new_pool: NewPool) -> None:
    (pool, memory), copy = new_pool(NUM_PAGES), copy_of("raw", num_tokens=33)
    untouched = blocks(memory, AFTER)
    assert pool.copy_out(SHAPE, BEFORE, copy) == 3 * SHAPE.token_block_bytes
    pool.copy_in(SHAPE, AFTER, copy, 0)
    assert np.array_equal(blocks(memory, AFTER)[3:], untouched[3:]), "the last two blocks hold no copied token"


def test_copies_of_several_sequences_do_not_disturb_each_other(new_pool: NewPool) -> None:
    pool, memory = new_pool(NUM_PAGES)
    size = len(copy_of("raw").swap_pages)
    copies = [KvCopy(NUM_TOKENS, "raw", tuple(range(first, 2 * size, 2))) for first in (0, 1)]
    sources = BEFORE, AFTER
    expected = [blocks(memory, source) for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        pool.copy_out(SHAPE, source, copy)
    for target, copy in zip(reversed(sources), copies, strict=True):
        pool.copy_in(SHAPE, target, copy, 0)
    assert np.array_equal(blocks(memory, AFTER), expected[0])
    assert np.array_equal(blocks(memory, BEFORE), expected[1])


@settings(max_examples=40)
@given(st.data())
def test_sequences_that_are_swapped_at_random_keep_every_byte(data: st.DataObject) -> None:
    pool, memory = data.draw(st.sampled_from(POOLS))(NUM_PAGES)
    raw, rng = memory.view(np.uint32), np.random.default_rng(data.draw(st.integers(0, 1000)))
    raw[:] = rng.integers(0, 2**32, raw.size, dtype=np.uint32)  # NaN and infinities too
    free_blocks, space = list(range(NUM_SLABS * 3)), SwapSpace(NUM_PAGES * SWAP_PAGE_BYTES)
    running: list[tuple[int, tuple[int, ...], np.ndarray]] = []
    swapped: list[tuple[KvCopy, np.ndarray]] = []
    for _ in range(12):
        action = rng.integers(3)
        if action == 0:
            num_tokens = int(rng.integers(1, NUM_TOKENS))
            if (count := blocks_for(num_tokens, SHAPE.block_size)) <= len(free_blocks):
                ids = taken(free_blocks, count, rng)
                running.append((num_tokens, ids, blocks(memory, ids).view(np.uint32)))
        elif action == 1 and running:
            num_tokens, ids, expected = running.pop(int(rng.integers(len(running))))
            if pages := space.allocate(encoded_bytes(SHAPE, num_tokens, "raw")):
                copy = KvCopy(num_tokens, "raw", pages)
                pool.copy_out(SHAPE, ids, copy)
                swapped.append((copy, expected))
            free_blocks += ids
            for offset in KvGeometry(SHAPE, SLAB_BYTES).block_offsets(ids):
                raw[offset : offset + SHAPE.token_block_bytes // 4] = 7  # reused by another sequence
        elif action == 2 and swapped and blocks_for(swapped[0][0].num_tokens, SHAPE.block_size) <= len(free_blocks):
            copy, expected = swapped.pop(0)
            ids = taken(free_blocks, blocks_for(copy.num_tokens, SHAPE.block_size), rng)
            pool.copy_in(SHAPE, ids, copy, 0)
            space.free(copy.swap_pages)
            running.append((copy.num_tokens, ids, expected))
        for _, ids, expected in running:
            assert np.array_equal(blocks(memory, ids).view(np.uint32), expected)


def taken(free: list[int], count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Takes some of ``free``, in no order."""
    rng.shuffle(free)
    return tuple(free.pop() for _ in range(count))
