# mypy: disable-error-code="no-untyped-call"
import functools
from typing import Any

import numpy as np
import pytest

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.cpu.forward import Shape
from muxmesh.engine.native.cpu.rows import embed, normalize, normalize_row, rotate_and_store
from muxmesh.engine.native.cpu.thread_team import Team, new_counters
from muxmesh.engine.native.rope import rope_tables
from muxmesh.models.matrix_packing import pack_panels
from muxmesh.models.model_spec import SIM_SPEC, KvShape

HIDDEN, EPS = 21, 1e-5
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 16, 8
SHAPE = Shape(2, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, 96, 259, BLOCK_SIZE, EPS)
COLUMNS = (HEADS + 2 * KV_HEADS) * HEAD_DIM
NONE = np.empty(0, dtype=np.float32)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(kernel: Any, *arguments: Any, num_threads: int = 1) -> None:
    """Runs a kernel as the only phase of its counters."""
    counters = new_counters(1)
    Team(num_threads).run(functools.partial(kernel, counters.ctypes.data, 0, *arguments))


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 30])
@pytest.mark.parametrize("packed", [True, False])
def test_embeddings_are_copied_from_the_matrix_or_from_its_panels(packed: bool, num_tokens: int) -> None:
    matrix = random(100, HIDDEN)
    token_ids = np.random.default_rng(1).integers(0, 100, num_tokens)
    table = pack_panels(matrix).reshape(-1) if packed else matrix.reshape(-1)
    out = np.full((num_tokens, HIDDEN + 11), 9.0, dtype=np.float32)
    run(embed, token_ids, table, packed, HIDDEN, out)
    assert np.array_equal(out[:, :HIDDEN], matrix[token_ids])
    assert (out[:, HIDDEN:] == 0.0).all()


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    exact = x[..., : weight.size].astype(np.float64)
    normed: np.ndarray = exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + EPS) * weight
    return normed


def test_a_row_is_normalized_over_the_length_of_the_weight() -> None:
    row, weight = random(30), random(HIDDEN, seed=1)
    out = np.full(30, 9.0, dtype=np.float32)
    normalize_row(row, weight, EPS, out)
    assert np.allclose(out[:HIDDEN], rms_norm(row, weight), atol=1e-6)
    assert (out[HIDDEN:] == 9.0).all()


def test_a_row_may_be_normalized_in_place() -> None:
    row, weight = random(HIDDEN), random(HIDDEN, seed=1)
    out = np.empty_like(row)
    normalize_row(row, weight, EPS, out)
    normalize_row(row, weight, EPS, row)
    assert np.array_equal(row, out)


def test_a_row_of_zeros_stays_zero() -> None:
    row = np.zeros(HIDDEN, dtype=np.float32)
    normalize_row(row, random(HIDDEN), EPS, row)
    assert not row.any()


@pytest.mark.parametrize("chosen", [[3], [5, 0, 5], list(range(20)), []], ids=["one", "repeated", "all", "none"])
def test_the_chosen_rows_are_normalized_in_their_order(chosen: list[int]) -> None:
    x, weight = random(20, HIDDEN + 4), random(HIDDEN, seed=1)
    out = np.full((20, HIDDEN + 7), 9.0, dtype=np.float32)
    run(normalize, x, weight, EPS, np.array(chosen, dtype=np.int64), out)
    assert np.allclose(out[: len(chosen), :HIDDEN], rms_norm(x[chosen], weight), atol=1e-6)
    assert (out[len(chosen) :] == 9.0).all() and (out[:, HIDDEN:] == 9.0).all()


