"""Kernels that work row by row: embedding, RMSNorm, bias and rotation of Q and K, and the store of K and V.

A task of a phase is a block of rows.
"""

# mypy: disable-error-code="call-arg, misc, no-untyped-call"
from __future__ import annotations

import numba
import numpy as np

from muxmesh.engine.native.cpu.thread_team import JIT, claim, claim_next, wait
from muxmesh.models.matrix_packing import PANEL

_ROWS = 8


@numba.njit(**JIT)
def embed(counters, phase, token_ids, table, packed, hidden, out):  # type: ignore[no-untyped-def]
    """Copies the embedding of each token into a row of out [rows, at least hidden] and zeroes the rest of the row.

    table: a matrix [vocab, hidden] as one dimension, or, if ``packed``, the panels of the tied output matrix.
    """
    rows = token_ids.shape[0]
    tasks = (rows + _ROWS - 1) // _ROWS
    task = claim(counters, phase)
    while task < tasks:
        for row in range(task * _ROWS, min((task + 1) * _ROWS, rows)):
            token = token_ids[row]
            if packed:
                first = token // PANEL * hidden * PANEL + token % PANEL
                for i in range(hidden):
                    out[row, i] = table[first + i * PANEL]
            else:
                for i in range(hidden):
                    out[row, i] = table[token * hidden + i]
            out[row, hidden:] = np.float32(0.0)
        task = claim_next(counters, phase)
    wait(counters, phase, tasks)


@numba.njit(**JIT)
def normalize_row(row, weight, eps, out):  # type: ignore[no-untyped-def]
    """RMSNorm (Zhang and Sennrich, 2019) of the first ``len(weight)`` elements of ``row``, which may be ``out``."""
    squares = np.float32(0.0)
    for i in range(weight.shape[0]):
        squares += row[i] * row[i]
    factor = np.float32(1.0) / np.sqrt(squares / np.float32(weight.shape[0]) + np.float32(eps))
    for i in range(weight.shape[0]):
        out[i] = row[i] * factor * weight[i]


@numba.njit(**JIT)
def normalize(counters, phase, x, weight, eps, chosen, out):  # type: ignore[no-untyped-def]
    """RMSNorm of the rows ``chosen`` of x, in that order, into the first rows of out."""
    tasks = (chosen.shape[0] + _ROWS - 1) // _ROWS
    task = claim(counters, phase)
    while task < tasks:
        for row in range(task * _ROWS, min((task + 1) * _ROWS, chosen.shape[0])):
            normalize_row(x[chosen[row]], weight, eps, out[row])
        task = claim_next(counters, phase)
    wait(counters, phase, tasks)


@numba.njit(**JIT)
def rotate_and_store(counters, phase, shape, pool, layer, qkv, bias, q_norm, k_norm, cos, sin, positions, row_blocks):  # type: ignore[no-untyped-def]
    """Adds the bias to qkv, normalizes and rotates Q and K in place (half-rotation form), stores K and V in the pool.

    qkv [rows, at least all heads of Q, K and V]; bias [qkv columns] or empty; q_norm and k_norm [head_dim] or empty;
    cos and sin [positions, head_dim / 2]; row_blocks [rows]: offset in the pool of the token block of each row.
    """
    heads, kv_heads, head_dim, block_size = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size
    half = head_dim // 2
    value_part = block_size * head_dim
    rows = positions.shape[0]
    tasks = (rows + _ROWS - 1) // _ROWS
    task = claim(counters, phase)
    while task < tasks:
        for row in range(task * _ROWS, min((task + 1) * _ROWS, rows)):
            qkv_row, position = qkv[row], positions[row]
            for i in range(bias.shape[0]):
                qkv_row[i] += bias[i]
            c, s = cos[position], sin[position]
            for head in range(heads + kv_heads):
                x = qkv_row[head * head_dim : (head + 1) * head_dim]
                if head < heads:
                    if q_norm.shape[0]:
                        normalize_row(x, q_norm, shape.eps, x)
                elif k_norm.shape[0]:
                    normalize_row(x, k_norm, shape.eps, x)
                for i in range(half):
                    a, b = x[i], x[half + i]
                    x[i] = a * c[i] - b * s[i]
                    x[half + i] = b * c[i] + a * s[i]
            for head in range(kv_heads):
                kv_block = row_blocks[row] + (layer * kv_heads + head) * 2 * value_part
                in_block = position % block_size
                k_to, v_to = kv_block + in_block, kv_block + value_part + in_block * head_dim
                k_from, v_from = (heads + head) * head_dim, (heads + kv_heads + head) * head_dim
                for i in range(head_dim):
                    pool[k_to + i * block_size] = qkv_row[k_from + i]
                    pool[v_to + i] = qkv_row[v_from + i]
        task = claim_next(counters, phase)
    wait(counters, phase, tasks)
