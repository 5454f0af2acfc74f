"""Slabs lent on demand to models, each cut into one model's token blocks. Pure: it counts, it touches no memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Holding:
    """The slabs of one model. ``free_places`` holds every slab of it: slab → free places, perhaps none.

    ``by_room`` has the same slabs by how many free places they have, so that the fullest are found at once.
    """

    blocks_per_slab: int
    free_places: dict[int, dict[int, None]] = field(default_factory=dict)
    by_room: dict[int, dict[int, None]] = field(default_factory=dict)
    num_free: int = 0

    def add(self, slab: int) -> None:
        """A slab came, all of it free."""
        self.free_places[slab] = dict.fromkeys(range(self.blocks_per_slab - 1, -1, -1))
        self.by_room.setdefault(self.blocks_per_slab, {})[slab] = None
        self.num_free += self.blocks_per_slab

    def remove(self, slab: int) -> None:
        """A slab goes, all of it free."""
        del self.free_places[slab]
        del self.by_room[self.blocks_per_slab][slab]
        self.num_free -= self.blocks_per_slab

    def take(self, num_blocks: int) -> list[int]:
        """As many free blocks as there are, at most ``num_blocks``, of the fullest slabs first."""
        ids: list[int] = []
        for room in sorted(room for room in self.by_room if room):
            for slab in list(self.by_room[room]):
                if len(ids) == num_blocks:
                    return ids
                places = self.free_places[slab]
                taken = min(num_blocks - len(ids), room)
                ids += [slab * self.blocks_per_slab + places.popitem()[0] for _ in range(taken)]
                self._moved(slab, room)
                self.num_free -= taken
        return ids

    def give(self, slab: int, place: int) -> None:
        """A block of one of the slabs is free again."""
        places = self.free_places[slab]
        places[place] = None
        self._moved(slab, len(places) - 1)
        self.num_free += 1

    def _moved(self, slab: int, room_before: int) -> None:
        alike = self.by_room[room_before]
        del alike[slab]
        if not alike:
            del self.by_room[room_before]
        self.by_room.setdefault(len(self.free_places[slab]), {})[slab] = None


class SlabPool:
    """Owns which token block belongs to whom.

    Invariant: each slab is free or held by one model; a held slab has at least one block in use. The id of a
    token block is ``slab * blocks_per_slab + place``, so ids mean something only together with their model.
    """

    def __init__(self, num_slabs: int, blocks_per_slab: Mapping[str, int]) -> None:
        """``blocks_per_slab``: model → token blocks of it in one slab, at least 1 each."""
        too_small = [model for model, blocks in blocks_per_slab.items() if blocks < 1]
        if too_small or num_slabs < 1:
            raise ValueError(f"a slab must hold a token block of every model; too small for: {too_small}")
        self.num_slabs = num_slabs
        self._free_slabs = list(range(num_slabs - 1, -1, -1))
        self._holdings = {model: _Holding(blocks) for model, blocks in blocks_per_slab.items()}

    @property
    def num_free_slabs(self) -> int:
        """Slabs that no model holds."""
        return len(self._free_slabs)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that share the pool."""
        return tuple(self._holdings)

    def blocks_per_slab(self, model: str) -> int:
        """Token blocks of ``model`` in one slab."""
        return self._holdings[model].blocks_per_slab

    def slab_of(self, model: str, block_id: int) -> int:
        """The slab that a token block lies in."""
        return block_id // self._holdings[model].blocks_per_slab

    def num_slabs_of(self, model: str) -> int:
        """Slabs that ``model`` holds."""
        return len(self._holdings[model].free_places)

    def num_free_in_slabs_of(self, model: str) -> int:
        """Token blocks that ``model`` could get without another slab."""
        return self._holdings[model].num_free

    def num_used_in(self, model: str, slab: int) -> int:
        """Token blocks in use in a slab that ``model`` holds."""
        holding = self._holdings[model]
        return holding.blocks_per_slab - len(holding.free_places[slab])

    def num_free_blocks(self, model: str) -> int:
        """Token blocks that ``model`` could get now, free slabs included."""
        holding = self._holdings[model]
        return holding.num_free + self.num_free_slabs * holding.blocks_per_slab

    def capacity_blocks(self, model: str) -> int:
        """Token blocks that ``model`` could get in an empty pool."""
        return self.num_slabs * self._holdings[model].blocks_per_slab

    def allocate(self, model: str, num_blocks: int) -> tuple[int, ...] | None:
        """Ids of ``num_blocks`` token blocks, or None if there is no room: all or nothing.

        The fullest slabs are used first, so that the others drain and can go to another model.
        """
        if num_blocks > self.num_free_blocks(model):
            return None
        holding = self._holdings[model]
        ids = holding.take(num_blocks)
        while len(ids) < num_blocks:
            holding.add(self._free_slabs.pop())
            ids += holding.take(num_blocks - len(ids))
        return tuple(ids)

    def free(self, model: str, block_ids: Iterable[int]) -> None:
        """Takes token blocks back. Raises ValueError for a block that is not in use."""
        holding = self._holdings[model]
        for block_id in block_ids:
            slab, place = divmod(block_id, holding.blocks_per_slab)
            places = holding.free_places.get(slab)
            if places is None or place in places:
                raise ValueError(f"token block {block_id} of {model} is not in use")
            holding.give(slab, place)
            if len(places) == holding.blocks_per_slab:
                holding.remove(slab)
                self._free_slabs.append(slab)

    def check_integrity(self, in_use: Mapping[str, Iterable[int]]) -> None:
        """Proves the invariant against the blocks that are known to be in use; raises AssertionError."""
        seen = list(self._free_slabs)
        for model, holding in self._holdings.items():
            seen += holding.free_places
            rooms = {slab: room for room, slabs in holding.by_room.items() for slab in slabs}
            assert rooms == {slab: len(free) for slab, free in holding.free_places.items()}, f"{model}: rooms differ"
            assert holding.num_free == sum(rooms.values()), f"{model}: free blocks are counted wrongly"
            used = set()
            for slab, places in holding.free_places.items():
                assert len(places) < holding.blocks_per_slab, f"slab {slab} of {model} is empty but held"
                assert len(set(places)) == len(places), f"slab {slab} of {model} has a place twice"
                first = slab * holding.blocks_per_slab
                used |= {first + place for place in range(holding.blocks_per_slab)} - {first + p for p in places}
            known = list(in_use.get(model, ()))
            assert len(set(known)) == len(known), f"a token block of {model} is in use twice"
            assert used == set(known), f"{model}: in use {sorted(used)}, known {sorted(known)}"
        assert sorted(seen) == list(range(self.num_slabs)), "a slab is lost or held twice"
