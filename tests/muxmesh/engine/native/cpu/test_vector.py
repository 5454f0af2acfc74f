"""The intrinsics against numpy in f64. They give the same bits with vectors of any size."""

# mypy: disable-error-code="call-arg, misc, no-untyped-call, no-untyped-def, var-annotated"
import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from muxmesh.engine.native.cpu.vector import (
    LANES,
    TILE_ROWS,
    TILE_VECTORS,
    fetch_add,
    load_acquire,
    multiply_scattered,
    multiply_tile,
    pause,
    span_exp,
    span_max,
    span_silu,
    yield_cpu,
)

SPAN = 4 * LANES
TILES = [(1, 1, 1), (TILE_ROWS, TILE_VECTORS, LANES), (4, 4, LANES), (3, 1, 16), (2, 3, 8)]
DEPTHS = [0, 1, 3, 4, 5, 18]


def compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy")(function)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def tile_kernel(rows: int, vectors: int, lanes: int, adds: int, prefetch: int) -> Any:
    """`multiply_tile` with its literal arguments."""

    @compiled
    def kernel(x, x_stride, w, k_stride, v_stride, depth, out, out_stride):
        multiply_tile(rows, vectors, lanes, adds, prefetch, x, x_stride, w, k_stride, v_stride, depth, out, out_stride)

    return kernel


def multiply(tile: tuple[int, int, int], x: np.ndarray, w: np.ndarray, depth: int, adds: int = 0) -> np.ndarray:
    """The product of a tile: x [rows, depth], w [depth, vectors * lanes]; out is 1 in a frame of 9."""
    rows, vectors, lanes = tile
    out = np.full((rows + 1, vectors * lanes + 5), 9.0, dtype=np.float32)
    out[:rows, : vectors * lanes] = 1.0
    kernel = tile_kernel(rows, vectors, lanes, adds, 0)
    kernel(x.ctypes.data, x.shape[1], w.ctypes.data, w.shape[1], lanes, depth, out.ctypes.data, out.shape[1])
    assert (out[rows:] == 9.0).all() and (out[:, vectors * lanes :] == 9.0).all(), "the kernel writes its tile only"
    return out[:rows, : vectors * lanes]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_tile_is_a_matrix_product(tile: tuple[int, int, int], depth: int) -> None:
    rows, vectors, lanes = tile
    x, w = random(rows, depth + 3), random(depth + 1, vectors * lanes + 2, seed=1)
    expected = x[:, :depth].astype(np.float64) @ w[:depth, : vectors * lanes]
    assert np.allclose(multiply(tile, x, w, depth), expected, atol=1e-5)
    assert np.allclose(multiply(tile, x, w, depth, adds=1), 1.0 + expected, atol=1e-5)


@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_a_tile_of_any_size_gives_the_bits_of_the_smallest_one(tile: tuple[int, int, int]) -> None:
    rows, vectors, lanes = tile
    x, w = random(rows, 37), random(37, vectors * lanes, seed=1)
    alone = [
        [multiply((1, 1, 1), x[row:], w[:, column:].copy(), 37)[0, 0] for column in range(3)] for row in range(rows)
    ]
    assert np.array_equal(multiply(tile, x, w, 37)[:, :3], np.array(alone)[:, : vectors * lanes])


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_sum_runs_along_the_depth_in_order(tile: tuple[int, int, int]) -> None:
    """In f32, 1e8 + 1 - 1e8 + 1 is 1 from the left; in another order it may be 2 or 0."""
    rows, vectors, lanes = tile
    x = np.tile(np.array([1e8, 1.0, -1e8, 1.0], dtype=np.float32), (rows, 2))
    w = np.ones((8, vectors * lanes), dtype=np.float32)
    assert (multiply(tile, x, w, 4) == 1.0).all()
    assert (multiply(tile, x, w, 8) == 1.0).all()


def test_vectors_of_a_tile_may_be_apart() -> None:
    x, w = random(2, 6), random(3, 6, 8, seed=1)
    out = np.empty((2, 24), dtype=np.float32)
    tile_kernel(2, 3, 8, 0, 0)(x.ctypes.data, 6, w.ctypes.data, 8, 6 * 8, 6, out.ctypes.data, 24)
    assert np.allclose(out, x @ w.transpose(1, 0, 2).reshape(6, 24), atol=1e-5)


def test_a_prefetch_past_the_end_of_the_weights_is_harmless() -> None:
    x, w = random(2, 6), random(6, 24, seed=1)
    out, expected = np.empty((2, 24), dtype=np.float32), multiply((2, 3, 8), x, w, 6)
    tile_kernel(2, 3, 8, 0, 1 << 20)(x.ctypes.data, 6, w.ctypes.data, 24, 8, 6, out.ctypes.data, 24)
    assert np.array_equal(out, expected)


@compiled
def _tile_with_runtime_prefetch(prefetch, x, w, depth, out):
    multiply_tile(2, 3, 8, 0, prefetch, x, depth, w, 24, 8, depth, out, 24)


def test_the_prefetch_distance_may_be_known_at_run_time_only() -> None:
    x, w = random(2, 6), random(6, 24, seed=1)
    out = np.empty((2, 24), dtype=np.float32)
    _tile_with_runtime_prefetch(-7, x.ctypes.data, w.ctypes.data, 6, out.ctypes.data)
    assert np.array_equal(out, multiply((2, 3, 8), x, w, 6))


