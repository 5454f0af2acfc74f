# mypy: disable-error-code="no-untyped-call"
import functools
from typing import Any

import numpy as np
import pytest

from muxmesh.engine.native.cpu.products import ROW_BLOCK, multiply, multiply_add, multiply_gated, multiply_panel
from muxmesh.engine.native.cpu.thread_team import Team, new_counters
from muxmesh.models.matrix_packing import PANEL, pack_gated, pack_panels, padded

ROWS = [1, 2, 3, 7, 8, 13, ROW_BLOCK - 1, ROW_BLOCK, 2 * ROW_BLOCK + 5]
COLUMNS = [1, PANEL, PANEL + 2, 100]
DEPTH = 37


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(kernel: Any, x: np.ndarray, packed: np.ndarray, columns: int, out: np.ndarray, num_threads: int = 1) -> None:
    """Runs a product with depth `DEPTH` in phase 1 of its counters."""
    counters = new_counters(2)
    arguments = (counters.ctypes.data, 1, x, packed.ctypes.data, DEPTH, columns, out)
    Team(num_threads).run(functools.partial(kernel, *arguments))
    assert not counters[0].any(), "another phase is not touched"


def output(rows: int, columns: int, panel: int = PANEL, value: float = 9.0) -> np.ndarray:
    """An output with the columns of all panels and 16 more."""
    return np.full((rows, padded(columns, panel) + 16), value, dtype=np.float32)


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 15])
def test_a_panel_is_multiplied_with_any_number_of_rows(rows: int) -> None:
    x, panel = random(rows, DEPTH + 3), random(DEPTH, PANEL, seed=1)
    out = output(rows + 1, PANEL)
    multiply_panel(x.ctypes.data, x.shape[1], panel.ctypes.data, DEPTH, out.ctypes.data, out.shape[1], rows)
    assert np.allclose(out[:rows, :PANEL], x[:, :DEPTH].astype(np.float64) @ panel, atol=1e-4)
    assert (out[rows] == 9.0).all() and (out[:, PANEL:] == 9.0).all()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_that_of_the_unpacked_matrix(rows: int, columns: int) -> None:
    x, matrix = random(rows, DEPTH + 16), random(columns, DEPTH, seed=1)
    out, whole = output(rows, columns), padded(columns, PANEL)
    run(multiply, x, pack_panels(matrix), columns, out)
    assert np.allclose(out[:, :columns], x[:, :DEPTH].astype(np.float64) @ matrix.T, atol=1e-4)
    assert (out[:, columns:whole] == 0.0).all(), "columns of the padding are zero"
    assert (out[:, whole:] == 9.0).all(), "columns after the last panel are not written"


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_residual_product_is_added(rows: int, columns: int) -> None:
    x, matrix = random(rows, DEPTH + 16), random(columns, DEPTH, seed=1)
    out, plain = random(rows, padded(columns, PANEL) + 16, seed=2), output(rows, columns)
    before = out.copy()
    run(multiply_add, x, pack_panels(matrix), columns, out)
    run(multiply, x, pack_panels(matrix), columns, plain)
    whole = padded(columns, PANEL)
    assert np.array_equal(out[:, :whole], before[:, :whole] + plain[:, :whole])
    assert np.array_equal(out[:, whole:], before[:, whole:])


@pytest.mark.parametrize("columns", [1, PANEL // 2, PANEL // 2 + 1, 60])
@pytest.mark.parametrize("rows", ROWS)
def test_a_gated_product_is_silu_of_one_product_times_the_other(rows: int, columns: int) -> None:
    x, gate, up = random(rows, DEPTH + 16), random(columns, DEPTH, seed=1), random(columns, DEPTH, seed=2)
    out, half = output(rows, columns, PANEL // 2), PANEL // 2
    run(multiply_gated, x, pack_gated(gate, up), columns, out)
    exact = x[:, :DEPTH].astype(np.float64)
    gates = exact @ gate.T
    assert np.allclose(out[:, :columns], gates / (1.0 + np.exp(-gates)) * (exact @ up.T), atol=1e-3)
    assert (out[:, columns : padded(columns, half)] == 0.0).all()
    assert (out[:, padded(columns, half) :] == 9.0).all()


KERNELS = [multiply, multiply_add, multiply_gated]


def packed_for(kernel: Any) -> np.ndarray:
    """Weights with 100 columns."""
    return (
        pack_gated(random(100, DEPTH), random(100, DEPTH, seed=1))
        if kernel is multiply_gated
        else pack_panels(random(100, DEPTH))
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(kernel: Any) -> None:
    x, packed = random(ROW_BLOCK + 15, DEPTH), packed_for(kernel)
    together = output(len(x), 100, value=1.0)
    run(kernel, x, packed, 100, together)
    for first, last in ((0, 1), (3, 5), (4, 11), (ROW_BLOCK - 2, ROW_BLOCK + 3), (ROW_BLOCK + 14, ROW_BLOCK + 15)):
        part = output(last - first, 100, value=1.0)
        run(kernel, x[first:last].copy(), packed, 100, part)
        assert np.array_equal(part[:, :100], together[first:last, :100])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_team_computes_what_one_thread_computes(kernel: Any) -> None:
    x, packed = random(2 * ROW_BLOCK + 7, DEPTH), packed_for(kernel)
    alone, shared = output(len(x), 100), output(len(x), 100)
    run(kernel, x, packed, 100, alone)
    run(kernel, x, packed, 100, shared, num_threads=4)
    assert np.array_equal(shared, alone)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_columns_of_x_after_the_depth_are_not_read(kernel: Any) -> None:
    x, packed = random(9, DEPTH + 3), packed_for(kernel)
    expected, out = output(9, 100), output(9, 100)
    run(kernel, x, packed, 100, expected)
    x[:, DEPTH:] = np.nan
    run(kernel, x, packed, 100, out)
    assert np.array_equal(out, expected)
