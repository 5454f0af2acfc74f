"""Writes K and V into a pool by the kernel of the engine, which rotates K, with angles of zero."""

from __future__ import annotations

import torch
from torch import Tensor

from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.row_kernels import rotate_and_write


def write_kv(
    pool: Tensor, layout: KvLayout, layer: int, k: Tensor, v: Tensor, block_ids: Tensor, positions: Tensor
) -> None:
    """Writes k, v [rows, KV heads, head_dim] of ``layer``; see `rotate_and_write`."""
    angles = torch.zeros(int(positions.max()) + 1, layout.head_dim // 2, device=pool.device)
    qkv = torch.cat([torch.zeros_like(k), k, v], dim=1)
    q_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    rotate_and_write(qkv, None, angles.cos(), angles, positions, block_ids, pool, layout, layer, q_out)