@functools.cache
def scattered_kernel(rows: int, lanes: int) -> Any:
    @compiled
    def kernel(x, x_stride, w0, w1, w2, w3, k_stride, depth, out, out_stride):
        multiply_scattered(rows, lanes, 0, x, x_stride, w0, w1, w2, w3, k_stride, depth, out, out_stride)

    return kernel


@pytest.mark.parametrize("depth", [1, 4, 18])
@pytest.mark.parametrize(("rows", "lanes"), [(1, LANES), (2, 8), (4, LANES)])
def test_a_scattered_tile_reads_each_vector_at_its_own_address(rows: int, lanes: int, depth: int) -> None:
    x, w = random(rows, depth), random(7, depth, lanes + 3, seed=1)
    order = (5, 0, 6, 0)
    addresses = [w[index].ctypes.data for index in order]
    out = np.empty((rows, 4 * lanes), dtype=np.float32)
    scattered_kernel(rows, lanes)(x.ctypes.data, depth, *addresses, lanes + 3, depth, out.ctypes.data, 4 * lanes)
    together = np.concatenate([w[index, :, :lanes] for index in order], axis=1)
    assert np.allclose(out, x.astype(np.float64) @ together, atol=1e-5)
    assert np.array_equal(out, multiply((rows, 4, lanes), x, together.copy(), depth))


@compiled
def _max(address, visible):
    return span_max(SPAN, address, visible)


@compiled
def _exp(address, visible, top):
    return span_exp(SPAN, address, visible, top)


@pytest.mark.parametrize("visible", [1, LANES - 1, LANES, LANES + 1, SPAN])
def test_the_largest_visible_value_is_found_at_every_index(visible: int) -> None:
    for index in range(visible):
        values = random(SPAN) - 10.0
        values[index] = 5.0
        values[visible:] = np.nan
        assert _max(values.ctypes.data, visible) == 5.0


def test_an_invisible_span_has_the_floor_as_its_largest_value() -> None:
    values = np.full(SPAN, np.nan, dtype=np.float32)
    assert _max(values.ctypes.data, 0) == np.float32(-1e30)
    values[0] = -np.inf
    assert _max(values.ctypes.data, 1) <= np.float32(-1e30)


@pytest.mark.parametrize("visible", [0, 1, LANES - 1, LANES, LANES + 1, SPAN])
def test_exponentials_of_a_span_and_their_sum(visible: int) -> None:
    values = -np.abs(random(SPAN)) * 20.0
    values[visible:] = np.nan
    expected = np.exp(values[:visible].astype(np.float64) - 1.5)
    total = _exp(values.ctypes.data, visible, np.float32(1.5))
    assert np.allclose(values[:visible], expected, rtol=2e-6, atol=0.0)
    assert (values[visible:] == 0.0).all()
    assert total == pytest.approx(expected.sum(), rel=1e-6)


def test_exponentials_over_the_whole_range_of_scores() -> None:
    for start in np.arange(-87.0, 0.0, SPAN / 4, dtype=np.float32):
        values = np.minimum(start + np.arange(SPAN, dtype=np.float32) / 4, 0.0).astype(np.float32)
        expected = np.exp(values.astype(np.float64))
        _exp(values.ctypes.data, SPAN, np.float32(0.0))
        assert np.allclose(values, expected, rtol=1e-5, atol=0.0)


def test_the_exponential_of_zero_is_one_and_that_of_a_low_score_is_next_to_nothing() -> None:
    values = np.full(SPAN, -1e30, dtype=np.float32)
    values[3] = 7.0
    total = _exp(values.ctypes.data, SPAN, np.float32(7.0))
    assert values[3] == 1.0 and total == 1.0
    assert (np.delete(values, 3) < 1e-37).all()


@compiled
def _silu(gate, up, out):
    span_silu(24, gate, up, out)


def test_the_gated_activation_is_silu_times_up() -> None:
    gate, up, out = random(24) * 20.0, random(24, seed=1), np.empty(24, dtype=np.float32)
    _silu(gate.ctypes.data, up.ctypes.data, out.ctypes.data)
    exact = gate.astype(np.float64)
    assert np.allclose(out, exact / (1.0 + np.exp(-exact)) * up, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("gate", "expected"), [(1e4, 1e4), (200.0, 200.0), (0.0, 0.0), (-200.0, 0.0), (-1e4, 0.0)])
def test_the_gated_activation_does_not_overflow(gate: float, expected: float) -> None:
    gates, up, out = (np.full(24, value, dtype=np.float32) for value in (gate, 1.0, np.nan))
    _silu(gates.ctypes.data, up.ctypes.data, out.ctypes.data)
    assert np.allclose(out, expected, rtol=1e-6, atol=1e-30)


def test_the_gated_activation_may_replace_its_gate() -> None:
    gate, up, out = random(24), random(24, seed=1), np.empty(24, dtype=np.float32)
    _silu(gate.ctypes.data, up.ctypes.data, out.ctypes.data)
    _silu(gate.ctypes.data, up.ctypes.data, gate.ctypes.data)
    assert np.array_equal(gate, out)


@compiled
def _atomics(address):
    first = fetch_add(address, 5)
    second = fetch_add(address, -2)
    pause()
    yield_cpu()
    return first, second, load_acquire(address)


def test_an_atomic_add_returns_the_previous_value() -> None:
    counter = np.array([40, 7], dtype=np.int64)
    assert _atomics(counter.ctypes.data) == (40, 45, 43)
    assert counter.tolist() == [43, 7]
