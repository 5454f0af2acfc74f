"""Which pages of the swap region are free. Pure: it counts and accesses no memory.

The region is host memory beside the pool. The copy of a sequence's KV fills whole pages, which need not be adjacent, so
a copy fits whenever enough pages are free. Adjacent pages are copied at once, and short copies are slow on a GPU, so a
copy gets as few runs of pages as possible.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from muxmesh.types import SWAP_PAGE_BYTES, blocks_for


class SwapSpace:
    """Owns the pages of the swap region. Invariant: each page is free or allocated once.

    Free pages are runs, half-open, of adjacent pages that no other free page is adjacent to.
    """

    def __init__(self, num_bytes: int) -> None:
        """``num_bytes``: size of the region; a rest that is smaller than a page is not used."""
        self.num_pages = num_bytes // SWAP_PAGE_BYTES
        self._ends: dict[int, int] = {}
        """First page of each free run → the page after its last."""
        self._firsts: dict[int, int] = {}
        """The page after the last of each free run → its first."""
        self._by_length: list[tuple[int, int]] = []
        """Length and first page of each free run, ascending."""
        self.num_free_pages = self.num_pages
        if self.num_pages:
            self._add(0, self.num_pages)

    def allocate(self, num_bytes: int) -> tuple[int, ...] | None:
        """Returns pages that hold ``num_bytes``, or None if fewer are free.

        They are one run if one is long enough, the shortest such; else the longest runs and a part of a further one.
        """
        count = blocks_for(num_bytes, SWAP_PAGE_BYTES)
        if count > self.num_free_pages:
            return None
        pages: list[int] = []
        while count:
            fitting = bisect_left(self._by_length, (count, 0))
            length, first = self._by_length[min(fitting, len(self._by_length) - 1)]
            end = first + min(count, length)
            self._remove(first)
            if end < first + length:
                self._add(end, first + length)
            pages += range(first, end)
            count -= end - first
        self.num_free_pages -= len(pages)
        return tuple(pages)

    def free(self, pages: Iterable[int]) -> None:
        ordered = sorted(pages)
        self.num_free_pages += len(ordered)
        index = 0
        while index < len(ordered):
            first = index
            while index + 1 < len(ordered) and ordered[index + 1] == ordered[index] + 1:
                index += 1
            index += 1
            self._add_joined(ordered[first], ordered[index - 1] + 1)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Proves the invariant. ``held``: the pages of all leases. Raises AssertionError."""
        free = [page for first, end in self._ends.items() for page in range(first, end)]
        assert sorted([*free, *held]) == list(range(self.num_pages)), "a swap page is lost or held twice"
        assert len(free) == self.num_free_pages, "free swap pages are miscounted"
        runs = sorted((end - first, first) for first, end in self._ends.items())
        assert runs == self._by_length, "free swap pages are in two lists"
        assert {end: first for first, end in self._ends.items()} == self._firsts, "free swap pages are in two lists"
        assert not set(self._ends) & set(self._ends.values()), "adjacent free swap pages are in two runs"

    def _add_joined(self, first: int, end: int) -> None:
        """Adds a free run, and joins it with the free runs that it is adjacent to."""
        if first in self._firsts:
            first = self._firsts[first]
            self._remove(first)
        if end in self._ends:
            end = self._remove(end)
        self._add(first, end)

    def _add(self, first: int, end: int) -> None:
        self._ends[first] = end
        self._firsts[end] = first
        insort(self._by_length, (end - first, first))

    def _remove(self, first: int) -> int:
        """Removes a free run; returns its end."""
        end = self._ends.pop(first)
        del self._firsts[end]
        del self._by_length[bisect_left(self._by_length, (end - first, first))]
        return end
