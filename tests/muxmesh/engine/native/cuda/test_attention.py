from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from muxmesh.engine.native.cuda.attention import decode_attention, prefill_attention
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan, prefill_tiles
from tests.support.kv_rows import write_kv
from tests.support.paged_kv import PagedKv, paged_kv
from tests.support.triton_interpreter import DEVICE, multiply_bf16_exactly

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SMALL_DEVICE = 4
"""SMs of a device that one or two sequences fill without a split."""


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    multiply_bf16_exactly()


def plan_for(kv: PagedKv, group: int, dtype: torch.dtype, num_sms: int = SMALL_DEVICE) -> AttentionPlan:
    return AttentionPlan.of(kv.layout, kv.layout.num_kv_heads * group, dtype.itemsize, (9, 0), num_sms)


def queries(rows: int, plan: AttentionPlan, dtype: torch.dtype) -> Tensor:
    """Random q, a view of rows that also hold something else."""
    chance = torch.Generator().manual_seed(1)
    heads, head_dim = plan.num_heads, plan.layout.head_dim
    return torch.randn(rows, heads + 2, head_dim, generator=chance).to(dtype).to(DEVICE)[:, :heads]


def decoded(kv: PagedKv, plan: AttentionPlan, q: Tensor, context_lens: Sequence[int]) -> Tensor:
    out = torch.full_like(q, math.nan)
    workspace = torch.full((plan.workspace_elements(len(q), kv.tables.shape[1]),), math.nan, device=DEVICE)
    lens = torch.tensor(context_lens, dtype=torch.int32, device=DEVICE)
    decode_attention(q, kv.pool, plan, kv.layer, kv.tables, lens, out, workspace)
    return out


def prefilled(kv: PagedKv, plan: AttentionPlan, q: Tensor, positions: Sequence[int], lengths: Sequence[int]) -> Tensor:
    out = torch.full_like(q, math.nan)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    tiles = torch.from_numpy(prefill_tiles(plan, starts, lengths, positions)).to(DEVICE)
    prefill_attention(q, kv.pool, plan, kv.layer, kv.tables, tiles, out)
    return out


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    return float((got.double().cpu() - expected).abs().max() / expected.abs().max())


def decode_error(kv: PagedKv, plan: AttentionPlan, dtype: torch.dtype) -> float:
    lengths = [len(k) for k in kv.k]
    q = queries(len(lengths), plan, dtype)
    expected = torch.stack([kv.attention(q[s], s, length - 1) for s, length in enumerate(lengths)])
    return error(decoded(kv, plan, q, lengths), expected)


def prefill_error(kv: PagedKv, plan: AttentionPlan, dtype: torch.dtype, positions: Sequence[int]) -> float:
    """Of chunks that begin at ``positions`` and reach to the end of their sequences."""
    lengths = [len(k) - position for k, position in zip(kv.k, positions, strict=True)]
    q = queries(sum(lengths), plan, dtype)
    at = [(s, position + i) for s, position in enumerate(positions) for i in range(lengths[s])]
    expected = torch.stack([kv.attention(q[row], *place) for row, place in enumerate(at)])
    return error(prefilled(kv, plan, q, positions, lengths), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256, 80, 26])
def test_every_head_size_agrees_with_float64(head_dim: int, dtype: torch.dtype) -> None:
    kv = paged_kv([5, 70], num_kv_heads=1, head_dim=head_dim, dtype=dtype)
    plan = plan_for(kv, 2, dtype)
    assert decode_error(kv, plan, dtype) < TOLERANCE[dtype]
    assert prefill_error(kv, plan, dtype, [0, 60]) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_any_number_of_heads_shares_a_kv_head(group: int) -> None:
    kv = paged_kv([40, 17])
    plan = plan_for(kv, group, torch.float32)
    assert decode_error(kv, plan, torch.float32) < 1e-5
    assert prefill_error(kv, plan, torch.float32, [3, 9]) < 1e-5


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("blocks_per_slab", [1, 2, 5])
def test_blocks_of_every_size_lie_scattered_over_slabs(block_size: int, blocks_per_slab: int) -> None:
    kv = paged_kv([97, 33], num_kv_heads=1, block_size=block_size, blocks_per_slab=blocks_per_slab)
    plan = plan_for(kv, 4, torch.float32)
    assert decode_error(kv, plan, torch.float32) < 1e-5
    assert prefill_error(kv, plan, torch.float32, [90, 0]) < 1e-5


def test_a_token_block_may_be_larger_than_a_tile() -> None:
    kv = paged_kv([70], num_kv_heads=1, head_dim=256, block_size=32)
    plan = plan_for(kv, 2, torch.float32)
    assert max(plan.decode.keys, plan.prefill.keys) < 32
    assert decode_error(kv, plan, torch.float32) < 1e-5
    assert prefill_error(kv, plan, torch.float32, [41]) < 1e-5


