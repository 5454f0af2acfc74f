import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.step_layout import StepLayout, lay_out
from muxmesh.engine.step import Chunk, PromptScoring, SampleSpec, Step
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.types import Sampling
from tests.support.tiny import tiny_view

BLOCK_SIZE = 8
SAMPLE = SampleSpec(Sampling(temperature=0.0), 0)


@pytest.fixture(scope="module")
def view() -> KvView:
    return tiny_view(SIM_SPEC, BLOCK_SIZE)


def prompt(tokens: int, block_ids: tuple[int, ...], start: int = 0, scored: int | None = None) -> Chunk:
    """A chunk of a prompt: not sampled; ``scored`` next tokens are known."""
    scoring = None if scored is None else PromptScoring(tuple(range(scored)), 0)
    return Chunk(1, start, tuple(range(10, 10 + tokens)), block_ids, None, scoring)


def decode(position: int, block_ids: tuple[int, ...]) -> Chunk:
    return Chunk(2, position, (77,), block_ids, SAMPLE)


def test_rows_are_the_tokens_of_the_chunks_in_order(view: KvView) -> None:
    layout = lay_out(Step((prompt(3, (4,)), decode(9, (2, 5)), prompt(2, (6,), start=4))), view)
    assert layout.token_ids.tolist() == [10, 11, 12, 77, 10, 11]
    assert layout.positions.tolist() == [0, 1, 2, 9, 4, 5]
    assert (layout.starts, layout.lengths) == ([0, 3, 4], [3, 1, 2])


def test_each_row_stores_its_kv_in_the_block_of_its_position(view: KvView) -> None:
    layout = lay_out(Step((prompt(10, (3, 1, 6), start=7),)), view)
    offsets = view.block_offsets((3, 1, 6))
    assert layout.row_blocks.tolist() == [offsets[0], *[offsets[1]] * 8, offsets[2]]


def test_tables_are_padded_with_zeros(view: KvView) -> None:
    layout = lay_out(Step((decode(17, (7, 4, 2)), decode(3, (5,)))), view)
    assert layout.tables.tolist() == [view.block_offsets((7, 4, 2)).tolist(), [view.block_offsets((5,))[0], 0, 0]]


@pytest.mark.parametrize(
    ("chunks", "logit_rows"),
    [
        ((prompt(4, (0,)),), []),
        ((decode(0, (0,)),), [0]),
        ((Chunk(1, 0, (1, 2, 3), (0,), SAMPLE),), [2]),
        ((prompt(4, (0,)), decode(5, (1,)), prompt(2, (2,)), decode(1, (3,))), [4, 7]),
        ((prompt(3, (0,), scored=2), decode(5, (1,))), [0, 1, 2, 3]),
        ((decode(5, (1,)), prompt(3, (0,), scored=3)), [0, 1, 2, 3]),
    ],
    ids=["prompt", "decode", "last chunk of a prompt", "mixed", "scored prompt first", "scored prompt last"],
)
def test_logits_are_computed_for_sampled_and_scored_rows_only(
    view: KvView, chunks: tuple[Chunk, ...], logit_rows: list[int]
) -> None:
    layout = lay_out(Step(chunks), view)
    assert layout.logit_rows.tolist() == logit_rows
    assert layout.logit_rows.dtype == np.int64


def test_blocks_past_the_last_row_are_in_the_table_but_store_nothing(view: KvView) -> None:
    layout = lay_out(Step((prompt(2, (3, 9, 8)),)), view)
    assert layout.tables.tolist() == [view.block_offsets((3, 9, 8)).tolist()]
    assert set(layout.row_blocks.tolist()) == {view.block_offsets((3,))[0]}


def check_rows(step: Step, layout: StepLayout, view: KvView) -> None:
    """Compares the layout with the definition, row by row."""
    row = 0
    for index, chunk in enumerate(step.chunks):
        assert (layout.starts[index], layout.lengths[index]) == (row, len(chunk.token_ids))
        for token_offset, token in enumerate(chunk.token_ids):
            position = chunk.start + token_offset
            block = view.block_offsets([chunk.block_ids[position // BLOCK_SIZE]])[0]
            assert (layout.token_ids[row], layout.positions[row], layout.row_blocks[row]) == (token, position, block)
            row += 1
    assert row == len(layout.token_ids) == len(layout.positions) == len(layout.row_blocks) == step.num_tokens


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12), st.booleans()), min_size=1, max_size=5))
def test_any_step_has_one_row_per_token(view: KvView, kinds: list[tuple[int, int, bool]]) -> None:
    chunks = tuple(
        Chunk(job, start, tuple(range(count)), tuple(range(job, job + 4)), SAMPLE if sampled else None)
        for job, (start, count, sampled) in enumerate(kinds)
    )
    layout = lay_out(Step(chunks), view)
    check_rows(Step(chunks), layout, view)
    assert len(layout.logit_rows) == sum(sampled for _, _, sampled in kinds)
