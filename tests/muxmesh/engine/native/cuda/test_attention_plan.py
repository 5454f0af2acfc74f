from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.device.kv_view import KvGeometry
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan, num_splits, prefill_tiles
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.models.model_spec import HEAD_DIMS, KvShape


def plan_for(num_heads: int = 32, num_kv_heads: int = 8, head_dim: int = 128, num_sms: int = 132) -> AttentionPlan:
    shape = KvShape(16, num_kv_heads, head_dim, 16, 2)
    return AttentionPlan.of(KvLayout.of(KvGeometry(shape, shape.token_block_bytes)), num_heads, 2, (9, 0), num_sms)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000)), max_size=6), st.sampled_from([1, 3, 8, 64]))
def test_tiles_cover_each_row_of_each_chunk_once(chunks: list[tuple[int, int]], group: int) -> None:
    plan = plan_for(2 * group, 2)
    lengths, positions = [chunk[0] for chunk in chunks], [chunk[1] for chunk in chunks]
    starts = [10 + sum(lengths[:index]) for index in range(len(chunks))]
    tiles = prefill_tiles(plan, starts, lengths, positions)
    rows = sorted(
        (first + i, sequence, position + i) for first, count, sequence, position in tiles.tolist() for i in range(count)
    )
    assert rows == [
        (start + i, sequence, position + i)
        for sequence, (start, length, position) in enumerate(zip(starts, lengths, positions, strict=True))
        for i in range(length)
    ]
    assert all(1 <= count <= plan.rows_per_tile for count in tiles[:, 1])
    assert plan.rows_per_tile * group <= plan.prefill.queries


def test_the_longest_contexts_come_first() -> None:
    tiles = prefill_tiles(plan_for(), [0, 40], [40, 1], [0, 9000])
    ends = (tiles[:, 1] + tiles[:, 3]).tolist()
    assert ends == sorted(ends, reverse=True) and ends[0] == 9001


@pytest.mark.parametrize("num_programs", [8, 16, 64])
def test_a_small_batch_is_split_until_it_fills_the_device(num_programs: int) -> None:
    splits = num_splits(num_programs, max_tiles=128, tile_tokens=64, num_slots=396)
    assert 0.8 * 396 <= num_programs * splits <= 396


def test_a_batch_that_fills_the_device_many_times_is_not_split() -> None:
    assert num_splits(4096, max_tiles=128, tile_tokens=64, num_slots=396) == 1


def test_a_context_is_not_split_finer_than_tiles() -> None:
    assert num_splits(1, max_tiles=4, tile_tokens=64, num_slots=396) == 4
    assert num_splits(1, max_tiles=1, tile_tokens=64, num_slots=396) == 1


@given(st.integers(1, 300), st.integers(1, 4000), st.integers(1, 300), st.integers(1, 4000), st.sampled_from([2, 132]))
def test_a_workspace_serves_every_smaller_batch(seqs: int, blocks: int, most_seqs: int, most: int, sms: int) -> None:
    plan = plan_for(num_sms=sms)
    seqs, blocks = min(seqs, most_seqs), min(blocks, most)
    used = seqs * plan.num_heads * plan.num_splits(seqs, blocks) * (plan.layout.head_dim + 1)
    assert used <= plan.workspace_elements(most_seqs, most)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_every_head_size_that_models_have_has_its_tiles(element_bytes: int, capability: tuple[int, int]) -> None:
    for head_dim in HEAD_DIMS:
        layout = KvLayout(head_dim, 16, 2, 1, 1, 1)
        plan = AttentionPlan.of(layout, 2 * 7, element_bytes, capability, 132)
        assert plan.decode.queries >= 16 and plan.prefill.queries >= 16


def test_a_larger_group_has_larger_tiles() -> None:
    assert plan_for(71 * 2, 2).decode.queries == 128
    assert plan_for(256, 1).rows_per_tile == 1


def test_models_that_the_kernels_do_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="32 heads do not share 5 KV heads evenly"):
        plan_for(32, 5)
    with pytest.raises(ValueError, match="the head size is 258, attention takes at most 256"):
        plan_for(head_dim=258)
