"""Attention on a CPU: numba kernels that read and write the KV pool in place. Knows no torch.

The pool is one f32 array; a sequence is a row of token block offsets into it (see `KvView`). No KV is ever
gathered: a kernel walks the blocks of a sequence where they lie, with the online softmax of FlashAttention
(Dao et al., 2022, Alg. 1) over one KV block at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from muxmesh.engine.kv_view import KvView
from muxmesh.engine.step import Step

ROWS_PER_TILE = 8
"""Query tokens of one sequence that share each read of a KV block."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the rows of a step belong; rows are the tokens of all chunks, one chunk after the other.

    positions [rows]: place of each token in its sequence. row_blocks [rows]: offset of the token block that takes
    its KV. tables [chunks, most blocks]: offsets of each sequence's token blocks. tiles [tiles, 3]: first row,
    rows, chunk. last_rows: the last row of each chunk that draws.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    row_blocks: np.ndarray
    tables: np.ndarray
    tiles: np.ndarray
    last_rows: np.ndarray


def lay_out(step: Step, view: KvView) -> StepLayout:
    """Arranges the chunks of a step for the kernels."""
    block_size = view.shape.block_size
    lengths = [len(chunk.token_ids) for chunk in step.chunks]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tables = np.zeros((len(step.chunks), max(len(chunk.block_ids) for chunk in step.chunks)), dtype=np.int64)
    positions = np.empty(ends[-1], dtype=np.int64)
    row_blocks = np.empty(ends[-1], dtype=np.int64)
    for index, chunk in enumerate(step.chunks):
        rows = slice(starts[index], ends[index])
        tables[index, : len(chunk.block_ids)] = view.block_offsets(chunk.block_ids)
        positions[rows] = np.arange(chunk.start, chunk.start + lengths[index])
        row_blocks[rows] = tables[index][positions[rows] // block_size]
    return StepLayout(
        token_ids=np.array([token for chunk in step.chunks for token in chunk.token_ids], dtype=np.int64),
        positions=positions,
        row_blocks=row_blocks,
        tables=tables,
        tiles=_tiles(starts.tolist(), lengths),
        last_rows=np.array(
            [end - 1 for end, chunk in zip(ends, step.chunks, strict=True) if chunk.draw], dtype=np.int64
        ),
    )


def _tiles(starts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """Cuts each chunk into tiles; the longest walk comes first, so that threads end together."""
    tiles = [
        (start + first, min(ROWS_PER_TILE, length - first), index)
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True))
        for first in reversed(range(0, length, ROWS_PER_TILE))
    ]
    return np.array(tiles, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Compiled for one shape, which makes every inner loop a constant number of vector instructions.

    rotate_and_store(pool, qkv, cos, sin, positions, row_blocks, layer): rotates Q (in place) and K by their
    positions, half-rotation form, and writes K and V into the pool.
    attend(pool, qkv, out, positions, tables, tiles, layer): causal attention of each row over its sequence's KV
    blocks. qkv [rows, (num_heads + 2 * num_kv_heads) * head_dim], out [rows, num_heads * head_dim],
    cos and sin [positions, head_dim / 2].
    """

    rotate_and_store: Callable[..., None]
    attend: Callable[..., None]


_JIT: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_LEAST_EXPONENT = np.float32(-126.0)
_MASKED = np.float32(-1e30)


# Scores and weighted values of one KV block for one query or two. Four rows of K or V at a time, and two queries: every
# loaded vector is used more than once, and the sums stay in registers. weights [queries, block_size], q and acc
# [queries, head_dim], k and v [block_size, head_dim]. They are globals, since numba's cache never finds a kernel again
# that refers to compiled functions of its own closure.


@numba.njit(**_JIT)
def _score_pair(weights, q, query, k):  # type: ignore[no-untyped-def]
    block_size, head_dim = k.shape
    other = query + 1
    for t in range(0, block_size, 4):
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0.0)
        for i in range(head_dim):
            a, b = q[query, i], q[other, i]
            k0, k1, k2, k3 = k[t, i], k[t + 1, i], k[t + 2, i], k[t + 3, i]
            a0, a1, a2, a3 = a0 + a * k0, a1 + a * k1, a2 + a * k2, a3 + a * k3
            b0, b1, b2, b3 = b0 + b * k0, b1 + b * k1, b2 + b * k2, b3 + b * k3
        weights[query, t], weights[query, t + 1], weights[query, t + 2], weights[query, t + 3] = a0, a1, a2, a3
        weights[other, t], weights[other, t + 1], weights[other, t + 2], weights[other, t + 3] = b0, b1, b2, b3


@numba.njit(**_JIT)
def _score_one(weights, q, query, k):  # type: ignore[no-untyped-def]
    block_size, head_dim = k.shape
    for t in range(0, block_size, 4):
        a0 = a1 = a2 = a3 = np.float32(0.0)
        for i in range(head_dim):
            a = q[query, i]
            a0, a1, a2, a3 = a0 + a * k[t, i], a1 + a * k[t + 1, i], a2 + a * k[t + 2, i], a3 + a * k[t + 3, i]
        weights[query, t], weights[query, t + 1], weights[query, t + 2], weights[query, t + 3] = a0, a1, a2, a3


@numba.njit(**_JIT)
def _add_pair(acc, query, weights, v):  # type: ignore[no-untyped-def]
    block_size, head_dim = v.shape
    other = query + 1
    for t in range(0, block_size, 4):
        a0, a1, a2, a3 = weights[query, t], weights[query, t + 1], weights[query, t + 2], weights[query, t + 3]
        b0, b1, b2, b3 = weights[other, t], weights[other, t + 1], weights[other, t + 2], weights[other, t + 3]
        for i in range(head_dim):
            v0, v1, v2, v3 = v[t, i], v[t + 1, i], v[t + 2, i], v[t + 3, i]
            acc[query, i] += (a0 * v0 + a1 * v1) + (a2 * v2 + a3 * v3)
            acc[other, i] += (b0 * v0 + b1 * v1) + (b2 * v2 + b3 * v3)


@numba.njit(**_JIT)
def _add_one(acc, query, weights, v):  # type: ignore[no-untyped-def]
    block_size, head_dim = v.shape
    for t in range(0, block_size, 4):
        a0, a1, a2, a3 = weights[query, t], weights[query, t + 1], weights[query, t + 2], weights[query, t + 3]
        for i in range(head_dim):
            acc[query, i] += (a0 * v[t, i] + a1 * v[t + 1, i]) + (a2 * v[t + 2, i] + a3 * v[t + 3, i])


@numba.njit(**_JIT)
def _add_visible(acc, query, weights, v, visible):  # type: ignore[no-untyped-def]
    head_dim = v.shape[1]
    for t in range(visible):
        for i in range(head_dim):
            acc[query, i] += weights[query, t] * v[t, i]


@numba.njit(**_JIT)
def _softmax(weights, queries, top, total, acc, exponents):  # type: ignore[no-untyped-def]
    """One step of the online softmax for the scores of one block, in place; in loops that become vector code.

    exp(x) = 2**y, y = x * log2(e) = n + r with n the nearest integer; 2**r is a Taylor polynomial on
    |r * ln 2| <= 0.35 (2e-7 relative), and n is added to the exponent bits.
    """
    block_size, head_dim = weights.shape[1], acc.shape[1]
    bits = weights.view(np.int32)
    for query in range(queries):
        block_top = top[query]
        for t in range(block_size):
            block_top = max(block_top, weights[query, t])
        if block_top > top[query]:
            shrink = np.float32(np.exp(top[query] - block_top))
            total[query] *= shrink
            for i in range(head_dim):
                acc[query, i] *= shrink
            top[query] = block_top
        for t in range(block_size):
            y = max((weights[query, t] - block_top) * _LOG2_E, _LEAST_EXPONENT)
            n = np.int32(y - np.float32(0.5))
            exponents[t] = n << 23
            z = (y - np.float32(n)) * _LN_2
            p = np.float32(1 / 720)
            p = p * z + np.float32(1 / 120)
            p = p * z + np.float32(1 / 24)
            p = p * z + np.float32(1 / 6)
            p = p * z + np.float32(0.5)
            p = p * z + np.float32(1.0)
            weights[query, t] = p * z + np.float32(1.0)
        block_total = np.float32(0.0)
        for t in range(block_size):
            bits[query, t] += exponents[t]
        for t in range(block_size):
            block_total += weights[query, t]
        total[query] += block_total


@functools.cache
def kernels_for(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> Kernels:
    """The kernels of one shape; compiled at the first call of each, cached on disk by numba."""
    half = head_dim // 2
    group = num_heads // num_kv_heads
    v_part = block_size * head_dim
    kv_block = 2 * v_part
    scale = np.float32(1.0 / np.sqrt(head_dim))

    def rotate_and_store(pool, qkv, cos, sin, positions, row_blocks, layer):  # type: ignore[no-untyped-def]
        for row in numba.prange(qkv.shape[0]):
            position = positions[row]
            c, s = cos[position], sin[position]
            for head in range(num_heads + num_kv_heads):
                x = qkv[row, head * head_dim : (head + 1) * head_dim]
                for i in range(half):
                    a, b = x[i], x[half + i]
                    x[i] = a * c[i] - b * s[i]
                    x[half + i] = b * c[i] + a * s[i]
            for head in range(num_kv_heads):
                at = row_blocks[row] + (layer * num_kv_heads + head) * kv_block + (position % block_size) * head_dim
                k_from = (num_heads + head) * head_dim
                v_from = (num_heads + num_kv_heads + head) * head_dim
                pool[at : at + head_dim] = qkv[row, k_from : k_from + head_dim]
                pool[at + v_part : at + v_part + head_dim] = qkv[row, v_from : v_from + head_dim]

    def attend(pool, qkv, out, positions, tables, tiles, layer):  # type: ignore[no-untyped-def]
        for task in numba.prange(tiles.shape[0] * num_kv_heads):
            tile, kv_head = task // num_kv_heads, task % num_kv_heads
            first_row, num_rows, sequence = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
            queries = num_rows * group
            q = np.empty((queries, head_dim), dtype=np.float32)
            for query in range(queries):
                q_at = (kv_head * group + query % group) * head_dim
                q[query] = qkv[first_row + query // group, q_at : q_at + head_dim] * scale
            acc = np.zeros((queries, head_dim), dtype=np.float32)
            top = np.full(queries, _MASKED, dtype=np.float32)
            total = np.zeros(queries, dtype=np.float32)
            weights = np.empty((queries, block_size), dtype=np.float32)
            exponents = np.empty(block_size, dtype=np.int32)
            for block in range(positions[first_row + num_rows - 1] // block_size + 1):
                at = tables[sequence, block] + (layer * num_kv_heads + kv_head) * kv_block
                k = pool[at : at + v_part].reshape((block_size, head_dim))
                v = pool[at + v_part : at + kv_block].reshape((block_size, head_dim))
                for query in range(0, queries - 1, 2):
                    _score_pair(weights, q, query, k)
                if queries % 2:
                    _score_one(weights, q, queries - 1, k)
                whole = positions[first_row] >= (block + 1) * block_size - 1
                if not whole:
                    for query in range(queries):
                        visible = positions[first_row + query // group] - block * block_size + 1
                        for t in range(max(visible, 0), block_size):
                            weights[query, t] = _MASKED
                _softmax(weights, queries, top, total, acc, exponents)
                if whole:
                    for query in range(0, queries - 1, 2):
                        _add_pair(acc, query, weights, v)
                    if queries % 2:
                        _add_one(acc, queries - 1, weights, v)
                else:  # what lies past the last visible row is anything, perhaps NaN: it is not touched
                    for query in range(queries):
                        visible = positions[first_row + query // group] - block * block_size + 1
                        _add_visible(acc, query, weights, v, min(max(visible, 0), block_size))
            for query in range(queries):
                o_at = (kv_head * group + query % group) * head_dim
                out[first_row + query // group, o_at : o_at + head_dim] = acc[query] / total[query]

    compiled = numba.njit(parallel=True, **_JIT)
    return Kernels(compiled(rotate_and_store), compiled(attend))
