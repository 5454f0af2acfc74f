"""The swap region as the device's copy engine sees it: host memory that is pinned piece by piece, as it is used.

kvstore allocates the pages. Pinned memory is committed, so a chunk of `CHUNK_BYTES` is registered with the driver when
a copy first touches it, and stays registered for the life of the process. Only workers that swap have this object.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from muxmesh.device.swap_region import SwapPosition
from muxmesh.device.torch_device import TorchDevice
from muxmesh.errors import DeviceError

CHUNK_BYTES = 64 << 20
_SHORT_BYTES = 128 << 10
"""Mean length of ranges below which the host arranges the bytes.

A copy of one range costs about 14 us, however short it is; in that time the host copies as much by itself.
"""

Register = Callable[[int, int], None]
"""Pins (address, num_bytes) of mapped host memory in the context of the calling thread. Raises DeviceError."""


class PinnedSwap:
    """The whole region, mapped. One thread at a time may copy."""

    def __init__(self, fd: int, device: TorchDevice, register: Register | None, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Maps the whole file; the caller closes ``fd``. ``register`` is None if the device needs no pinned memory.

        ``chunk_bytes`` is a multiple of the machine's page size.
        """
        self._region = torch.frombuffer(mmap.mmap(fd, 0), dtype=torch.uint8)
        self._device = device
        self._register = register
        self._chunk_bytes = chunk_bytes
        self._registered: set[int] = set()

    def copy(self, pages: Sequence[int]) -> PinnedCopy:
        """Returns a reader and writer of the copy in these pages, at its first byte."""
        return PinnedCopy(self, SwapPosition(pages))

    def write(self, ranges: Sequence[tuple[int, int]], piece: Tensor) -> None:
        """Copies ``piece`` (uint8, on the device) to half-open byte ranges of the region, one after the other.

        Enqueued on the present stream, except for short ranges.
        """
        if _are_short(ranges, piece.numel()):
            array, done = self._device.download(piece)(), 0
            host = self._region.numpy()
            for first, end in ranges:
                host[first:end] = array[done : done + end - first]
                done += end - first
            return
        for (first, end), part in self._parts(ranges, piece):
            self._region[first:end].copy_(part, non_blocking=True)

    def read(self, ranges: Sequence[tuple[int, int]], num_bytes: int) -> Tensor:
        """Returns the bytes of ranges of the region, which are ``num_bytes``, on the device (uint8).

        Enqueued on the present stream.
        """
        if _are_short(ranges, num_bytes):
            host = self._region.numpy()
            return self._device.upload(np.concatenate([host[first:end] for first, end in ranges]))
        piece = torch.empty(num_bytes, dtype=torch.uint8, device=self._device.torch_device)
        for (first, end), part in self._parts(ranges, piece):
            part.copy_(self._region[first:end], non_blocking=True)
        return piece

    def _parts(self, ranges: Sequence[tuple[int, int]], piece: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Ranges within one chunk each, registered, and their parts of ``piece``: no copy may cross registrations."""
        done = 0
        for first, end in ranges:
            while first < end:
                chunk = first // self._chunk_bytes
                last = min(end, (chunk + 1) * self._chunk_bytes)
                self._ensure_registered(chunk)
                yield (first, last), piece[done : done + last - first]
                done += last - first
                first = last  # noqa: PLW2901 - the rest of the range

    def _ensure_registered(self, chunk: int) -> None:
        if self._register is None or chunk in self._registered:
            return
        first = chunk * self._chunk_bytes
        num_bytes = min(self._chunk_bytes, self._region.numel() - first)
        try:
            self._register(self._region.data_ptr() + first, num_bytes)
        except DeviceError as error:
            raise DeviceError(
                f"cannot pin {num_bytes} bytes of the swap region: {error}; raise the limit of locked memory "
                "(`ulimit -l`, or `--ulimit memlock=-1` of a container) or the container's memory, or lower kv_swap"
            ) from error
        self._registered.add(chunk)


class PinnedCopy:
    """Reads or writes the bytes of one copy in order."""

    def __init__(self, swap: PinnedSwap, position: SwapPosition) -> None:
        self._swap = swap
        self._position = position

    def write(self, piece: Tensor) -> None:
        """Appends the bytes of ``piece`` (uint8, contiguous). See `PinnedSwap.write`."""
        self._swap.write(list(self._position.advance(piece.numel())), piece)

    def read(self, num_bytes: int) -> Tensor:
        """Returns the next ``num_bytes``. See `PinnedSwap.read`."""
        return self._swap.read(list(self._position.advance(num_bytes)), num_bytes)

    def skip(self, num_bytes: int) -> None:
        """Skips the next ``num_bytes``."""
        for _ in self._position.advance(num_bytes):
            pass


def _are_short(ranges: Sequence[tuple[int, int]], num_bytes: int) -> bool:
    return len(ranges) > 1 and num_bytes < len(ranges) * _SHORT_BYTES
