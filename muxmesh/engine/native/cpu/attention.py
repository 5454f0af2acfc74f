"""Causal attention that reads the KV pool in place. It neither gathers nor copies KV.

The softmax is FlashAttention's online softmax (Dao et al., 2022, Alg. 1) over spans of tokens. As in Flash-Decoding,
long sequences are split into ranges of tokens, which `merge` joins. Spans and splits start at fixed positions and every
sum runs in the order of positions, so a row's result does not depend on the other rows of the step. A KV block holds K
as [head_dim, block_size], so that the scores of neighbouring tokens fill a vector, then V as [block_size, head_dim].
A tile is a run of rows of one sequence; a query is one row of one query head. Offsets count f32 elements.
"""

# mypy: disable-error-code="call-arg, misc, no-untyped-call"
from __future__ import annotations

import numba
import numpy as np

from muxmesh.engine.native.cpu.thread_team import JIT, claim, claim_next, wait
from muxmesh.engine.native.cpu.vector import LANES, multiply_scattered, multiply_tile, span_exp, span_max

SPAN = 128
"""Tokens between two steps of the online softmax; a multiple of every block size."""
SPLIT = 512
"""Tokens of the sequence that one task reads; a multiple of `SPAN`."""
QUERIES_PER_TILE = 24
"""Approximate number of queries that share each read of a KV block."""

_VALUE_COLUMNS = 4 * LANES
_ROWS = 4 if LANES == 16 else 2
"""Most rows of a register tile with four vectors: 16 accumulators in 32 registers, or 8 in 16. More would spill."""
_NARROW = min(8, LANES)
_MASKED = np.float32(-1e30)


@numba.njit(**JIT)
def _score_vectors(q, num_queries, head_dim, k0, k1, k2, k3, block_size, scores):  # type: ignore[no-untyped-def]
    """Scores of every query with four vectors of `LANES` tokens at the addresses k0 to k3; prefetches their values."""
    query, to_values = 0, block_size * head_dim
    while query < num_queries:
        a, b = q + 4 * query * head_dim, scores + 4 * query * SPAN
        left = num_queries - query
        if _ROWS == 4 and left >= 4:
            multiply_scattered(4, LANES, to_values, a, head_dim, k0, k1, k2, k3, block_size, head_dim, b, SPAN)
            query += 4
        elif _ROWS == 4 and left >= 3:
            multiply_scattered(3, LANES, to_values, a, head_dim, k0, k1, k2, k3, block_size, head_dim, b, SPAN)
            query += 3
        elif left >= 2:
            multiply_scattered(2, LANES, to_values, a, head_dim, k0, k1, k2, k3, block_size, head_dim, b, SPAN)
            query += 2
        else:
            multiply_scattered(1, LANES, to_values, a, head_dim, k0, k1, k2, k3, block_size, head_dim, b, SPAN)
            query += 1


