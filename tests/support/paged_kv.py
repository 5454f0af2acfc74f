"""A pool with the KV of random sequences in scattered token blocks, and attention over it in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muxmesh.device.kv_view import KvGeometry
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.models.model_spec import KvShape
from tests.support.triton_interpreter import DEVICE


@dataclass(frozen=True)
class PagedKv:
    """KV of sequences in one layer. Every element of the pool that stores no token is NaN.

    k, v: per sequence [tokens, KV heads, head_dim] in f64, rounded to the KV dtype. tables int32 [sequences, most
    blocks]; past its last block, a row of the tables names blocks of garbage.
    """

    layout: KvLayout
    layer: int
    pool: Tensor
    tables: Tensor
    k: list[Tensor]
    v: list[Tensor]

    def rows(self, sequence: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token block id and position of each token of a sequence, int32."""
        at = torch.tensor(list(positions), dtype=torch.int32, device=DEVICE)
        return self.tables[sequence, (at // self.layout.block_size).long()], at

    def attention(self, q: Tensor, sequence: int, position: int) -> Tensor:
        """Attention of the query heads q [heads, head_dim] at a position over the tokens up to it, in float64."""
        k, v = (kv[sequence][: position + 1].repeat_interleave(len(q) // kv[0].shape[1], 1) for kv in (self.k, self.v))
        scores = torch.einsum("hd,nhd->hn", q.double().cpu(), k) / math.sqrt(q.shape[1])
        return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


def paged_kv(
    lengths: Sequence[int],
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    blocks_per_slab: int = 3,
    slab_rest: int = 64,
    seed: int = 0,
) -> PagedKv:
    """Writes random KV of sequences of ``lengths`` tokens into layer 1 of 2.

    A slab holds ``blocks_per_slab`` token blocks and ``slab_rest`` bytes that belong to none.
    """
    chance = torch.Generator().manual_seed(seed)
    shape = KvShape(2, num_kv_heads, head_dim, block_size, dtype.itemsize)
    layout = KvLayout.of(KvGeometry(shape, blocks_per_slab * shape.token_block_bytes + slab_rest))
    counts = [-(-length // block_size) for length in lengths]
    num_slabs = -(-(sum(counts) + 5) // blocks_per_slab)
    pool = torch.full((num_slabs * layout.slab_elements,), math.nan, dtype=dtype)
    scattered = torch.randperm(num_slabs * blocks_per_slab, generator=chance).to(torch.int32)
    tables = scattered[-1:].repeat(len(lengths), max(counts, default=0) + 1)
    k, v = [], []
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[sequence, :count], scattered = scattered[:count], scattered[count:]
        kv = torch.randn(2, length, num_kv_heads, head_dim, generator=chance).to(dtype)
        for token in range(length):
            _store(pool, layout, int(tables[sequence, token // block_size]), token % block_size, kv[:, token])
        k.append(kv[0].double())
        v.append(kv[1].double())
    return PagedKv(layout, 1, pool.to(DEVICE), tables.to(DEVICE), k, v)


def token_elements(pool: Tensor, layout: KvLayout, layer: int, block_id: int, slot: int) -> Tensor:
    """View of what the pool stores for one token in one layer: [KV heads, K or V, head_dim]."""
    offset = block_id // layout.blocks_per_slab * layout.slab_elements
    offset += block_id % layout.blocks_per_slab * layout.token_block_elements
    kv_block = 2 * layout.block_size * layout.head_dim
    heads = pool[offset + layer * layout.num_kv_heads * kv_block :][: layout.num_kv_heads * kv_block]
    return heads.view(layout.num_kv_heads, 2, layout.block_size, layout.head_dim)[:, :, slot]


def _store(pool: Tensor, layout: KvLayout, block_id: int, slot: int, kv: Tensor) -> None:
    token_elements(pool, layout, 1, block_id, slot).copy_(kv.transpose(0, 1))
