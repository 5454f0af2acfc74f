"""Triton kernels for what is done row by row between the products of a layer. Enqueue only.

`rotate_and_write` is all that lies between the product of Q, K and V and attention, in one launch: it norms the heads
of Q and K if the model does, rotates them, and writes K and V into the pool. `silu_and_multiply` is the gate of the
feed-forward layer. All arithmetic is f32.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from muxmesh.engine.native.cuda.attention_plan import next_power_of_2
from muxmesh.engine.native.cuda.kv_layout import KvLayout

_ROWS_PER_PROGRAM = 16
_GATED_ROWS, _GATED_COLUMNS = 4, 256


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [head_dim] of the RMSNorm of each head of Q and K (Qwen3), in the dtype of the activations."""

    q: Tensor
    k: Tensor
    epsilon: float


def rotate_and_write(
    qkv: Tensor,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    block_ids: Tensor,
    pool: Tensor,
    layout: KvLayout,
    layer: int,
    q_out: Tensor,
) -> None:
    """Writes normed and rotated Q to ``q_out`` and K, also normed and rotated, and V into the pool.

    qkv [rows, heads + 2 * KV heads, head_dim] and q_out [rows, heads, head_dim], contiguous. cos, sin f32 [positions of
    the model, head_dim / 2]: `rope.rope_tables`. positions, block_ids int32 [rows]: of each token; a row with block id
    -1 writes no K and V. pool: the whole pool as elements of the KV dtype; a number that this dtype does not have is
    written as NaN. As an infinity it could give a token a score of -inf, and attention would miss it unnoticed.
    """
    rows, num_heads, head_dim = q_out.shape
    assert qkv.shape == (rows, num_heads + 2 * layout.num_kv_heads, head_dim) and qkv.is_contiguous()
    assert q_out.is_contiguous() and head_dim == layout.head_dim
    half = next_power_of_2(head_dim // 2)
    rotate_and_write_kernel[(triton.cdiv(rows, _ROWS_PER_PROGRAM), qkv.shape[1])](
        qkv, q_out, pool, norms.q if norms else qkv, norms.k if norms else qkv, norms.epsilon if norms else 0.0,
        cos, sin, positions, block_ids, rows, layer,
        layout.blocks_per_slab, layout.slab_elements, layout.token_block_elements,
        HEADS=num_heads, KV_HEADS=layout.num_kv_heads, HEAD_DIM=head_dim, HALF=half,
        BLOCK_SIZE=layout.block_size, HAS_NORMS=norms is not None, LARGEST=torch.finfo(pool.dtype).max,
        ROWS=_ROWS_PER_PROGRAM, num_warps=max(1, half // 16),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "layer", "blocks_per_slab", "epsilon"])
def rotate_and_write_kernel(
    qkv, q_out, pool, q_norm, k_norm, epsilon, cos, sin, positions, block_ids, rows, layer,
    blocks_per_slab, slab_elements, token_block_elements,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_NORMS: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `rotate_and_write`. Grid: (cdiv(rows, ROWS), heads + 2 * KV heads).

    A program has both halves of one head [ROWS, HALF], because the rotation mixes element i with i + head_dim / 2.
    """
    head, d = tl.program_id(1), tl.arange(0, HALF)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row, is_element = row < rows, d < HEAD_DIM // 2
    mask = is_row[:, None] & is_element[None, :]
    at = (row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head)[:, None] * HEAD_DIM + d[None, :]
    a = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(positions + row, mask=is_row, other=0)
    if head < HEADS + KV_HEADS:
        if HAS_NORMS:
            a, b = normed(a, b, q_norm if head < HEADS else k_norm, epsilon, d, is_element, HEAD_DIM)
        angle_at = position.to(tl.int64)[:, None] * (HEAD_DIM // 2) + d[None, :]
        c, s = tl.load(cos + angle_at, mask=mask, other=0.0), tl.load(sin + angle_at, mask=mask, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    if head < HEADS:
        q_to = q_out + (row.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
        tl.store(q_to, a.to(q_out.dtype.element_ty), mask=mask)
        tl.store(q_to + HEAD_DIM // 2, b.to(q_out.dtype.element_ty), mask=mask)
    else:
        block_id = tl.load(block_ids + row, mask=is_row, other=-1)
        is_value = head >= HEADS + KV_HEADS
        kv_head = head - HEADS - tl.where(is_value, KV_HEADS, 0)
        slab = (block_id // blocks_per_slab).to(tl.int64) * slab_elements
        block = slab + (block_id % blocks_per_slab).to(tl.int64) * token_block_elements
        kv_block = (layer * KV_HEADS + kv_head).to(tl.int64) * (2 * BLOCK_SIZE * HEAD_DIM)
        slot = tl.where(is_value, BLOCK_SIZE, 0) + position % BLOCK_SIZE
        kv_to = pool + (block + kv_block + slot * HEAD_DIM)[:, None] + d[None, :]
        mask = mask & (block_id >= 0)[:, None]
        a = tl.where(tl.abs(a) <= LARGEST, a, float("nan"))
        b = tl.where(tl.abs(b) <= LARGEST, b, float("nan"))
        tl.store(kv_to, a.to(pool.dtype.element_ty), mask=mask)
        tl.store(kv_to + HEAD_DIM // 2, b.to(pool.dtype.element_ty), mask=mask)


@triton.jit
def normed(a, b, weights, epsilon, d, is_element, HEAD_DIM: tl.constexpr):
    """RMSNorm of heads whose halves are ``a`` and ``b``, [ROWS, HALF] each."""
    mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM
    scale = (1.0 / tl.sqrt_rn(mean + epsilon))[:, None]
    first = tl.load(weights + d, mask=is_element, other=0.0).to(tl.float32)
    second = tl.load(weights + HEAD_DIM // 2 + d, mask=is_element, other=0.0).to(tl.float32)
    return a * scale * first[None, :], b * scale * second[None, :]


def silu_and_multiply(gate_up: Tensor, out: Tensor) -> None:
    """Writes silu(gate) * up to ``out``; gate_up [rows, 2 * inner]: gate, then up; out [rows, inner]; contiguous."""
    rows, inner = out.shape
    assert gate_up.shape == (rows, 2 * inner) and gate_up.is_contiguous() and out.is_contiguous()
    silu_kernel[(triton.cdiv(rows, _GATED_ROWS), triton.cdiv(inner, _GATED_COLUMNS))](
        gate_up, out, rows, INNER=inner, ROWS=_GATED_ROWS, COLUMNS=_GATED_COLUMNS, num_warps=4
    )


@triton.jit(do_not_specialize=["rows"])
def silu_kernel(gate_up, out, rows, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """See `silu_and_multiply`. Grid: (cdiv(rows, ROWS), cdiv(INNER, COLUMNS))."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < INNER)[None, :]
    gate_at = gate_up + row.to(tl.int64)[:, None] * (2 * INNER) + column[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + INNER, mask=mask, other=0.0).to(tl.float32)
    to = out + row.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(to, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=mask)