@numba.njit(**JIT)
def _key_address(pool, table, head_offset, last_block, block_size, token):  # type: ignore[no-untyped-def]
    """Address of the K of ``token``, the first of a vector. Past the last block, an address in the last block."""
    block = min(token // block_size, last_block - 1)
    return pool + 4 * (table[block] + head_offset + token % block_size)


@numba.njit(**JIT)
def _score_span(pool, table, head_offset, first_block, last_block, block_size, q, scores):  # type: ignore[no-untyped-def]
    """Scores of every query with the tokens of the blocks [first_block, last_block), which lie in one span."""
    num_queries, head_dim = q.shape
    q_address, scores_address = q.ctypes.data, scores.ctypes.data
    start, end = first_block * block_size, last_block * block_size
    if block_size % LANES == 0:
        for token in range(start, end, 4 * LANES):
            k0 = _key_address(pool, table, head_offset, last_block, block_size, token)
            k1 = _key_address(pool, table, head_offset, last_block, block_size, token + LANES)
            k2 = _key_address(pool, table, head_offset, last_block, block_size, token + 2 * LANES)
            k3 = _key_address(pool, table, head_offset, last_block, block_size, token + 3 * LANES)
            out = scores_address + 4 * (token - start)
            _score_vectors(q_address, num_queries, head_dim, k0, k1, k2, k3, block_size, out)
    else:
        for token in range(start, end, 4 * _NARROW):
            k0 = _key_address(pool, table, head_offset, last_block, block_size, token)
            k1 = _key_address(pool, table, head_offset, last_block, block_size, token + _NARROW)
            k2 = _key_address(pool, table, head_offset, last_block, block_size, token + 2 * _NARROW)
            k3 = _key_address(pool, table, head_offset, last_block, block_size, token + 3 * _NARROW)
            for query in range(num_queries):
                a, b = q_address + 4 * query * head_dim, scores_address + 4 * (query * SPAN + token - start)
                multiply_scattered(1, _NARROW, 0, a, head_dim, k0, k1, k2, k3, block_size, head_dim, b, SPAN)


@numba.njit(**JIT)
def _add_values(weights, num_queries, num_tokens, v, to_next, head_dim, sums, sums_stride):  # type: ignore[no-untyped-def]
    """Adds the weighted values of the first ``num_tokens`` tokens of one KV block to ``sums``.

    Prefetches ``to_next`` elements ahead.
    """
    column = 0
    while column + _VALUE_COLUMNS <= head_dim:
        query = 0
        while query < num_queries:
            a, b, w = weights + 4 * query * SPAN, sums + 4 * (query * sums_stride + column), v + 4 * column
            left = num_queries - query
            if _ROWS == 4 and left >= 4:
                multiply_tile(4, 4, LANES, 1, to_next, a, SPAN, w, head_dim, LANES, num_tokens, b, sums_stride)
                query += 4
            elif _ROWS == 4 and left >= 3:
                multiply_tile(3, 4, LANES, 1, to_next, a, SPAN, w, head_dim, LANES, num_tokens, b, sums_stride)
                query += 3
            elif left >= 2:
                multiply_tile(2, 4, LANES, 1, to_next, a, SPAN, w, head_dim, LANES, num_tokens, b, sums_stride)
                query += 2
            else:
                multiply_tile(1, 4, LANES, 1, to_next, a, SPAN, w, head_dim, LANES, num_tokens, b, sums_stride)
                query += 1
        column += _VALUE_COLUMNS
    while column + LANES <= head_dim:
        query = 0
        while query < num_queries:
            a, b, w = weights + 4 * query * SPAN, sums + 4 * (query * sums_stride + column), v + 4 * column
            if num_queries - query >= 4:
                multiply_tile(4, 1, LANES, 1, 0, a, SPAN, w, head_dim, 0, num_tokens, b, sums_stride)
                query += 4
            else:
                multiply_tile(1, 1, LANES, 1, 0, a, SPAN, w, head_dim, 0, num_tokens, b, sums_stride)
                query += 1
        column += LANES
    while column < head_dim:
        for query in range(num_queries):
            a, b, w = weights + 4 * query * SPAN, sums + 4 * (query * sums_stride + column), v + 4 * column
            multiply_tile(1, 1, 1, 1, 0, a, SPAN, w, head_dim, 0, num_tokens, b, sums_stride)
        column += 1


@numba.njit(**JIT)
def _softmax_step(row, visible, top, total, sums):  # type: ignore[no-untyped-def]
    """One step of the online softmax over the scores of one query with a span.

    Replaces the first ``visible`` scores by weights and the others by 0; rescales ``sums``. Returns the largest score
    and the sum of the weights so far.
    """
    if visible <= 0:
        row[:] = np.float32(0.0)
        return top, total
    new_top = max(top, span_max(SPAN, row.ctypes.data, visible))
    if new_top > top:
        shrink = np.float32(np.exp(top - new_top))
        total *= shrink
        for i in range(sums.shape[0]):
            sums[i] *= shrink
    return new_top, total + span_exp(SPAN, row.ctypes.data, visible, new_top)


@numba.njit(**JIT)
def _attend_range(pool, table, head_offset, block_size, positions, group, first, last, q, sums, tops, totals, scores):  # type: ignore[no-untyped-def]
    """Attention of all queries of a tile over the tokens [first, last) of one sequence and one KV head."""
    num_queries, head_dim = q.shape
    half = block_size * head_dim * 4
    final_block = (last - 1) // block_size
    for start in range(first, last, SPAN):
        end = min(start + SPAN, last)
        first_block, last_block = start // block_size, (end - 1) // block_size + 1
        _score_span(pool, table, head_offset, first_block, last_block, block_size, q, scores)
        for query in range(num_queries):
            visible = min(positions[query // group] + 1 - start, end - start)
            tops[query], totals[query] = _softmax_step(scores[query], visible, tops[query], totals[query], sums[query])
        for block in range(first_block, last_block):
            v = pool + 4 * (table[block] + head_offset) + half
            weights = scores.ctypes.data + 4 * (block * block_size - start)
            # Values past the last row of the tile are undefined, perhaps NaN, so they are not read.
            tokens = min(block_size, end - block * block_size)
            # The K of the block one span ahead may be anywhere in the pool, which no hardware prefetcher predicts.
            following = block + SPAN // block_size
            to_next = table[following] + head_offset - (v - pool) // 4 if following <= final_block else 0
            _add_values(weights, num_queries, tokens, v, to_next, head_dim, sums.ctypes.data, head_dim)


@numba.njit(**JIT)
def attend(counters, phase, shape, pool, layer, qkv, positions, tables, tiles, tasks, partials, out):  # type: ignore[no-untyped-def]
    """Attention of every row. A tile with one split writes ``out``, any other writes ``partials`` for `merge`.

    tiles [tiles, 5]: first row, number of rows, sequence, first task, number of splits. tasks [tasks, 2]: tile, split.
    partials [tasks * num_kv_heads, queries, head_dim + 2]: weighted sum of values, largest score, sum of weights.
    """
    heads, kv_heads, head_dim, block_size = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size
    group = heads // kv_heads
    kv_block = 2 * block_size * head_dim
    scale = np.float32(1.0 / np.sqrt(head_dim))
    num_tasks = tasks.shape[0] * kv_heads
    most = partials.shape[1]
    all_q = np.empty((most, head_dim), dtype=np.float32)
    all_sums = np.empty((most, head_dim), dtype=np.float32)
    all_scores = np.zeros((most, SPAN), dtype=np.float32)
    tops, totals = np.empty(most, dtype=np.float32), np.empty(most, dtype=np.float32)
    claimed = claim(counters, phase)
    while claimed < num_tasks:
        task, kv_head = claimed // kv_heads, claimed % kv_heads
        tile, split = tasks[task, 0], tasks[task, 1]
        first_row, num_rows, sequence = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        num_queries = num_rows * group
        q, sums, scores = all_q[:num_queries], all_sums[:num_queries], all_scores[:num_queries]
        for query in range(num_queries):
            row, column = first_row + query // group, (kv_head * group + query % group) * head_dim
            for i in range(head_dim):
                q[query, i] = qkv[row, column + i] * scale
                sums[query, i] = np.float32(0.0)
            tops[query], totals[query] = _MASKED, np.float32(0.0)
        rows = positions[first_row : first_row + num_rows]
        last = min(rows[num_rows - 1] + 1, (split + 1) * SPLIT)
        head_offset = (layer * kv_heads + kv_head) * kv_block
        _attend_range(
            pool,
            tables[sequence],
            head_offset,
            block_size,
            rows,
            group,
            split * SPLIT,
            last,
            q,
            sums,
            tops,
            totals,
            scores,
        )
        if tiles[tile, 4] == 1:
            for query in range(num_queries):
                row, column = first_row + query // group, (kv_head * group + query % group) * head_dim
                inverse = np.float32(1.0) / totals[query]
                for i in range(head_dim):
                    out[row, column + i] = sums[query, i] * inverse
        else:
            for query in range(num_queries):
                partials[claimed, query, :head_dim] = sums[query]
                partials[claimed, query, head_dim] = tops[query]
                partials[claimed, query, head_dim + 1] = totals[query]
        claimed = claim_next(counters, phase)
    wait(counters, phase, num_tasks)


@numba.njit(**JIT)
def merge(counters, phase, shape, tiles, partials, out):  # type: ignore[no-untyped-def]
    """Joins the partial results of each tile with several splits, in the order of positions, and writes ``out``."""
    kv_heads, head_dim = shape.num_kv_heads, shape.head_dim
    group = shape.num_heads // kv_heads
    sums = np.empty(head_dim, dtype=np.float32)
    tile = claim(counters, phase)
    while tile < tiles.shape[0]:
        first_row, num_rows, first_task, splits = tiles[tile, 0], tiles[tile, 1], tiles[tile, 3], tiles[tile, 4]
        for query in range(num_rows * group * (splits > 1)):
            for kv_head in range(kv_heads):
                top, total = _MASKED, np.float32(0.0)
                sums[:] = np.float32(0.0)
                for split in range(splits):
                    part = partials[(first_task + split) * kv_heads + kv_head, query]
                    if part[head_dim + 1] == np.float32(0.0):  # the row attends to no token of this split
                        continue
                    new_top = max(top, part[head_dim])
                    old, new = np.float32(np.exp(top - new_top)), np.float32(np.exp(part[head_dim] - new_top))
                    for i in range(head_dim):
                        sums[i] = sums[i] * old + part[i] * new
                    total = total * old + part[head_dim + 1] * new
                    top = new_top
                column = (kv_head * group + query % group) * head_dim
                inverse = np.float32(1.0) / total
                for i in range(head_dim):
                    out[first_row + query // group, column + i] = sums[i] * inverse
        tile = claim_next(counters, phase)
    wait(counters, phase, tiles.shape[0])
