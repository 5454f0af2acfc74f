"""The pool of a CPU unit, mapped, and copies between it and the swap region."""

import os

import numpy as np
import pytest

from kvstore.device_memory import new_memfd
from muxmesh.device.device_pool import HostPool, KvCopy
from muxmesh.device.kv_codec import encoded_bytes
from muxmesh.models.model_spec import KvShape
from muxmesh.types import SWAP_PAGE_BYTES, KvFormat, blocks_for

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype_bytes=4)
SLAB_BYTES = 3 * SHAPE.token_block_bytes + 64
NUM_SLABS, NUM_PAGES = 6, 40
NUM_TOKENS = 70
BEFORE, AFTER = (7, 2, 11, 0, 5), (1, 3, 4, 6, 8)
"""Token blocks of a sequence of 70 tokens before it is swapped out, and after it is swapped in."""


def new_pool(num_pages: int = NUM_PAGES) -> HostPool:
    """A pool of random KV."""
    fd, swap_fd = new_memfd("pool", NUM_SLABS * SLAB_BYTES), new_memfd("swap", num_pages * SWAP_PAGE_BYTES)
    pool = HostPool.map(fd, SLAB_BYTES, swap_fd if num_pages else None)
    os.close(fd)
    os.close(swap_fd)
    memory = pool.view(SHAPE).pool
    memory[:] = np.random.default_rng(3).standard_normal(memory.size)
    return pool


def copy_of(kv_format: KvFormat, num_tokens: int = NUM_TOKENS) -> KvCopy:
    num_pages = blocks_for(encoded_bytes(SHAPE, num_tokens, kv_format), SWAP_PAGE_BYTES)
    return KvCopy(num_tokens, kv_format, tuple(range(num_pages, 0, -1)))


def blocks(pool: HostPool, block_ids: tuple[int, ...]) -> np.ndarray:
    """[len(block_ids), elements], a copy."""
    view, size = pool.view(SHAPE), SHAPE.token_block_bytes // 4
    return np.stack([view.pool[offset : offset + size] for offset in view.block_offsets(block_ids)])


@pytest.mark.parametrize("num_pages", [0, NUM_PAGES])
def test_a_pool_has_swap_if_a_swap_region_is_mapped(num_pages: int) -> None:
    assert new_pool(num_pages).has_swap is (num_pages > 0)


def test_mappings_of_one_pool_share_its_memory() -> None:
    fd = new_memfd("pool", NUM_SLABS * SLAB_BYTES)
    one, other = (HostPool.map(fd, SLAB_BYTES, None).view(SHAPE) for _ in range(2))
    os.close(fd)
    one.pool[17] = 3.5
    assert other.pool[17] == 3.5 and other.pool.nbytes == NUM_SLABS * SLAB_BYTES


def test_an_exact_copy_restores_every_bit_in_other_blocks() -> None:
    pool, copy = new_pool(), copy_of("raw")
    expected = blocks(pool, BEFORE)
    num_bytes = pool.copy_out(SHAPE, BEFORE, copy)
    assert pool.copy_in(SHAPE, AFTER, copy, 0) == num_bytes == 5 * SHAPE.token_block_bytes
    assert np.array_equal(blocks(pool, AFTER).view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(blocks(pool, BEFORE), expected), "a copy leaves its source as it is"


def test_a_quantized_copy_restores_nearly_the_same_kv_from_a_quarter_of_the_bytes() -> None:
    pool, copy = new_pool(), copy_of("int8")
    expected = blocks(pool, BEFORE)
    num_bytes = pool.copy_out(SHAPE, BEFORE, copy)
    assert pool.copy_in(SHAPE, AFTER, copy, 0) == num_bytes < 0.3 * 5 * SHAPE.token_block_bytes
    full = slice(NUM_TOKENS // SHAPE.block_size)
    assert np.abs(blocks(pool, AFTER)[full] - expected[full]).max() < 0.03


@pytest.mark.parametrize("kv_format", ["raw", "int8"])
def test_cached_blocks_are_left_as_they_are(kv_format: KvFormat) -> None:
    pool, copy = new_pool(), copy_of(kv_format)
    untouched, expected = blocks(pool, AFTER), blocks(pool, BEFORE)
    num_bytes = pool.copy_out(SHAPE, BEFORE, copy)
    num_read = pool.copy_in(SHAPE, AFTER, copy, 2)
    restored = blocks(pool, AFTER)
    assert np.array_equal(restored[:2], untouched[:2])
    assert np.abs(restored[2:4] - expected[2:4]).max() < 0.03
    assert num_read == num_bytes - (2 * SHAPE.token_block_bytes if kv_format == "raw" else 0), "int8 reads its scales"


def test_only_the_blocks_of_the_copied_tokens_are_copied() -> None:
    pool, copy = new_pool(), copy_of("raw", num_tokens=33)
    untouched = blocks(pool, AFTER)
    assert pool.copy_out(SHAPE, BEFORE, copy) == 3 * SHAPE.token_block_bytes
    pool.copy_in(SHAPE, AFTER, copy, 0)
    assert np.array_equal(blocks(pool, AFTER)[3:], untouched[3:]), "the last two blocks hold no copied token"


def test_copies_of_several_sequences_do_not_disturb_each_other() -> None:
    pool = new_pool()
    size = len(copy_of("raw").swap_pages)
    copies = [KvCopy(NUM_TOKENS, "raw", tuple(range(first, 2 * size, 2))) for first in (0, 1)]
    sources = BEFORE, AFTER
    expected = [blocks(pool, source) for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        pool.copy_out(SHAPE, source, copy)
    for target, copy in zip(reversed(sources), copies, strict=True):
        pool.copy_in(SHAPE, target, copy, 0)
    assert np.array_equal(blocks(pool, AFTER), expected[0])
    assert np.array_equal(blocks(pool, BEFORE), expected[1])
