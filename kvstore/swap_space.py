"""Which pages of the swap region belong to which copy. Pure: it counts, it touches no memory.

The region is host memory beside the pool. A copy of a sequence's KV is in whole pages, any of them, so the region does
not fragment.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxmesh.types import SWAP_PAGE_BYTES, blocks_for


class SwapSpace:
    """Owns the pages. Invariant: each page is free or allocated once."""

    def __init__(self, num_bytes: int) -> None:
        """0 bytes: nothing can be swapped."""
        self.num_pages = num_bytes // SWAP_PAGE_BYTES
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        """Pages that are not allocated."""
        return len(self._free)

    def allocate(self, num_bytes: int) -> tuple[int, ...] | None:
        """Pages for ``num_bytes``, or None if there are not as many: all or nothing."""
        count = blocks_for(num_bytes, SWAP_PAGE_BYTES)
        if count > len(self._free):
            return None
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return tuple(reversed(pages))

    def free(self, pages: Iterable[int]) -> None:
        """Frees pages."""
        self._free += sorted(pages, reverse=True)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Proves the invariant against the pages that are held; raises AssertionError."""
        assert sorted([*self._free, *held]) == list(range(self.num_pages)), "a swap page is lost or held twice"
