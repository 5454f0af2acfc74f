"""One model's view of the pool: where its token blocks lie. Pure arithmetic over a mapped array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.models.spec import KvShape


@dataclass(frozen=True, slots=True)
class KvView:
    """The pool as f32 elements, and how one model divides slabs.

    A slab of ``slab_bytes`` holds ``blocks_per_slab`` token blocks, so the id of a token block alone gives its
    place: ``(id // blocks_per_slab) * slab + (id % blocks_per_slab) * token block``. Inside a token block,
    KV block ``layer * num_kv_heads + head`` holds K as [head_dim, block_size], then V as [block_size, head_dim].
    """

    pool: np.ndarray
    shape: KvShape
    slab_bytes: int

    @property
    def blocks_per_slab(self) -> int:
        """Token blocks of this model in one slab."""
        return self.slab_bytes // self.shape.token_block_bytes

    def block_offsets(self, block_ids: Sequence[int]) -> np.ndarray:
        """Element offset of each token block in ``pool`` (int64, [len(block_ids)])."""
        slab, place = np.divmod(np.asarray(block_ids, dtype=np.int64), self.blocks_per_slab)
        size = self.pool.itemsize
        offsets: np.ndarray = slab * (self.slab_bytes // size) + place * (self.shape.token_block_bytes // size)
        return offsets
