"""The KV pool of a unit on a GPU as one tensor, and copies of sequences between it and the swap region.

A copy is a stream of bytes: token blocks as they are (`raw`) or quantized on the device (`int8`). Token blocks of one
sequence are scattered over the pool, and its swap pages over the region, so one kernel gathers token blocks into a
buffer, and the copy engine moves the buffer in pieces as long as the runs of pages. Reading device memory twice costs
3 % of the time that the bytes need on the bus, while pieces of 16 KiB would need 50 times as long.

    pool --gather--> buffer --copy engine--> pages of the region          copy_out
    pool <--scatter- buffer <--copy engine-- pages of the region          copy_in

All of it is on the copy stream, beside compute, which no event holds up. The steps that wrote a sequence's KV have
ended by then: a runner returns from a step after the device has finished it, and the sequence is swapped after that.
In the same way the copy has ended before the sequence is computed again, because the methods block until it has.

Beside the pool a copy takes device memory: `raw` one buffer, `int8` twice the KV of a group of up to 255 tokens and
64 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from muxmesh.device.device_kv_codec import decode_group, encode_group
from muxmesh.device.device_pool import KvCopy
from muxmesh.device.kv_codec import encoded_bytes, groups
from muxmesh.device.kv_view import KvGeometry
from muxmesh.device.pinned_swap import PinnedCopy, PinnedSwap
from muxmesh.device.torch_device import TorchDevice, device_errors, finished
from muxmesh.models.model_spec import KvShape
from muxmesh.types import KvFormat, blocks_for

_BUFFER_BYTES = 32 << 20
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class CudaPool:
    """`DevicePool` in memory of a `TorchDevice`. Copies raise DeviceError if memory cannot be allocated or pinned, and
    DeviceLost after a fault of the device.
    """

    def __init__(
        self,
        memory: Tensor,
        slab_bytes: int,
        swap: PinnedSwap | None,
        device: TorchDevice,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        """``memory``: the whole pool (uint8, one dimension) on the device. ``swap`` is None if there is no region.

        ``buffer_bytes``: size of the buffer of raw copies on the device, at least one token block.
        """
        self._memory = memory
        self._slab_bytes = slab_bytes
        self._swap = swap
        self._device = device
        self._buffer_bytes = buffer_bytes

    @property
    def has_swap(self) -> bool:
        return self._swap is not None

    @property
    def device(self) -> TorchDevice:
        return self._device

    def geometry(self, shape: KvShape) -> KvGeometry:
        """Where the token blocks of a model lie."""
        return KvGeometry(shape, self._slab_bytes)

    def elements(self, dtype: torch.dtype) -> Tensor:
        """The whole pool as elements of ``dtype``, for engines."""
        size = dtype.itemsize
        return self._memory[: self._memory.numel() // size * size].view(dtype)

    def copy_bytes(self, shape: KvShape, num_tokens: int, kv_format: KvFormat) -> int:
        return encoded_bytes(shape, num_tokens, kv_format)

    def copy_out(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy) -> int:
        block_ids = block_ids[: blocks_for(copy.num_tokens, shape.block_size)]
        with device_errors("copying KV to the swap region"), self._device.copying(), finished(self._device):
            target = self._region.copy(copy.swap_pages)
            if copy.kv_format == "raw":
                self._write_raw(shape, block_ids, target)
            else:
                self._write_int8(shape, block_ids, copy.num_tokens, target)
        return encoded_bytes(shape, copy.num_tokens, copy.kv_format)

    def copy_in(self, shape: KvShape, block_ids: Sequence[int], copy: KvCopy, num_cached_blocks: int) -> int:
        block_ids = block_ids[: blocks_for(copy.num_tokens, shape.block_size)]
        skipped = num_cached_blocks * shape.token_block_bytes if copy.kv_format == "raw" else 0
        with device_errors("copying KV from the swap region"), self._device.copying(), finished(self._device):
            source = self._region.copy(copy.swap_pages)
            if copy.kv_format == "raw":
                source.skip(skipped)
                self._read_raw(shape, block_ids[num_cached_blocks:], source)
            else:
                self._read_int8(shape, block_ids, copy.num_tokens, source, num_cached_blocks)
        return encoded_bytes(shape, copy.num_tokens, copy.kv_format) - skipped

    def _write_raw(self, shape: KvShape, block_ids: Sequence[int], target: PinnedCopy) -> None:
        blocks = self._token_blocks(shape)
        for some in self._batches(shape, block_ids):
            target.write(blocks[self._at(shape, some)].flatten().view(torch.uint8))

    def _read_raw(self, shape: KvShape, block_ids: Sequence[int], source: PinnedCopy) -> None:
        blocks = self._token_blocks(shape)
        for some in self._batches(shape, block_ids):
            data = source.read(len(some) * shape.token_block_bytes)
            blocks[self._at(shape, some)] = data.view(blocks.dtype).view(len(some), -1)

    def _write_int8(self, shape: KvShape, block_ids: Sequence[int], num_tokens: int, target: PinnedCopy) -> None:
        blocks = self._token_blocks(shape)
        heads = shape.num_layers * shape.num_kv_heads
        for first, end in groups(shape, num_tokens):
            data = blocks[self._at(shape, block_ids[first:end])].flatten().view(kv_dtype(shape))
            data = data.view(end - first, heads, 2, shape.block_size, shape.head_dim)
            target.write(encode_group(data, shape, _num_tokens(shape, num_tokens, first, end)))

    def _read_int8(
        self, shape: KvShape, block_ids: Sequence[int], num_tokens: int, source: PinnedCopy, num_cached: int
    ) -> None:
        blocks = self._token_blocks(shape)
        for first, end in groups(shape, num_tokens):
            data = source.read(encoded_bytes(shape, _num_tokens(shape, num_tokens, first, end), "int8"))
            kept = max(0, num_cached - first)
            if kept >= end - first:
                continue
            restored = decode_group(data, shape, end - first, kv_dtype(shape))[kept:]
            blocks[self._at(shape, block_ids[first + kept : end])] = restored.flatten(1).view(blocks.dtype)

    def _token_blocks(self, shape: KvShape) -> Tensor:
        """The pool as [slabs, token blocks of a slab, words of a token block]; the longest words that fit."""
        block_bytes = shape.token_block_bytes
        slab_bytes = self._slab_bytes // shape.dtype_bytes * shape.dtype_bytes  # as `KvGeometry` counts, in elements
        word = math.gcd(8, slab_bytes, block_bytes)
        return self.elements(_WORDS[word]).as_strided(
            (self._memory.numel() // slab_bytes, slab_bytes // block_bytes, block_bytes // word),
            (slab_bytes // word, block_bytes // word, 1),
        )

    def _at(self, shape: KvShape, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Indices of token blocks in `_token_blocks`, on the device."""
        at = np.divmod(np.asarray(block_ids, dtype=np.int64), self.geometry(shape).blocks_per_slab)
        slabs, indices = self._device.upload(np.stack(at))
        return slabs, indices

    def _batches(self, shape: KvShape, block_ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Token blocks that fit in the buffer together."""
        count = max(1, self._buffer_bytes // shape.token_block_bytes)
        for first in range(0, len(block_ids), count):
            yield block_ids[first : first + count]

    @property
    def _region(self) -> PinnedSwap:
        assert self._swap is not None, "the unit has a swap region"
        return self._swap


def kv_dtype(shape: KvShape) -> torch.dtype:
    """The dtype of a model's KV."""
    if shape.dtype_bytes == 4:
        return torch.float32
    return torch.bfloat16 if shape.is_bfloat16 else torch.float16


def _num_tokens(shape: KvShape, num_tokens: int, first: int, end: int) -> int:
    """Tokens in the blocks [first, end) of a sequence of ``num_tokens``."""
    return min(num_tokens, end * shape.block_size) - first * shape.block_size
