"""Encoded KV: how exact it is, and how many bytes it takes."""

import numpy as np
import pytest

from muxmesh.device.kv_codec import GROUP_TOKENS, decode, encode, encoded_bytes
from muxmesh.device.kv_view import KvView
from muxmesh.device.swap_region import SwapCopy
from muxmesh.models.model_spec import KvShape
from muxmesh.types import SWAP_PAGE_BYTES, KvFormat, blocks_for

SHAPE = KvShape(num_layers=3, num_kv_heads=2, head_dim=64, block_size=16, dtype_bytes=4)
SLAB_BYTES = 3 * SHAPE.token_block_bytes + 256
LENGTHS = [1, 15, 16, 17, 127, 128, 129, 200, 255, 256, 300]


def view(seed: int, shape: KvShape = SHAPE, num_slabs: int = 12) -> KvView:
    pool = np.random.default_rng(seed).standard_normal(num_slabs * SLAB_BYTES // 4).astype(np.float32)
    return KvView(shape, SLAB_BYTES, pool)


def scattered(num_blocks: int, of: KvView, seed: int) -> list[int]:
    """Ids of some blocks of the pool, in no order."""
    capacity = of.pool.nbytes // SLAB_BYTES * of.blocks_per_slab
    return [int(block) for block in np.random.default_rng(seed).permutation(capacity)[:num_blocks]]


def blocks(of: KvView, ids: list[int]) -> np.ndarray:
    """[blocks, layers * heads, K and V, ...] of a sequence."""
    size = of.shape.token_block_bytes // 4
    heads = of.shape.num_layers * of.shape.num_kv_heads
    return np.stack([of.pool[o : o + size] for o in of.block_offsets(ids)]).reshape(len(ids), heads, 2, -1)


class Counting:
    """A sink that only counts."""

    num_bytes = 0

    def write(self, piece: np.ndarray) -> None:
        self.num_bytes += piece.nbytes


def region(num_bytes: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """A swap region of random bytes, and pages of it in no order that hold ``num_bytes``."""
    count = blocks_for(num_bytes, SWAP_PAGE_BYTES)
    generator = np.random.default_rng(seed)
    memory = generator.integers(0, 256, (count + 3) * SWAP_PAGE_BYTES, dtype=np.uint8)
    return memory, generator.permutation(count + 3)[:count].tolist()


def round_trip(
    source: KvView, num_tokens: int, kv_format: KvFormat, first_block: int = 0
) -> tuple[KvView, list[int], list[int]]:
    """Encodes a sequence and decodes it into another pool. Returns that pool, and the blocks in the first and in it."""
    num_blocks = blocks_for(num_tokens, source.shape.block_size)
    target = view(9, source.shape)
    before, after = scattered(num_blocks, source, 1), scattered(num_blocks, target, 2)
    memory, pages = region(encoded_bytes(source.shape, num_tokens, kv_format), 3)
    encode(source, before, num_tokens, kv_format, SwapCopy(memory, pages))
    decode(target, after, num_tokens, kv_format, SwapCopy(memory, pages), first_block)
    return target, before, after


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_raw_restores_every_bit(num_tokens: int) -> None:
    source = view(0)
    target, before, after = round_trip(source, num_tokens, "raw")
    assert np.array_equal(blocks(source, before).view(np.uint32), blocks(target, after).view(np.uint32))


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("kv_format", ["raw", "int8"])
def test_a_copy_has_as_many_bytes_as_encoded_bytes_returns(num_tokens: int, kv_format: KvFormat) -> None:
    sink = Counting()
    encode(view(0), scattered(blocks_for(num_tokens, 16), view(0), 1), num_tokens, kv_format, sink)
    assert sink.num_bytes == encoded_bytes(SHAPE, num_tokens, kv_format)


@pytest.mark.parametrize("kv_format", ["raw", "int8"])
def test_decode_writes_only_the_blocks_from_the_first_block_on(kv_format: KvFormat) -> None:
    source = view(0)
    untouched = source.pool.copy()
    target, _, after = round_trip(source, 200, kv_format, first_block=3)
    assert np.array_equal(source.pool, untouched)
    expected, _, _ = round_trip(source, 200, kv_format)
    size = SHAPE.token_block_bytes // 4
    written = np.zeros(target.pool.size, dtype=bool)
    for offset in target.block_offsets(after[3:]):
        written[offset : offset + size] = True
    assert np.array_equal(target.pool[~written], view(9).pool[~written])
    assert np.array_equal(target.pool[written], expected.pool[written])


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_int8_differs_by_at_most_half_a_step_of_its_own_scale(num_tokens: int) -> None:
    source = view(0)
    source.pool[::7] *= 100.0  # some channels are large
    target, before, after = round_trip(source, num_tokens, "int8")
    original, decoded = (blocks(of, ids) for of, ids in ((source, before), (target, after)))
    count, heads = original.shape[:2]
    error = np.abs(original - decoded)
    valid = np.arange(count * 16).reshape(count, 1, 1, 16) < num_tokens
    keys, key_error = (x[:, :, 0].reshape(count, heads, 64, 16) for x in (original, error))
    for first in range(max(1, num_tokens // GROUP_TOKENS)):
        is_last = first == max(1, num_tokens // GROUP_TOKENS) - 1
        group = slice(first * 8, count if is_last else first * 8 + 8)
        step = np.where(valid[group], np.abs(keys[group]), 0).max(axis=(0, 3), keepdims=True) / 127
        assert np.all(np.where(valid[group], key_error[group], 0) <= step * 0.501)
    values, value_error = (x[:, :, 1].reshape(count, heads, 16, 64) for x in (original, error))
    step = np.abs(values).max(axis=3, keepdims=True) / 127
    assert np.all(np.where(valid.reshape(count, 1, 16, 1), value_error, 0) <= step * 0.501)


def test_slots_past_the_last_token_affect_no_scale() -> None:
    source = view(0)
    expected, _, _ = round_trip(source, 20, "int8")
    size = SHAPE.token_block_bytes // 4
    for offset in source.block_offsets(scattered(2, source, 1)[1:]):
        last = source.pool[offset : offset + size].reshape(6, 2, -1)
        last[:, 0].reshape(6, 64, 16)[:, :, 4:] = np.inf
        last[:, 1].reshape(6, 16, 64)[:, 4:] = np.nan
    target, _, after = round_trip(source, 20, "int8")
    assert np.array_equal(blocks(target, after), blocks(expected, after))


def test_zeros_stay_zeros() -> None:
    source = view(0)
    source.pool[:] = 0
    target, _, after = round_trip(source, 40, "int8")
    assert not blocks(target, after).any()


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_int8_takes_little_more_than_a_quarter_of_f32(block_size: int, head_dim: int) -> None:
    shape = KvShape(num_layers=4, num_kv_heads=3, head_dim=head_dim, block_size=block_size, dtype_bytes=4)
    for num_tokens in (96, 128, 192, 1024, 2000):
        assert encoded_bytes(shape, num_tokens, "raw") / encoded_bytes(shape, num_tokens, "int8") >= 3.7, num_tokens