def test_a_pool_may_have_more_elements_than_32_bits_count() -> None:
    small = paged_kv([40], num_kv_heads=1, dtype=torch.float16)
    size, first = small.layout.token_block_elements, 2**31 // small.layout.token_block_elements + 1
    layout = replace(small.layout, slab_elements=3 * size)
    pool = torch.empty((first + 100) * size, dtype=torch.float16, device=DEVICE)  # memory only where it is written
    tables = small.tables + first
    k, v = (kv[0].half().to(DEVICE) for kv in (small.k, small.v))
    positions = torch.arange(40, dtype=torch.int32, device=DEVICE)
    write_kv(pool, layout, 1, k, v, tables[0, (positions // 16).long()], positions)
    kv = replace(small, layout=layout, pool=pool, tables=tables)
    plan = plan_for(kv, 2, torch.float16)
    assert decode_error(kv, plan, torch.float16) < 1e-3
    assert prefill_error(kv, plan, torch.float16, [30]) < 1e-3


def test_slabs_without_a_rest_are_addressed_by_one_stride() -> None:
    kv = paged_kv([50, 33], slab_rest=0)
    assert kv.layout.one_stride
    assert decode_error(kv, plan_for(kv, 2, torch.float32), torch.float32) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_split_context_is_merged(dtype: torch.dtype) -> None:
    """Contexts on both sides of every tile and split, shorter than the number of splits too."""
    tile = plan_for(paged_kv([1]), 2, dtype).decode.keys
    lengths = [1, tile - 1, tile, tile + 1, 2 * tile, 2 * tile + 1, 4 * tile - 1, 4 * tile + 1]
    kv = paged_kv(lengths, num_kv_heads=1, dtype=dtype)
    plan = plan_for(kv, 2, dtype, num_sms=48)
    assert plan.num_splits(len(lengths), kv.tables.shape[1]) > 2
    assert decode_error(kv, plan, dtype) < TOLERANCE[dtype]


def test_more_splits_are_merged_than_a_program_merges_at_a_time() -> None:
    kv = paged_kv([640], num_kv_heads=1, head_dim=256)
    plan = plan_for(kv, 2, torch.float32, num_sms=48)
    assert plan.num_splits(1, kv.tables.shape[1]) > 32
    assert decode_error(kv, plan, torch.float32) < 1e-5


@pytest.mark.parametrize("num_sms", [1, 64])
def test_padding_rows_give_zeros(num_sms: int) -> None:
    kv = paged_kv([40, 40, 40])
    plan = plan_for(kv, 2, torch.float32, num_sms)
    q = queries(3, plan, torch.float32)
    out = decoded(kv, plan, q, [0, 40, 0])
    assert (out[[0, 2]] == 0).all()
    assert error(out[1], kv.attention(q[1], 1, 39)) < 1e-5


def test_decode_reads_no_token_behind_the_context() -> None:
    kv = paged_kv([40, 70])
    plan = plan_for(kv, 2, torch.float32)
    q = queries(2, plan, torch.float32)
    out = decoded(kv, plan, q, [33, 1])
    assert error(out, torch.stack([kv.attention(q[0], 0, 32), kv.attention(q[1], 1, 0)])) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_chunks_begin_anywhere_in_their_contexts(dtype: torch.dtype) -> None:
    """Chunks of one row and of several tiles, behind prefixes that end on, before and after tiles and blocks."""
    kv = paged_kv([1, 65, 66, 64, 130, 95], num_kv_heads=1, dtype=dtype)
    plan = plan_for(kv, 4, dtype)
    assert prefill_error(kv, plan, dtype, [0, 64, 63, 48, 100, 17]) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_kv_is_converted_to_the_dtype_of_the_queries(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    kv = paged_kv([40, 70], num_kv_heads=1, dtype=kv_dtype)
    plan = plan_for(kv, 2, dtype)
    tolerance = 2 * TOLERANCE[dtype]  # rounded twice
    assert decode_error(kv, plan, dtype) < tolerance
    assert prefill_error(kv, plan, dtype, [30, 0]) < tolerance


def test_shapes_that_do_not_fit_are_refused() -> None:
    kv = paged_kv([40, 300])
    plan = plan_for(kv, 2, torch.float32, num_sms=16)
    q, lens, none = queries(2, plan, torch.float32), kv.tables[:, 0].contiguous(), torch.empty(0, device=DEVICE)
    with pytest.raises(ValueError, match=r"q is \[2, 3, 32\].*\[2, 4, 32\]"):
        decode_attention(q[:, :3], kv.pool, plan, 1, kv.tables, lens, q, none)
    with pytest.raises(ValueError, match=r"out is \[1, 4, 32\].*\[2, 4, 32\]"):
        prefill_attention(q, kv.pool, plan, 1, kv.tables, kv.tables, q[:1])
    with pytest.raises(ValueError, match=r"context_lens is torch\.int64"):
        decode_attention(q, kv.pool, plan, 1, kv.tables, lens.long(), q, none)
    with pytest.raises(ValueError, match="workspace has 0 elements"):
        decode_attention(q, kv.pool, plan, 1, kv.tables, lens, q, none)
