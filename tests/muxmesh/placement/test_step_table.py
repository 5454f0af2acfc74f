"""Step tables: MuxServe's lookup, interpolation, and smoothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxmesh.placement.step_table import NO_VALUE, StepTable, table_from_cells
from muxmesh.types import Role

SHARES, BATCHES, LENGTHS = (50, 100), (1, 2, 4), (32, 64)


def table(prefill: list[list[list[float]]] | None = None) -> StepTable:
    """Seconds are batch * length / share, in the decode grid a tenth of it."""
    cells = [[[batch * length / share for length in LENGTHS] for batch in BATCHES] for share in SHARES]
    decode = (np.array(cells) / 10).tolist()
    return table_from_cells(SHARES, BATCHES, LENGTHS, prefill or cells, decode)


def test_the_next_larger_batch_and_length_are_read_without_interpolation() -> None:
    assert table().next_larger(Role.PREFILL, 50, 3, 33) == 4 * 64 / 50
    assert table().next_larger(Role.DECODE, 100, 1, 32) == pytest.approx(3.2 / 100)


def test_a_cell_past_the_table_or_without_a_value_has_no_time() -> None:
    cells = table().prefill.tolist()
    cells[0][2][1] = -1
    assert table().next_larger(Role.PREFILL, 50, 5, 32) == NO_VALUE
    assert table().next_larger(Role.PREFILL, 50, 1, 65) == NO_VALUE
    assert table(cells).next_larger(Role.PREFILL, 50, 4, 64) == NO_VALUE
    assert np.isnan(table(cells).interpolated(Role.PREFILL, 50, 4, 64))


def test_times_between_cells_are_on_the_line_between_them() -> None:
    assert table().interpolated(Role.PREFILL, 100, 3, 48) == pytest.approx(3 * 48 / 100)
    assert table().interpolated(Role.PREFILL, 75, 1, 32) == pytest.approx((0.64 + 0.32) / 2)


def test_outside_of_the_table_time_grows_with_batch_and_length_and_as_the_share_shrinks() -> None:
    assert table().interpolated(Role.PREFILL, 100, 8, 32) == pytest.approx(8 * 32 / 100)
    assert table().interpolated(Role.PREFILL, 100, 0.5, 1) == pytest.approx(0.32)
    assert table().interpolated(Role.PREFILL, 25, 1, 32) == pytest.approx(32 / 25)


def test_a_stalled_measurement_does_not_move_its_neighbours() -> None:
    cells = table().prefill.tolist()
    cells[1][1][0] *= 10
    smoothed = table(cells).smoothed().prefill
    assert smoothed[1, 0, 0] == pytest.approx(0.32, rel=0.01)
    assert smoothed[1, 2, 1] == pytest.approx(2.56, rel=0.01)
    assert smoothed[1, 1, 0] < 1.3


def test_gaps_are_filled_along_batches() -> None:
    cells = table().prefill.tolist()
    cells[0][2] = [-1, -1]
    assert table(cells).smoothed().prefill[0, 2] == pytest.approx([4 * 32 / 50, 4 * 64 / 50])


grids = st.lists(st.floats(0.001, 10), min_size=12, max_size=12).map(
    lambda cells: np.array(cells).reshape(2, 3, 2).tolist()
)


@settings(max_examples=20, deadline=None)
@given(grids)
def test_smoothed_tables_are_monotone_in_share_batch_and_length(cells: list[list[list[float]]]) -> None:
    smoothed = table(cells).smoothed().prefill
    assert np.all(np.diff(smoothed, axis=0) <= 0)
    assert np.all(np.diff(smoothed, axis=1) >= 0)
    assert np.all(np.diff(smoothed, axis=2) >= 0)


def test_smoothing_leaves_a_monotone_table_as_it_is() -> None:
    np.testing.assert_allclose(table().smoothed().prefill, table().prefill)


def test_invalid_tables_are_refused_by_the_name_of_the_axis_or_role() -> None:
    cells = table().prefill.tolist()
    with pytest.raises(ValueError, match=r"shares: are .*; positive numbers in ascending order"):
        table_from_cells((100, 50), BATCHES, LENGTHS, cells, cells)
    with pytest.raises(ValueError, match=r"shares: .*; percent from 1 to 100"):
        table_from_cells((50, 101), BATCHES, LENGTHS, cells, cells)
    with pytest.raises(ValueError, match=r"decode: has the shape .*\(2, 3, 2\) is needed"):
        table_from_cells(SHARES, BATCHES, LENGTHS, cells, cells[:1])
    with pytest.raises(ValueError, match="prefill: must have a list for each share"):
        table_from_cells(SHARES, BATCHES, LENGTHS, [[[1.0], [1.0, 2.0]]], cells)
    cells[0][0][0] = 0.0
    with pytest.raises(ValueError, match="prefill: has a time that is not positive"):
        table_from_cells(SHARES, BATCHES, LENGTHS, cells, cells)
    empty = [[[-1.0] * 2] * 3] * 2
    with pytest.raises(ValueError, match="no values at all"):
        table(empty).smoothed()
