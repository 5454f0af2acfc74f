"""Triton kernels of paged attention: one row per sequence (decode) and runs of rows of a chunk (prefill).

Both use FlashAttention's online softmax (Dao et al., 2022, Alg. 1) with powers of 2. A program computes all query heads
of one KV head, so it reads each K and V once. Decode splits the context as Flash-Decoding does, and `merge_kernel`
joins the splits. A tile loads the id of each token block once. K and V are masked: what lies behind the context of a
sequence may be anything, NaN too.

GROUP query heads share a KV head. Q queries x N tokens is one tile; D is HEAD_DIM padded to a power of 2.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_address(
    table, blocks, mask, kv_block, blocks_per_slab, slab_rest, token_block_elements,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ONE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Elements from the start of the pool to the KV block of each of the ``blocks`` of a sequence."""
    ids = tl.load(table + blocks, mask=mask, other=0)
    address = ids.to(tl.int64) * token_block_elements + kv_block * (2 * BLOCK_SIZE * HEAD_DIM)
    if not ONE_STRIDE:
        address += (ids // blocks_per_slab).to(tl.int64) * slab_rest
    return address


@triton.jit
def attend_range(
    q, top, total, sums, pool, table, first, last, positions, scale_log2, kv_block,
    blocks_per_slab, slab_rest, token_block_elements,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr,
    ONE_STRIDE: tl.constexpr, ALIGNMENT: tl.constexpr, WHOLE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Online softmax of the queries q [Q, D] over the tokens [first, last) of a sequence; ``first`` is a multiple of N.

    With WHOLE, ``last`` is a multiple of N too, so there is nothing to mask. With CAUSAL, a query sees only the tokens
    up to its position [Q]. Returns largest scores, sums of weights, weighted sums of values.
    """
    d = tl.arange(0, D)
    for start in tl.range(first, last, N):
        tokens = start + tl.arange(0, N)
        stored = tokens < last
        if N >= BLOCK_SIZE:  # one id for all tokens of a token block
            blocks = start // BLOCK_SIZE + tl.arange(0, N // BLOCK_SIZE)
            address = block_address(
                table, blocks, blocks * BLOCK_SIZE < last, kv_block, blocks_per_slab, slab_rest, token_block_elements,
                HEAD_DIM, BLOCK_SIZE, ONE_STRIDE,
            )  # fmt: skip
            base = (address[:, None] + (tl.arange(0, BLOCK_SIZE) * HEAD_DIM)[None, :]).reshape(N)
            base = tl.multiple_of(base, ALIGNMENT)  # which the compiler cannot see through the reshaping
        else:
            base = block_address(
                table, tokens // BLOCK_SIZE, stored, kv_block, blocks_per_slab, slab_rest, token_block_elements,
                HEAD_DIM, BLOCK_SIZE, ONE_STRIDE,
            ) + (tokens % BLOCK_SIZE) * HEAD_DIM  # fmt: skip
        k_at = pool + base[:, None] + d[None, :]
        if WHOLE and HEAD_DIM == D:
            k, v = tl.load(k_at), tl.load(k_at + BLOCK_SIZE * HEAD_DIM)
        else:
            mask = stored[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(k_at, mask=mask, other=0.0)
            v = tl.load(k_at + BLOCK_SIZE * HEAD_DIM, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale_log2
        if not WHOLE:
            visible = stored[None, :]
            if CAUSAL:
                visible = visible & (tokens[None, :] <= positions[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc=sums * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, sums


@triton.jit(do_not_specialize=["num_splits", "table_stride", "layer", "blocks_per_slab"])
def decode_kernel(
    q, pool, tables, context_lens, out, partials, lse, scale_log2, num_splits,
    q_stride, q_head_stride, out_stride, out_head_stride, table_stride,
    layer, num_kv_heads, blocks_per_slab, slab_rest, token_block_elements,
    GROUP: tl.constexpr, Q: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr, SPLIT: tl.constexpr, ONE_STRIDE: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Attention of one row of one sequence over one split of its context. Grid: (KV heads, splits, sequences).

    Without SPLIT there is one split and it writes ``out``. With SPLIT it writes partials [sequences, heads, splits,
    HEAD_DIM] and lse [sequences, heads, splits], nothing for a split without tokens.
    """
    kv_head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(context_lens + seq)
    width = tl.cdiv(tl.cdiv(context, num_splits), N) * N
    first = split * width
    if SPLIT and first >= context:
        return
    last = tl.minimum(first + width, context)
    d, member = tl.arange(0, D), tl.arange(0, Q)
    heads = kv_head * GROUP + member
    mask = (member < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    queries = tl.load(q + seq * q_stride + heads[:, None] * q_head_stride + d[None, :], mask=mask, other=0.0)
    kv_block = (layer * num_kv_heads + kv_head).to(tl.int64)
    top, total, sums = attend_range(
        queries, tl.full([Q], float("-inf"), tl.float32), tl.zeros([Q], tl.float32), tl.zeros([Q, D], tl.float32),
        pool, tables + seq * table_stride, first, last, heads, scale_log2, kv_block,
        blocks_per_slab, slab_rest, token_block_elements,
        HEAD_DIM, D, BLOCK_SIZE, N, ONE_STRIDE, ALIGNMENT, False, False,
    )  # fmt: skip
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        row = (seq * num_kv_heads * GROUP + heads) * num_splits + split
        tl.store(partials + row[:, None] * HEAD_DIM + d[None, :], sums, mask=mask)
        tl.store(lse + row, top + tl.log2(total), mask=member < GROUP)
    else:
        to = out + seq * out_stride + heads[:, None] * out_head_stride + d[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    partials, lse, context_lens, out, num_splits, out_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one query, P at a time; zeros for a sequence without context. Grid: (heads, sequences)."""
    head, seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + seq)
    width = tl.maximum(tl.cdiv(tl.cdiv(context, num_splits), N) * N, 1)
    splits = tl.cdiv(context, width)
    d = tl.arange(0, D)
    row = (seq * tl.num_programs(0) + head) * num_splits
    top, total, sums = float("-inf"), 0.0, tl.zeros([D], tl.float32)
    for start in tl.range(0, splits, P):
        split = start + tl.arange(0, P)
        mask = (split < splits)[:, None] & (d < HEAD_DIM)[None, :]
        part = tl.load(partials + (row + split)[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        size = tl.load(lse + row + split, mask=split < splits, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(size, 0))
        weight, shrink = tl.exp2(size - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 0)
        sums = sums * shrink + tl.sum(weight[:, None] * part, 0)
        top = new_top
    sums = sums / tl.where(total > 0, total, 1.0)
    to = out + seq * out_stride + head * out_head_stride + d
    tl.store(to, sums.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["table_stride", "layer", "blocks_per_slab"])
def prefill_kernel(
    q, pool, tables, tiles, out, scale_log2,
    q_stride, q_head_stride, out_stride, out_head_stride, table_stride,
    layer, num_kv_heads, blocks_per_slab, slab_rest, token_block_elements,
    GROUP: tl.constexpr, Q: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr, ONE_STRIDE: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Causal attention of one tile, Q // GROUP rows of one chunk, for one KV head. Grid: (KV heads, tiles)."""
    kv_head, tile = tl.program_id(0), tiles + tl.program_id(1) * 4
    first_row, num_rows = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    seq, first_position = tl.load(tile + 2).to(tl.int64), tl.load(tile + 3)
    d, query = tl.arange(0, D), tl.arange(0, Q)
    row, heads = query // GROUP, kv_head * GROUP + query % GROUP
    mask = (row < num_rows)[:, None] & (d < HEAD_DIM)[None, :]
    rows = first_row + row
    queries = tl.load(q + (rows * q_stride + heads * q_head_stride)[:, None] + d[None, :], mask=mask, other=0.0)
    kv_block = (layer * num_kv_heads + kv_head).to(tl.int64)
    table = tables + seq * table_stride
    positions, last = first_position + row, first_position + num_rows
    seen_by_all = (first_position + 1) // N * N
    top, total, sums = attend_range(
        queries, tl.full([Q], float("-inf"), tl.float32), tl.zeros([Q], tl.float32), tl.zeros([Q, D], tl.float32),
        pool, table, 0, seen_by_all, positions, scale_log2, kv_block,
        blocks_per_slab, slab_rest, token_block_elements,
        HEAD_DIM, D, BLOCK_SIZE, N, ONE_STRIDE, ALIGNMENT, True, False,
    )  # fmt: skip
    top, total, sums = attend_range(
        queries, top, total, sums, pool, table, seen_by_all, last, positions, scale_log2, kv_block,
        blocks_per_slab, slab_rest, token_block_elements,
        HEAD_DIM, D, BLOCK_SIZE, N, ONE_STRIDE, ALIGNMENT, False, True,
    )  # fmt: skip
    to = out + (rows * out_stride + heads * out_head_stride)[:, None] + d[None, :]
    tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)
