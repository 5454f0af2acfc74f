"""Writes K and V of new tokens into the pool. Enqueues only, never waits for the device."""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muxmesh.engine.native.cuda.attention_plan import next_power_of_2
from muxmesh.engine.native.cuda.kv_layout import KvLayout

_ROWS_PER_PROGRAM = 16


def write_kv(
    pool: Tensor, layout: KvLayout, layer: int, k: Tensor, v: Tensor, block_ids: Tensor, positions: Tensor
) -> None:
    """Writes K and V of ``layer`` for each row, converted to the KV dtype.

    pool: the whole pool as elements of the KV dtype. k, v [rows, KV heads, head_dim]: elements of one head are
    neighbours. block_ids int32 [rows]: the token block that stores the row; -1 writes nothing. positions int32 [rows]:
    of each token in its sequence.
    """
    rows = k.shape[0]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (rows, layout.num_kv_heads, layout.head_dim) or tensor.stride(2) != 1:
            raise ValueError(
                f"{name} is {list(tensor.shape)} with strides {list(tensor.stride())}, "
                f"[{rows}, {layout.num_kv_heads}, {layout.head_dim}] with neighbouring elements is needed"
            )
    for name, tensor in (("block_ids", block_ids), ("positions", positions)):
        if tensor.dtype != torch.int32 or tensor.shape != (rows,) or tensor.stride(0) != 1:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, contiguous int32 [{rows}] is needed")
    write_kernel[(triton.cdiv(rows, _ROWS_PER_PROGRAM), layout.num_kv_heads)](
        pool, k, v, block_ids, positions, rows, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        layer, layout.num_kv_heads, layout.blocks_per_slab, layout.slab_rest, layout.token_block_elements,
        HEAD_DIM=layout.head_dim, D=next_power_of_2(layout.head_dim), BLOCK_SIZE=layout.block_size,
        ROWS=_ROWS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "layer", "blocks_per_slab"])
def write_kernel(
    pool, k, v, block_ids, positions, rows, k_stride, k_head_stride, v_stride, v_head_stride,
    layer, num_kv_heads, blocks_per_slab, slab_rest, token_block_elements,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes K and V of one head for ROWS rows. Grid: (cdiv(rows, ROWS), KV heads)."""
    head, d = tl.program_id(1), tl.arange(0, D)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ids = tl.load(block_ids + row, mask=row < rows, other=-1)
    slots = tl.load(positions + row, mask=row < rows, other=0) % BLOCK_SIZE
    mask = (ids >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    block = ids.to(tl.int64) * token_block_elements + (ids // blocks_per_slab).to(tl.int64) * slab_rest
    kv_block = (layer * num_kv_heads + head).to(tl.int64)
    to = pool + (block + kv_block * (2 * BLOCK_SIZE * HEAD_DIM) + slots * HEAD_DIM)[:, None] + d[None, :]
    row = row.to(tl.int64)
    keys = tl.load(k + (row * k_stride + head * k_head_stride)[:, None] + d[None, :], mask=mask, other=0.0)
    values = tl.load(v + (row * v_stride + head * v_head_stride)[:, None] + d[None, :], mask=mask, other=0.0)
    dtype = pool.dtype.element_ty
    tl.store(to, keys.to(tl.float32).to(dtype), mask=mask)
    tl.store(to + BLOCK_SIZE * HEAD_DIM, values.to(tl.float32).to(dtype), mask=mask)
