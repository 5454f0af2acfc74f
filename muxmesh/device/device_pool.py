"""The KV pool of a unit as a worker reaches it, and copies of sequences between it and the swap region.

`DevicePool` is the seam between a worker and the kind of memory that its unit has. Everything that touches KV bytes
outside of an engine is behind it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from muxmesh.device.kv_codec import decode, encode, encoded_bytes
from muxmesh.device.kv_view import KvView
from muxmesh.device.swap_region import SwapRegion
from muxmesh.models.model_spec import KvShape
from muxmesh.types import KvFormat


@dataclass(frozen=True, slots=True)
class KvCopy:
    """What a copy of a sequence consists of: the KV of ``num_tokens`` tokens, in ``swap_pages`` in ``kv_format``."""

    num_tokens: int
    kv_format: KvFormat
    swap_pages: tuple[int, ...]


class DevicePool(Protocol):
    """The pool, mapped into this process. Copies block until they are done; one thread at a time may copy."""

    @property
    def has_swap(self) -> bool:
        """True if the unit has memory to swap to."""

    def copy_out(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy) -> int:
        """Copies KV from token blocks to swap pages; returns the bytes written."""

    def copy_in(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy, num_cached_blocks: int) -> int:
        """Copies KV back to token blocks, without the first ``num_cached_blocks``; returns the bytes read."""


class HostPool:
    """`DevicePool` in host memory."""

    def __init__(self, memory: np.ndarray, slab_bytes: int, swap: SwapRegion | None) -> None:
        """``memory``: the whole pool, one array of f32."""
        self._memory = memory
        self._slab_bytes = slab_bytes
        self._swap = swap

    @classmethod
    def map(cls, pool_fd: int, slab_bytes: int, swap_fd: int | None) -> HostPool:
        """Maps a pool, and a swap region, from file descriptors, which the caller closes."""
        memory = np.frombuffer(mmap.mmap(pool_fd, 0), dtype=np.float32)
        return cls(memory, slab_bytes, None if swap_fd is None else SwapRegion(swap_fd))

    @property
    def has_swap(self) -> bool:
        """See `DevicePool`."""
        return self._swap is not None

    def view(self, shape: KvShape) -> KvView:
        """One model's token blocks, for engines that compute in host memory."""
        return KvView(self._memory, shape, self._slab_bytes)

    def copy_out(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy) -> int:
        """See `DevicePool`."""
        encode(self.view(shape), block_ids, copy.num_tokens, copy.kv_format, self._region.copy(copy.swap_pages))
        return encoded_bytes(shape, copy.num_tokens, copy.kv_format)

    def copy_in(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy, num_cached_blocks: int) -> int:
        """See `DevicePool`."""
        source = self._region.copy(copy.swap_pages)
        decode(self.view(shape), block_ids, copy.num_tokens, copy.kv_format, source, num_cached_blocks)
        skipped = num_cached_blocks * shape.token_block_bytes if copy.kv_format == "raw" else 0
        return encoded_bytes(shape, copy.num_tokens, copy.kv_format) - skipped

    @property
    def _region(self) -> SwapRegion:
        assert self._swap is not None, "the unit has a swap region"
        return self._swap
