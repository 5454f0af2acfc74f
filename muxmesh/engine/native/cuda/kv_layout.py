"""Where the KV of a model lies in a device pool, as kernels take it. Pure arithmetic; knows neither torch nor Triton.

On CUDA, KV block ``layer * num_kv_heads + head`` of a token block holds K as [block_size, head_dim], then V as
[block_size, head_dim]: the elements of one token are neighbours, so that threads load 16 bytes at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from muxmesh.device.kv_view import KvGeometry


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The geometry of a pool, in elements of the KV dtype.

    Token block ``id`` starts at ``(id // blocks_per_slab) * slab_elements + (id % blocks_per_slab) *
    token_block_elements``.
    """

    head_dim: int
    block_size: int
    num_kv_heads: int
    blocks_per_slab: int
    slab_elements: int
    token_block_elements: int

    @classmethod
    def of(cls, geometry: KvGeometry) -> KvLayout:
        """Returns the layout of ``geometry``. Raises ValueError for slabs that are no multiple of an element."""
        shape = geometry.shape
        if geometry.slab_bytes % shape.dtype_bytes:
            raise ValueError(
                f"a slab of {geometry.slab_bytes} bytes holds no whole number of elements of {shape.dtype_bytes} bytes"
            )
        return cls(
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            num_kv_heads=shape.num_kv_heads,
            blocks_per_slab=geometry.blocks_per_slab,
            slab_elements=geometry.slab_bytes // shape.dtype_bytes,
            token_block_elements=shape.token_block_bytes // shape.dtype_bytes,
        )

    @property
    def slab_rest(self) -> int:
        """Elements at the end of a slab that belong to no token block.

        Token block ``id`` starts at ``id * token_block_elements + id // blocks_per_slab * slab_rest``.
        """
        return self.slab_elements - self.blocks_per_slab * self.token_block_elements

    @property
    def one_stride(self) -> bool:
        """Whether token block ``id`` starts at ``id * token_block_elements``."""
        return self.slab_rest == 0

    @property
    def alignment(self) -> int:
        """The K and V of every token start at a multiple of so many elements, 16 at most."""
        return math.gcd(16, self.head_dim, self.token_block_elements, self.slab_rest)
