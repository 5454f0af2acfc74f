"""Which pages of the swap region are free. Pure: it counts and accesses no memory.

The region is host memory beside the pool. The copy of a sequence's KV fills whole pages, which need not be adjacent, so
the region does not fragment.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxmesh.types import SWAP_PAGE_BYTES, blocks_for


class SwapSpace:
    """Owns the pages of the swap region. Invariant: each page is free or allocated once."""

    def __init__(self, num_bytes: int) -> None:
        """``num_bytes``: size of the region; a rest that is smaller than a page is not used."""
        self.num_pages = num_bytes // SWAP_PAGE_BYTES
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def allocate(self, num_bytes: int) -> tuple[int, ...] | None:
        """Returns pages that hold ``num_bytes``, or None if fewer are free."""
        count = blocks_for(num_bytes, SWAP_PAGE_BYTES)
        if count > len(self._free):
            return None
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return tuple(reversed(pages))

    def free(self, pages: Iterable[int]) -> None:
        self._free += sorted(pages, reverse=True)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Proves the invariant. ``held``: the pages of all leases. Raises AssertionError."""
        assert sorted([*self._free, *held]) == list(range(self.num_pages)), "a swap page is lost or held twice"
