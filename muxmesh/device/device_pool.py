"""The KV pool of a unit, mapped into a worker, and copies of sequences between the pool and the swap region.

`DevicePool` is the seam between a worker and the kind of memory of its unit: outside of engines, only its
implementations touch KV bytes. It knows block ids and pages, no lease.
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
    """A copy of one sequence in the swap region: the KV of its first ``num_tokens`` tokens, in ``swap_pages``."""

    num_tokens: int
    kv_format: KvFormat
    swap_pages: tuple[int, ...]


class DevicePool(Protocol):
    """The pool, mapped into this process. Copies block until they are done. One thread at a time may copy."""

    @property
    def has_swap(self) -> bool:
        """True if the unit has a swap region."""

    def copy_bytes(self, shape: KvShape, num_tokens: int, kv_format: KvFormat) -> int:
        """Returns the bytes that a copy of ``num_tokens`` tokens takes in the swap region."""

    def copy_out(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy) -> int:
        """Copies KV from the sequence's token blocks to the swap pages. Returns the bytes written."""

    def copy_in(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy, num_cached_blocks: int) -> int:
        """Copies KV back to the sequence's token blocks, except the first ``num_cached_blocks``.

        Returns the bytes read.
        """


class HostPool:
    """`DevicePool` in host memory."""

    def __init__(self, memory: np.ndarray, slab_bytes: int, swap: SwapRegion | None) -> None:
        """``memory``: the whole pool as one f32 array. ``swap`` is None if the unit has no swap region."""
        self._memory = memory
        self._slab_bytes = slab_bytes
        self._swap = swap

    @classmethod
    def map(cls, pool_fd: int, slab_bytes: int, swap_fd: int | None) -> HostPool:
        """Maps a pool, and a swap region if there is one. The caller closes the file descriptors."""
        memory = np.frombuffer(mmap.mmap(pool_fd, 0), dtype=np.float32)
        return cls(memory, slab_bytes, None if swap_fd is None else SwapRegion(swap_fd))

    @property
    def has_swap(self) -> bool:
        return self._swap is not None

    def view(self, shape: KvShape) -> KvView:
        """Returns a view of one model's token blocks, for engines that compute in host memory."""
        return KvView(shape, self._slab_bytes, self._memory)

    def copy_bytes(self, shape: KvShape, num_tokens: int, kv_format: KvFormat) -> int:
        return encoded_bytes(shape, num_tokens, kv_format)

    def copy_out(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy) -> int:
        encode(self.view(shape), block_ids, copy.num_tokens, copy.kv_format, self._region.copy(copy.swap_pages))
        return encoded_bytes(shape, copy.num_tokens, copy.kv_format)

    def copy_in(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy, num_cached_blocks: int) -> int:
        source = self._region.copy(copy.swap_pages)
        decode(self.view(shape), block_ids, copy.num_tokens, copy.kv_format, source, num_cached_blocks)
        skipped = num_cached_blocks * shape.token_block_bytes if copy.kv_format == "raw" else 0
        return encoded_bytes(shape, copy.num_tokens, copy.kv_format) - skipped

    @property
    def _region(self) -> SwapRegion:
        assert self._swap is not None, "the unit has a swap region"
        return self._swap
