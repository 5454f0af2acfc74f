"""Which pages of the swap region belong to whom. Pure: it counts, it touches no memory.

The region is host memory beside the pool. A copy of a sequence's KV takes whole pages, any of them, so free pages
never lie in the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxmesh.types import blocks_for

PAGE_BYTES = 16 * 1024


class SwapSpace:
    """Owns the pages. Invariant: each page is free or was given out once."""

    def __init__(self, num_bytes: int) -> None:
        """0 bytes: nothing can be swapped."""
        self.num_pages = num_bytes // PAGE_BYTES
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, num_bytes: int) -> tuple[int, ...] | None:
        """Pages for ``num_bytes``, or None if there is no room: all or nothing."""
        count = blocks_for(num_bytes, PAGE_BYTES)
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return tuple(reversed(taken))

    def give_back(self, pages: Iterable[int]) -> None:
        """These pages are free again."""
        self._free += sorted(pages, reverse=True)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Proves the invariant against the pages that are held; raises AssertionError."""
        assert sorted([*self._free, *held]) == list(range(self.num_pages)), "a swap page is lost or held twice"
