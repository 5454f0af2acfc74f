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


@numba.njit(**_JIT)
def _exp_inplace(x, exponents, count):  # type: ignore[no-untyped-def]
    """x[i] = exp(x[i]) for x[i] <= 0, to 2e-7 relative; in loops that become vector instructions.

    2**y = 2**n * e**(ln 2 * (y - n)) with n the nearest integer; the second factor is a Taylor polynomial on
    |z| <= 0.35, the first is added to the exponent bits.
    """
    bits = x.view(np.int32)
    for i in range(count):
        y = max(x[i] * _LOG2_E, _LEAST_EXPONENT)
        n = np.int32(y - np.float32(0.5))
        exponents[i] = n << 23
        z = (y - np.float32(n)) * _LN_2
        p = np.float32(1 / 720)
        p = p * z + np.float32(1 / 120)
        p = p * z + np.float32(1 / 24)
        p = p * z + np.float32(1 / 6)
        p = p * z + np.float32(0.5)
        p = p * z + np.float32(1.0)
        x[i] = p * z + np.float32(1.0)
    for i in range(count):
        bits[i] += exponents[i]


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
            top = np.full(queries, -np.inf, dtype=np.float32)
            total = np.zeros(queries, dtype=np.float32)
            weights = np.empty(block_size, dtype=np.float32)
            exponents = np.empty(block_size, dtype=np.int32)
            for block in range(positions[first_row + num_rows - 1] // block_size + 1):
                at = tables[sequence, block] + (layer * num_kv_heads + kv_head) * kv_block
                k = pool[at : at + v_part].reshape((block_size, head_dim))
                v = pool[at + v_part : at + kv_block].reshape((block_size, head_dim))
                for query in range(queries):
                    row = first_row + query // group
                    visible = min(block_size, positions[row] - block * block_size + 1)
                    if visible <= 0:
                        continue
                    one_q, one_acc = q[query], acc[query]
                    block_top = top[query]
                    for t in range(visible):
                        one_k = k[t]
                        dot = np.float32(0.0)
                        for i in range(head_dim):
                            dot += one_q[i] * one_k[i]
                        weights[t] = dot
                        block_top = max(block_top, dot)
                    if block_top > top[query]:
                        shrink = np.float32(np.exp(top[query] - block_top))
                        total[query] *= shrink
                        for i in range(head_dim):
                            one_acc[i] *= shrink
                        top[query] = block_top
                    for t in range(visible):
                        weights[t] -= block_top
                    _exp_inplace(weights, exponents, visible)
                    for t in range(visible):
                        total[query] += weights[t]
                    # Four values of V for one load and store of the accumulator.
                    whole = visible - visible % 4
                    for t in range(0, whole, 4):
                        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
                        v0, v1, v2, v3 = v[t], v[t + 1], v[t + 2], v[t + 3]
                        for i in range(head_dim):
                            one_acc[i] += (w0 * v0[i] + w1 * v1[i]) + (w2 * v2[i] + w3 * v3[i])
                    for t in range(whole, visible):
                        weight, one_v = weights[t], v[t]
                        for i in range(head_dim):
                            one_acc[i] += weight * one_v[i]
            for query in range(queries):
                o_at = (kv_head * group + query % group) * head_dim
                out[first_row + query // group, o_at : o_at + head_dim] = acc[query] / total[query]

    compiled = numba.njit(parallel=True, **_JIT)
    return Kernels(compiled(rotate_and_store), compiled(attend))
