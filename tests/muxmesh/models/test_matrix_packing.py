import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.models.matrix_packing import PANEL, pack_gated, pack_panels, padded

DEPTH = 5


def random_matrix(outputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, DEPTH)).astype(np.float32)


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_padding_reaches_the_next_multiple_and_no_further(count: int, multiple: int) -> None:
    result = padded(count, multiple)
    assert result % multiple == 0
    assert count <= result < count + multiple


@pytest.mark.parametrize("outputs", [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 4])
def test_a_panel_holds_its_outputs_along_the_depth_and_zeros_after_the_last(outputs: int) -> None:
    matrix = random_matrix(outputs)
    packed = pack_panels(matrix)
    assert packed.shape == (padded(outputs, PANEL) // PANEL, DEPTH, PANEL)
    columns = packed.transpose(0, 2, 1).reshape(-1, DEPTH)
    assert np.array_equal(columns[:outputs], matrix)
    assert not columns[outputs:].any()


@pytest.mark.parametrize("outputs", [1, PANEL // 2 - 1, PANEL // 2, PANEL // 2 + 1, 60])
def test_a_gated_panel_holds_the_same_outputs_of_both_matrices(outputs: int) -> None:
    gate, up = random_matrix(outputs, 1), random_matrix(outputs, 2)
    packed = pack_gated(gate, up)
    half = PANEL // 2
    assert packed.shape == (padded(outputs, half) // half, DEPTH, PANEL)
    for matrix, part in ((gate, packed[:, :, :half]), (up, packed[:, :, half:])):
        columns = part.transpose(0, 2, 1).reshape(-1, DEPTH)
        assert np.array_equal(columns[:outputs], matrix)
        assert not columns[outputs:].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_packed_matrices_are_contiguous_f32(dtype: type) -> None:
    matrix: np.ndarray = random_matrix(PANEL + 3).astype(dtype)
    for packed in (pack_panels(matrix), pack_gated(matrix, matrix)):
        assert packed.dtype == np.float32 and packed.flags.c_contiguous


def test_a_product_with_panels_is_the_product_with_the_matrix() -> None:
    matrix, x = random_matrix(100), random_matrix(7, 3)
    product = np.concatenate([x @ panel for panel in pack_panels(matrix)], axis=1)[:, :100]
    assert np.allclose(product, x @ matrix.T, atol=1e-6)
