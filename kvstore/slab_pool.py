"""Slabs lent on demand to models, each divided into one model's token blocks. Pure: it counts and accesses no memory.

A block is allocated or free here. Whether an allocated block is in use or cached is known to `block_table`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(slots=True)
class _Holding:
    """The slabs of one model. ``free_indices``: slab → indices of its free blocks, empty for a full slab.

    ``by_num_free``: number of free blocks → slabs with this number, to find the fullest slabs without a search. Dicts
    with None values serve as ordered sets.
    """

    blocks_per_slab: int
    free_indices: dict[int, dict[int, None]] = field(default_factory=dict)
    by_num_free: dict[int, dict[int, None]] = field(default_factory=dict)
    num_free: int = 0

    def add(self, slab: int) -> None:
        """Adds a slab whose blocks are all free."""
        self.free_indices[slab] = dict.fromkeys(range(self.blocks_per_slab - 1, -1, -1))
        self.by_num_free.setdefault(self.blocks_per_slab, {})[slab] = None
        self.num_free += self.blocks_per_slab

    def remove(self, slab: int) -> None:
        """Removes a slab whose blocks are all free."""
        del self.free_indices[slab]
        del self.by_num_free[self.blocks_per_slab][slab]
        self.num_free -= self.blocks_per_slab

    def allocate(self, num_blocks: int) -> list[int]:
        """Returns up to ``num_blocks`` free blocks, those of the fullest slabs first."""
        ids: list[int] = []
        for num_free in sorted(count for count in self.by_num_free if count):
            for slab in list(self.by_num_free[num_free]):
                if len(ids) == num_blocks:
                    return ids
                indices = self.free_indices[slab]
                count = min(num_blocks - len(ids), num_free)
                ids += [slab * self.blocks_per_slab + indices.popitem()[0] for _ in range(count)]
                self._recount(slab, num_free)
                self.num_free -= count
        return ids

    def on_freed(self, slab: int, num_free_before: int) -> None:
        """To be called after blocks of a slab were added to `free_indices`."""
        self._recount(slab, num_free_before)
        self.num_free += len(self.free_indices[slab]) - num_free_before

    def _recount(self, slab: int, num_free_before: int) -> None:
        slabs = self.by_num_free[num_free_before]
        del slabs[slab]
        if not slabs:
            del self.by_num_free[num_free_before]
        self.by_num_free.setdefault(len(self.free_indices[slab]), {})[slab] = None


class SlabPool:
    """Owns which token block belongs to which model.

    Invariant: each slab is free or held by one model, and a held slab has at least one allocated block. The id of a
    token block is ``slab * blocks_per_slab + index``, so an id has a meaning only together with its model.
    """

    def __init__(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self._free_slabs = list(range(num_slabs - 1, -1, -1))
        self._holdings: dict[str, _Holding] = {}

    def add_model(self, model: str, blocks_per_slab: int) -> None:
        """Adds a model without blocks. Raises ValueError if a slab does not hold one of its token blocks."""
        if blocks_per_slab < 1:
            raise ValueError(f"a slab is too small for a token block of {model}")
        assert model not in self._holdings, f"{model} is already added"
        self._holdings[model] = _Holding(blocks_per_slab)

    def remove_model(self, model: str) -> None:
        """Removes a model that has no allocated block."""
        assert not self._holdings[model].free_indices, f"{model} has allocated blocks"
        del self._holdings[model]

    @property
    def num_free_slabs(self) -> int:
        """Slabs that no model holds."""
        return len(self._free_slabs)

    def blocks_per_slab(self, model: str) -> int:
        """Token blocks of ``model`` in one slab."""
        return self._holdings[model].blocks_per_slab

    def slab_of(self, model: str, block_id: int) -> int:
        """The slab of a token block."""
        return block_id // self._holdings[model].blocks_per_slab

    def num_slabs_of(self, model: str) -> int:
        """Slabs that ``model`` holds."""
        return len(self._holdings[model].free_indices)

    def num_free_in_slabs_of(self, model: str) -> int:
        """Token blocks that ``model`` can allocate without another slab."""
        return self._holdings[model].num_free

    def num_allocated_in(self, model: str, slab: int) -> int:
        """Allocated token blocks in a slab that ``model`` holds."""
        holding = self._holdings[model]
        return holding.blocks_per_slab - len(holding.free_indices[slab])

    def num_free_blocks(self, model: str) -> int:
        """Token blocks that ``model`` can allocate, those of free slabs included."""
        holding = self._holdings[model]
        return holding.num_free + self.num_free_slabs * holding.blocks_per_slab

    def capacity_blocks(self, model: str) -> int:
        """Token blocks that ``model`` can allocate in an empty pool."""
        return self.num_slabs * self._holdings[model].blocks_per_slab

    def allocate(self, model: str, num_blocks: int) -> tuple[int, ...] | None:
        """Returns the ids of ``num_blocks`` token blocks, or None if fewer are free.

        Allocates from the fullest slabs first, so that the others drain and become free for other models.
        """
        if num_blocks > self.num_free_blocks(model):
            return None
        holding = self._holdings[model]
        ids = holding.allocate(num_blocks)
        while len(ids) < num_blocks:
            holding.add(self._free_slabs.pop())
            ids += holding.allocate(num_blocks - len(ids))
        return tuple(ids)

    def free(self, model: str, block_ids: Iterable[int]) -> None:
        """Frees token blocks; a slab without allocated blocks becomes free. Raises ValueError for a free block."""
        holding = self._holdings[model]
        for slab, blocks in groupby(block_ids, key=lambda block_id: block_id // holding.blocks_per_slab):
            indices = holding.free_indices.get(slab, {})
            num_free = len(indices)
            for block_id in blocks:
                index = block_id % holding.blocks_per_slab
                if slab not in holding.free_indices or index in indices:
                    raise ValueError(f"token block {block_id} of {model} is not allocated")
                indices[index] = None
            holding.on_freed(slab, num_free)
            if len(indices) == holding.blocks_per_slab:
                holding.remove(slab)
                self._free_slabs.append(slab)

    def check_integrity(self, allocated: Mapping[str, Iterable[int]]) -> None:
        """Proves the invariant. ``allocated``: model → the blocks that its callers hold. Raises AssertionError."""
        seen = list(self._free_slabs)
        for model, holding in self._holdings.items():
            seen += holding.free_indices
            counts = {slab: num_free for num_free, slabs in holding.by_num_free.items() for slab in slabs}
            assert counts == {slab: len(free) for slab, free in holding.free_indices.items()}, f"{model}: counts differ"
            assert holding.num_free == sum(counts.values()), f"{model}: free blocks are miscounted"
            used = set()
            for slab, indices in holding.free_indices.items():
                assert len(indices) < holding.blocks_per_slab, f"slab {slab} of {model} is empty but held"
                first = slab * holding.blocks_per_slab
                used |= {first + index for index in range(holding.blocks_per_slab) if index not in indices}
            held = list(allocated.get(model, ()))
            assert len(set(held)) == len(held), f"a token block of {model} is held twice"
            assert used == set(held), f"{model}: allocated {sorted(used)}, held {sorted(held)}"
        assert allocated.keys() <= self._holdings.keys(), "blocks of an unknown model are held"
        assert sorted(seen) == list(range(self.num_slabs)), "a slab is lost or held twice"
