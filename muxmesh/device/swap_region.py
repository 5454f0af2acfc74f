"""The swap region, mapped into a worker. A copy is a list of pages in order, which may be anywhere in the region.

kvstore allocates the pages; the format of a copy is `kv_codec`'s.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import numpy as np

from muxmesh.types import SWAP_PAGE_BYTES


class SwapRegion:
    """The whole region, mapped."""

    def __init__(self, fd: int) -> None:
        """Maps the whole file; the caller closes ``fd``."""
        self._bytes = np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8)

    def copy(self, pages: Sequence[int]) -> SwapCopy:
        """Returns a reader and writer of the copy in these pages, at its first byte."""
        return SwapCopy(self._bytes, pages)


class SwapPosition:
    """A position in the bytes of a copy, which are in the pages of the region in order."""

    def __init__(self, pages: Sequence[int]) -> None:
        self._runs = _runs(pages)
        self._at, self._end = 0, 0

    def advance(self, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Half-open byte ranges of the region that hold the next ``num_bytes``, each as long as possible."""
        while num_bytes:
            if self._at == self._end:
                self._at, self._end = next(self._runs)
            size = min(num_bytes, self._end - self._at)
            yield self._at, self._at + size
            self._at += size
            num_bytes -= size


class SwapCopy:
    """`Sink` and `Source` of `muxmesh.device.kv_codec` over the pages of one copy. Has one position for both."""

    def __init__(self, region: np.ndarray, pages: Sequence[int]) -> None:
        """``region``: the bytes of the whole region, u8."""
        self._region = region
        self._position = SwapPosition(pages)

    def write(self, piece: np.ndarray) -> None:
        flat = piece.reshape(-1).view(np.uint8)
        done = 0
        for part in self._parts(flat.size):
            part[:] = flat[done : done + part.size]
            done += part.size

    def read_into(self, piece: np.ndarray) -> None:
        flat = piece.reshape(-1).view(np.uint8)
        done = 0
        for part in self._parts(flat.size):
            flat[done : done + part.size] = part
            done += part.size

    def skip(self, num_bytes: int) -> None:
        for _ in self._parts(num_bytes):
            pass

    def _parts(self, num_bytes: int) -> Iterator[np.ndarray]:
        """Views of the next ``num_bytes`` in the region."""
        for first, end in self._position.advance(num_bytes):
            yield self._region[first:end]


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Half-open byte ranges of runs of consecutive pages, each as long as possible."""
    first = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[first] * SWAP_PAGE_BYTES, (pages[index - 1] + 1) * SWAP_PAGE_BYTES
            first = index