class Pool:
    """A pool of NaN with one token block per slab, in which layer 1 is tested."""

    def __init__(self) -> None:
        shape = KvShape(2, KV_HEADS, HEAD_DIM, BLOCK_SIZE, 4)
        size = 6 * shape.token_block_bytes // 4
        self.view = KvView(shape, shape.token_block_bytes, np.full(size, np.nan, dtype=np.float32))

    def kv(self, block_id: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V at a position, each [kv heads, head_dim]."""
        block = self.view.pool.reshape(6, 2, KV_HEADS, 2, BLOCK_SIZE * HEAD_DIM)[block_id, 1]
        k = block[:, 0].reshape(KV_HEADS, HEAD_DIM, BLOCK_SIZE)[:, :, position % BLOCK_SIZE]
        v = block[:, 1].reshape(KV_HEADS, BLOCK_SIZE, HEAD_DIM)[:, position % BLOCK_SIZE]
        return k, v


COS, SIN = rope_tables(SIM_SPEC, 64)
COS, SIN = COS[:, : HEAD_DIM // 2].copy(), SIN[:, : HEAD_DIM // 2].copy()


def rotated(heads: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE as a complex product: heads [rows, heads, head_dim], whose halves are real and imaginary parts."""
    real, imaginary = np.split(heads.astype(np.float64), 2, axis=-1)
    turned = (real + 1j * imaginary) * (COS[positions] + 1j * SIN[positions])[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def run_rotation(
    pool: Pool,
    qkv: np.ndarray,
    positions: np.ndarray,
    block_ids: list[int],
    bias: np.ndarray = NONE,
    q_norm: np.ndarray = NONE,
    k_norm: np.ndarray = NONE,
    num_threads: int = 1,
) -> None:
    row_blocks = pool.view.block_offsets(block_ids)
    arguments = (SHAPE, pool.view.pool, 1, qkv, bias, q_norm, k_norm, COS, SIN, positions, row_blocks)
    run(rotate_and_store, *arguments, num_threads=num_threads)


POSITIONS = np.array([0, 7, 8, 33, 1, 2, 3, 4, 5, 6, 63])
BLOCK_IDS = [3, 3, 0, 5, 1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_queries_and_keys_are_rotated_and_kv_is_stored(has_bias: bool, has_norm: bool) -> None:
    qkv = random(len(POSITIONS), COLUMNS + 5)
    bias = random(COLUMNS, seed=1) if has_bias else NONE
    q_norm, k_norm = (random(HEAD_DIM, seed=2), random(HEAD_DIM, seed=3)) if has_norm else (NONE, NONE)
    biased = qkv[:, :COLUMNS].astype(np.float64) + (bias if has_bias else 0.0)
    heads = biased.reshape(len(POSITIONS), -1, HEAD_DIM)
    q, k, v = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
    if has_norm:
        q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)
    q, k = rotated(q, POSITIONS), rotated(k, POSITIONS)
    pool = Pool()
    run_rotation(pool, qkv, POSITIONS, BLOCK_IDS, bias, q_norm, k_norm)
    assert np.allclose(qkv[:, : HEADS * HEAD_DIM], q.reshape(len(POSITIONS), -1), atol=1e-5)
    for row, (position, block_id) in enumerate(zip(POSITIONS, BLOCK_IDS, strict=True)):
        stored_k, stored_v = pool.kv(block_id, position)
        assert np.allclose(stored_k, k[row], atol=1e-5)
        assert np.allclose(stored_v, v[row], atol=1e-6)


def test_only_the_kv_of_the_rows_is_written() -> None:
    pool = Pool()
    run_rotation(pool, random(len(POSITIONS), COLUMNS), POSITIONS, BLOCK_IDS)
    assert (~np.isnan(pool.view.pool)).sum() == len(POSITIONS) * 2 * KV_HEADS * HEAD_DIM
    layers = pool.view.pool.reshape(6, 2, -1)
    assert np.isnan(layers[:, 0]).all(), "layer 0 is not written"


def test_columns_after_the_heads_are_not_changed() -> None:
    qkv = random(3, COLUMNS + 5)
    before = qkv[:, COLUMNS:].copy()
    run_rotation(Pool(), qkv, POSITIONS[:3], BLOCK_IDS[:3], bias=random(COLUMNS, seed=1))
    assert np.array_equal(qkv[:, COLUMNS:], before)


def test_a_row_does_not_depend_on_the_other_rows_nor_on_the_threads() -> None:
    qkv, norm = random(len(POSITIONS), COLUMNS), random(HEAD_DIM, seed=2)
    together, together_pool = qkv.copy(), Pool()
    run_rotation(together_pool, together, POSITIONS, BLOCK_IDS, q_norm=norm, k_norm=norm, num_threads=3)
    alone_pool = Pool()
    for row, block_id in enumerate(BLOCK_IDS):
        alone = qkv[row : row + 1].copy()
        run_rotation(alone_pool, alone, POSITIONS[row : row + 1], [block_id], q_norm=norm, k_norm=norm)
        assert np.array_equal(alone[0], together[row])
    assert np.array_equal(alone_pool.view.pool, together_pool.view.pool, equal_nan=True)


def test_products_of_rotated_heads_depend_on_the_distance_only() -> None:
    """The property that defines RoPE (Su et al., 2021, eq. 11)."""
    qkv = np.tile(random(1, COLUMNS), (4, 1))
    pool, positions = Pool(), np.array([3, 5, 20, 22])
    run_rotation(pool, qkv, positions, [0, 0, 1, 1])
    q = qkv[:, :HEAD_DIM].astype(np.float64)
    near, far = q[1] @ pool.kv(0, 3)[0][0], q[3] @ pool.kv(1, 20)[0][0]
    assert near == pytest.approx(far, abs=1e-4)
    assert abs(near - q[0] @ pool.kv(0, 3)[0][0]) > 1e-2, "another distance gives another product"
