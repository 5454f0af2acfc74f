"""The swap region as a worker writes and reads it: a copy is in pages, in order, which may be anywhere in it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import numpy as np

from muxmesh.types import SWAP_PAGE_BYTES


class SwapRegion:
    """The mapped region."""

    def __init__(self, fd: int) -> None:
        self._bytes = np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8)

    def copy(self, pages: Sequence[int]) -> SwapCopy:
        """A reader or writer of the copy in these pages, at its beginning."""
        return SwapCopy(self._bytes, pages)


class SwapCopy:
    """`Sink` and `Source` of `muxmesh.device.kv_codec`: consecutive bytes over the pages of one copy."""

    def __init__(self, region: np.ndarray, pages: Sequence[int]) -> None:
        self._region = region
        self._runs = _runs(pages)
        self._at, self._end = 0, 0

    def write(self, piece: np.ndarray) -> None:
        """The next bytes of the copy."""
        flat = piece.reshape(-1).view(np.uint8)
        done = 0
        for part in self._parts(flat.size):
            part[:] = flat[done : done + part.size]
            done += part.size

    def read_into(self, piece: np.ndarray) -> None:
        """Fills ``piece`` with the next bytes of the copy."""
        flat = piece.reshape(-1).view(np.uint8)
        done = 0
        for part in self._parts(flat.size):
            flat[done : done + part.size] = part
            done += part.size

    def skip(self, num_bytes: int) -> None:
        """Skips bytes of the copy."""
        for _ in self._parts(num_bytes):
            pass

    def _parts(self, num_bytes: int) -> Iterator[np.ndarray]:
        """Views of the next ``num_bytes`` in the region."""
        while num_bytes:
            if self._at == self._end:
                self._at, self._end = next(self._runs)
            size = min(num_bytes, self._end - self._at)
            yield self._region[self._at : self._at + size]
            self._at += size
            num_bytes -= size


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Byte ranges of consecutive pages, as long as possible."""
    first = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[first] * SWAP_PAGE_BYTES, (pages[index - 1] + 1) * SWAP_PAGE_BYTES
            first = index
