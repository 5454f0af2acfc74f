"""Attention over the KV pool in place, on the device: decode (one row per sequence) and prefill (runs of rows).

Checks shapes and launches the kernels of `attention_kernels`; enqueues only, never waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from muxmesh.engine.native.cuda.attention_kernels import decode_kernel, merge_kernel, prefill_kernel
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan, next_power_of_2

_MERGED_ELEMENTS = 8192
"""Of partial outputs that a program merges at a time: with head size 128, 64 splits, so mostly one trip to memory."""
_REGISTERS = {4: 168}
"""Most registers of a thread of decode attention, by warps: ptxas spills none."""


def decode_attention(
    q: Tensor,
    pool: Tensor,
    plan: AttentionPlan,
    layer: int,
    tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """Attention of the newest token of each sequence, whose KV is already in the pool.

    q, out [seqs, heads, head_dim]: elements of one head are neighbours. pool: the whole pool as elements of the KV
    dtype. tables int32 [seqs, max_blocks]: ids of token blocks, anything past the context. context_lens int32 [seqs]:
    tokens including the newest; 0 for a padding row, whose output is 0. workspace: f32, at least
    ``plan.workspace_elements(seqs, max_blocks)`` elements, written before it is read. The grids depend on shapes only.
    """
    layout, config = plan.layout, plan.decode
    num_seqs, heads = _check_rows(q, out, plan), plan.num_heads
    _check_integers("tables", tables, num_seqs, 2)
    _check_integers("context_lens", context_lens, num_seqs, 1)
    splits, padded = plan.num_splits(num_seqs, tables.shape[1]), next_power_of_2(layout.head_dim)
    needed = num_seqs * heads * splits * (layout.head_dim + 1) if splits > 1 else 0
    if workspace.dtype != torch.float32 or workspace.numel() < needed:
        raise ValueError(f"workspace has {workspace.numel()} elements of {workspace.dtype}, {needed} of f32 are needed")
    partials, lse = workspace, workspace[needed // (layout.head_dim + 1) * layout.head_dim :]
    decode_kernel[(layout.num_kv_heads, splits, num_seqs)](
        q, pool, tables, context_lens, out, partials, lse, _scale(layout.head_dim), splits,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), tables.stride(0),
        layer, layout.num_kv_heads, layout.blocks_per_slab, layout.slab_rest, layout.token_block_elements,
        GROUP=plan.group, Q=config.queries, HEAD_DIM=layout.head_dim, D=padded, BLOCK_SIZE=layout.block_size,
        N=config.keys, SPLIT=splits > 1, ONE_STRIDE=layout.one_stride, ALIGNMENT=layout.alignment,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=_REGISTERS.get(config.num_warps),
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(heads, num_seqs)](
            partials, lse, context_lens, out, splits, out.stride(0), out.stride(1),
            HEAD_DIM=layout.head_dim, D=padded, N=config.keys, P=_MERGED_ELEMENTS // padded, num_warps=4,
        )  # fmt: skip


def prefill_attention(
    q: Tensor, pool: Tensor, plan: AttentionPlan, layer: int, tables: Tensor, tiles: Tensor, out: Tensor
) -> None:
    """Causal attention of the chunks of a step, whose KV is already in the pool.

    q, out [rows, heads, head_dim]: elements of one head are neighbours. tables int32 [chunks, max_blocks]: ids of token
    blocks. tiles int32 [tiles, 4]: of `attention_plan.prefill_tiles`, on the device. Rows in no tile are not written.
    """
    layout, config = plan.layout, plan.prefill
    _check_rows(q, out, plan)
    _check_integers("tables", tables, tables.shape[0], 2)
    _check_integers("tiles", tiles, tiles.shape[0], 2)
    prefill_kernel[(layout.num_kv_heads, tiles.shape[0])](
        q, pool, tables, tiles, out, _scale(layout.head_dim),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), tables.stride(0),
        layer, layout.num_kv_heads, layout.blocks_per_slab, layout.slab_rest, layout.token_block_elements,
        GROUP=plan.group, Q=config.queries, HEAD_DIM=layout.head_dim, D=next_power_of_2(layout.head_dim),
        BLOCK_SIZE=layout.block_size, N=config.keys, ONE_STRIDE=layout.one_stride, ALIGNMENT=layout.alignment,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _scale(head_dim: int) -> float:
    """Factor of the scores, for powers of 2 instead of e."""
    return math.log2(math.e) / math.sqrt(head_dim)


def _check_rows(q: Tensor, out: Tensor, plan: AttentionPlan) -> int:
    """Returns the number of rows. Raises ValueError for a shape or stride that the kernels do not take."""
    for name, tensor in (("q", q), ("out", out)):
        if tensor.shape != (q.shape[0], plan.num_heads, plan.layout.head_dim) or tensor.stride(2) != 1:
            raise ValueError(
                f"{name} is {list(tensor.shape)} with strides {list(tensor.stride())}, "
                f"[{q.shape[0]}, {plan.num_heads}, {plan.layout.head_dim}] with neighbouring elements is needed"
            )
    return q.shape[0]


def _check_integers(name: str, tensor: Tensor, length: int, dimensions: int) -> None:
    """Raises ValueError unless ``tensor`` is int32 [length] or [length, any], its last dimension contiguous."""
    if tensor.dtype != torch.int32 or tensor.dim() != dimensions or len(tensor) != length or tensor.stride(-1) != 1:
        needed = f"[{length}]" if dimensions == 1 else f"[{length}, columns]"
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}, "
            f"int32 {needed} with neighbouring elements is needed"
        )
