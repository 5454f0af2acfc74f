"""Where a model's token blocks lie in a pool, for any device, and the view of a pool in host memory. Copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.models.model_spec import KvShape


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """How one model divides the slabs of a pool into token blocks.

    A slab of ``slab_bytes`` holds ``blocks_per_slab`` token blocks, so the id of a token block alone gives its offset:
    ``(id // blocks_per_slab) * slab + (id % blocks_per_slab) * token block``. If the slab is a multiple of the token
    block, that is ``id * token block``: one stride over the whole pool. Inside a token block, KV block
    ``layer * num_kv_heads + head`` holds K, then V as [block_size, head_dim]. K is [head_dim, block_size] in host
    memory, and [block_size, head_dim] on a GPU.
    """

    shape: KvShape
    slab_bytes: int

    @property
    def blocks_per_slab(self) -> int:
        """Token blocks of this model in one slab."""
        return self.slab_bytes // self.shape.token_block_bytes

    def block_offsets(self, block_ids: Sequence[int]) -> np.ndarray:
        """Offset of each token block in the pool, in elements of the model's KV dtype (int64, [len(block_ids)])."""
        slab, index = np.divmod(np.asarray(block_ids, dtype=np.int64), self.blocks_per_slab)
        size = self.shape.dtype_bytes
        offsets: np.ndarray = slab * (self.slab_bytes // size) + index * (self.shape.token_block_bytes // size)
        return offsets


@dataclass(frozen=True, slots=True)
class KvView(KvGeometry):
    """The geometry with the pool itself: ``pool`` is the whole pool in host memory, as elements of the KV dtype."""

    pool: np.ndarray
