import itertools

import pytest

from muxmesh.placement.measured_cells import Cell
from muxmesh.profiler.grid import Grid, ModelLimits, cells_of, default_batches, default_lengths, default_shares
from muxmesh.types import Role

LARGE = ModelLimits("m", max_num_seqs=16, max_model_len=8192, max_kv_tokens=1 << 20)
GRID = Grid((25, 50, 75, 100), (1, 2, 4, 8, 16), (64, 256, 1024), max_prefill_tokens=2048)


def test_each_cell_is_measured_once_the_corners_first() -> None:
    rounds = cells_of(GRID, [LARGE])
    cells = [cell for one in rounds for cell in one]
    assert len(set(cells)) == len(cells)
    decodes = {cell for cell in cells if cell.role == Role.DECODE}
    assert len(decodes) == 4 * 5 * 3
    corners = {(cell.share, cell.batch, cell.length) for cell in rounds[0] if cell.role == Role.DECODE}
    assert corners == {(share, batch, length) for share in (25, 100) for batch in (1, 16) for length in (64, 1024)}


def test_the_cells_of_one_round_that_need_the_same_process_follow_one_another() -> None:
    two = [LARGE, ModelLimits("n", 4, 512, 1 << 20)]
    for cells in cells_of(GRID, two):
        processes = [(cell.model, cell.share) for cell in cells]
        changes = sum(one != other for one, other in itertools.pairwise(processes))
        assert changes == len(set(processes)) - 1


@pytest.mark.parametrize(
    ("limits", "largest_batch", "longest"),
    [
        (ModelLimits("m", 4, 8192, 1 << 20), 4, 1024),
        (ModelLimits("m", 16, 1000, 1 << 20), 16, 256),
        (ModelLimits("m", 16, 8192, 2 * (1024 + 96)), 2, 1024),
    ],
)
def test_what_exceeds_a_model_or_the_pool_is_left_out(limits: ModelLimits, largest_batch: int, longest: int) -> None:
    cells = [cell for one in cells_of(GRID, [limits]) for cell in one]
    assert max(cell.length for cell in cells) == longest
    assert max(cell.batch for cell in cells if cell.length == longest) == largest_batch


def test_a_long_prefill_is_left_out_and_a_decode_of_the_same_size_is_not() -> None:
    cells = {cell for one in cells_of(GRID, [LARGE]) for cell in one}
    assert Cell("m", Role.PREFILL, 100, 2, 1024) in cells
    assert Cell("m", Role.PREFILL, 100, 4, 1024) not in cells
    assert Cell("m", Role.DECODE, 100, 4, 1024) in cells


def test_default_axes_follow_the_largest_model() -> None:
    small = ModelLimits("s", 3, 100, 1 << 20)
    assert default_batches([small]) == (1, 2, 3)
    assert default_batches([LARGE, small]) == (1, 2, 4, 8, 16)
    assert default_lengths([LARGE, small]) == (64, 256, 1024, 4096)
    assert default_lengths([small]) == (64,)
    assert default_lengths([ModelLimits("tiny", 1, 33, 1 << 20)]) == (32,)
    assert default_shares(True) == (25, 50, 75, 100)
    assert default_shares(False) == (100,)
