"""One model's view of a pool in host memory: the addresses of its token blocks. Pure arithmetic; copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.models.model_spec import KvShape


@dataclass(frozen=True, slots=True)
class KvView:
    """The pool as f32 elements, and how one model divides its slabs into token blocks.

    A slab of ``slab_bytes`` holds ``blocks_per_slab`` token blocks, so the id of a token block alone gives its offset:
    ``(id // blocks_per_slab) * slab + (id % blocks_per_slab) * token block``. If the slab is a multiple of the token
    block, that is ``id * token block``: one stride over the whole pool. Inside a token block, KV block
    ``layer * num_kv_heads + head`` holds K as [head_dim, block_size], then V as [block_size, head_dim].
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
        slab, index = np.divmod(np.asarray(block_ids, dtype=np.int64), self.blocks_per_slab)
        size = self.pool.itemsize
        offsets: np.ndarray = slab * (self.slab_bytes // size) + index * (self.shape.token_block_bytes // size)
        return offsets
