"""The addresses of token blocks in a pool."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.device.kv_view import KvView
from muxmesh.models.model_spec import KvShape

SHAPE = KvShape(num_layers=2, num_kv_heads=3, head_dim=16, block_size=8, dtype_bytes=4)
BLOCK = SHAPE.token_block_bytes


def view(slab_bytes: int, num_slabs: int = 4, shape: KvShape = SHAPE) -> KvView:
    return KvView(shape, slab_bytes, np.zeros(num_slabs * slab_bytes // 4, dtype=np.float32))


def test_a_slab_that_is_a_multiple_of_the_token_block_gives_one_stride_over_the_pool() -> None:
    of = view(4 * BLOCK)
    assert of.blocks_per_slab == 4
    assert of.block_offsets(range(16)).tolist() == [index * BLOCK // 4 for index in range(16)]


def test_the_rest_of_a_slab_is_left_out() -> None:
    of = view(4 * BLOCK + 256)
    assert of.blocks_per_slab == 4
    slab = (4 * BLOCK + 256) // 4
    assert of.block_offsets([0, 3, 4, 9]).tolist() == [0, 3 * BLOCK // 4, slab, 2 * slab + BLOCK // 4]


def test_offsets_are_in_the_order_of_the_ids() -> None:
    offsets = view(4 * BLOCK).block_offsets((5, 1, 1))
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [5 * BLOCK // 4, BLOCK // 4, BLOCK // 4]
    assert view(4 * BLOCK).block_offsets(()).tolist() == []


def test_offsets_past_two_giga_elements_do_not_overflow() -> None:
    huge = KvView(SHAPE, 4 * BLOCK, np.zeros(1, dtype=np.float32))
    assert huge.block_offsets([2_000_000]).tolist() == [2_000_000 * BLOCK // 4]


@given(
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 26, 64]),
    block_size=st.sampled_from([8, 16]),
    blocks_per_slab=st.integers(1, 5),
    rest_elements=st.integers(0, 50),
)
def test_token_blocks_lie_within_slabs_and_do_not_overlap(
    num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, blocks_per_slab: int, rest_elements: int
) -> None:
    shape = KvShape(num_layers, num_kv_heads, head_dim, block_size, 4)
    slab_bytes = blocks_per_slab * shape.token_block_bytes + 4 * rest_elements % shape.token_block_bytes
    of = view(slab_bytes, 3, shape)
    size, slab = shape.token_block_bytes // 4, slab_bytes // 4
    offsets = of.block_offsets(range(3 * of.blocks_per_slab))
    assert np.all(np.diff(offsets) >= size)
    assert np.all(offsets // slab == (offsets + size - 1) // slab), "no block crosses the end of a slab"
    assert offsets[-1] + size <= of.pool.size


@pytest.mark.parametrize("slab_bytes", [4 * BLOCK, 4 * BLOCK + 256])
def test_models_of_different_shapes_find_their_blocks_in_their_own_slabs(slab_bytes: int) -> None:
    other_shape = KvShape(num_layers=1, num_kv_heads=1, head_dim=64, block_size=16, dtype_bytes=4)
    first = view(slab_bytes)
    second = KvView(other_shape, slab_bytes, first.pool)
    for offset in first.block_offsets(range(first.blocks_per_slab)):  # slab 0
        first.pool[offset : offset + BLOCK // 4] = 1.0
    size = other_shape.token_block_bytes // 4
    in_slab_1 = range(second.blocks_per_slab, 2 * second.blocks_per_slab)
    for offset in second.block_offsets(in_slab_1):
        assert not first.pool[offset : offset + size].any()
        first.pool[offset : offset + size] = 2.0
    assert first.pool[: first.blocks_per_slab * BLOCK // 4].min() == 1.0
