"""Which token blocks are in use, by how many, and which hold a prefix that may be asked for again. Pure.

A block is free (the pool's), in use (referenced by at least one lease) or cached: nobody's, but it holds a published
prefix and gives way when its room is needed, least recently used first. So a cache never refuses anyone memory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.slab_pool import SlabPool
from muxmesh.types import blocks_for


@dataclass(frozen=True, slots=True)
class Taken:
    """Token blocks for a sequence, in order; the first ``num_cached`` hold its beginning already."""

    block_ids: tuple[int, ...]
    num_cached: int


@dataclass(slots=True)
class _ModelBlocks:
    """The blocks of one model that are in use or cached.

    ``references`` has every block in use; ``idle`` every cached one → its last use, least recently used first;
    ``by_hash`` and ``hash_of`` are each other's inverse, over blocks of both kinds. ``idle_in_slab`` counts cached
    blocks, and ``last_use_of_slab`` is the latest use of one, for slabs that have any. Uses are counted, not timed.
    """

    references: Counter[int] = field(default_factory=Counter)
    idle: OrderedDict[int, int] = field(default_factory=OrderedDict)
    by_hash: dict[bytes, int] = field(default_factory=dict)
    hash_of: dict[int, bytes] = field(default_factory=dict)
    idle_in_slab: Counter[int] = field(default_factory=Counter)
    last_use_of_slab: dict[int, int] = field(default_factory=dict)
    num_queried_blocks: int = 0
    num_hit_blocks: int = 0


class BlockTable:
    """Owns the token blocks of a unit through its pool.

    Invariant: each block that the pool says is in use is referenced or cached, and no block is both.
    """

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self._models = {model: _ModelBlocks() for model in pool.models}
        self._clock = 0

    def take(
        self,
        model: str,
        num_blocks: int,
        hashes: Sequence[bytes] = (),
        max_cached: int = 0,
        max_new_slabs: int | None = None,
    ) -> Taken | None:
        """``num_blocks`` blocks, referenced, or None if there is no room: all or nothing.

        The first ones are those cached or in use under the first ``max_cached`` of ``hashes``, as far as they are
        known without a gap. At most ``max_new_slabs`` slabs are added to those that the model uses.
        """
        blocks = self._models[model]
        found: list[int] = []
        for wanted in hashes[: min(max_cached, num_blocks)]:
            if wanted not in blocks.by_hash:
                break
            found.append(blocks.by_hash[wanted])
        for block_id in found:
            self._reference(model, block_id)
        fresh = self._allocate(model, num_blocks - len(found), max_new_slabs)
        if fresh is None:
            self.give_back(model, found)
            return None
        blocks.references.update(fresh)
        blocks.num_queried_blocks += min(max_cached, len(hashes))
        blocks.num_hit_blocks += len(found)
        return Taken((*found, *fresh), len(found))

    def publish(self, model: str, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """The KV of these blocks, all referenced, is computed and stays as it is: others may use it.

        A prefix that is known already stays where it is, and the second copy of it private.
        """
        blocks = self._models[model]
        for block_id, name in zip(block_ids, hashes, strict=False):
            assert blocks.references[block_id] > 0, "only who holds a block can publish it"
            if name not in blocks.by_hash and block_id not in blocks.hash_of:
                blocks.by_hash[name] = block_id
                blocks.hash_of[block_id] = name

    def give_back(self, model: str, block_ids: Sequence[int]) -> None:
        """One reference less for each. What is published stays as cache, ends of sequences going first."""
        blocks = self._models[model]
        self._clock += 1
        for block_id in reversed(block_ids):
            blocks.references[block_id] -= 1
            if blocks.references[block_id] > 0:
                continue
            del blocks.references[block_id]
            if block_id in blocks.hash_of:
                slab = self._pool.slab_of(model, block_id)
                blocks.idle[block_id] = self._clock
                blocks.idle_in_slab[slab] += 1
                blocks.last_use_of_slab[slab] = self._clock
            else:
                self._pool.free(model, (block_id,))

    def num_in_use(self, model: str) -> int:
        """Blocks that somebody has."""
        return len(self._models[model].references)

    def num_cached(self, model: str) -> int:
        """Blocks that nobody has and that hold a prefix."""
        return len(self._models[model].idle)

    def count_cached(self, model: str, hashes: Sequence[bytes]) -> int:
        """How many of the first blocks `take` would find now."""
        known = self._models[model].by_hash
        return next((place for place, wanted in enumerate(hashes) if wanted not in known), len(hashes))

    def num_available(self, model: str) -> int:
        """Blocks that could be had now, caches giving way."""
        return self._room_in_used_slabs(model) + self._num_unused_slabs() * self._pool.blocks_per_slab(model)

    def num_used_slabs(self, model: str) -> int:
        """Slabs in which the model has a block in use: nobody else can have them now."""
        return self._pool.num_slabs_of(model) - len(self._idle_slabs(model))

    def num_slabs_with(self, model: str, num_blocks: int) -> int:
        """Slabs that the model would use with ``num_blocks`` more in use."""
        missing = max(0, num_blocks - self._room_in_used_slabs(model))
        return self.num_used_slabs(model) + blocks_for(missing, self._pool.blocks_per_slab(model))

    def queried_and_hit(self, model: str) -> tuple[int, int]:
        """Blocks that `take` looked for in the cache since the start, and those that were there."""
        return self._models[model].num_queried_blocks, self._models[model].num_hit_blocks

    def check_integrity(self, held: Mapping[str, Counter[int]]) -> None:
        """Proves the invariant against what is held, model → block → how often; raises AssertionError."""
        for model, blocks in self._models.items():
            assert blocks.references == held.get(model, Counter()), f"{model}: references are not what is held"
            assert not blocks.references.keys() & blocks.idle.keys(), f"{model}: a block is in use and cached"
            assert {name: block for block, name in blocks.hash_of.items()} == blocks.by_hash, f"{model}: hashes differ"
            known = blocks.references.keys() | blocks.idle.keys()
            assert blocks.hash_of.keys() <= known, f"{model}: a free block has a hash"
            assert blocks.idle.keys() <= blocks.hash_of.keys(), f"{model}: a cached block has no hash"
            counted = Counter(self._pool.slab_of(model, block_id) for block_id in blocks.idle)
            assert counted == blocks.idle_in_slab, f"{model}: cached blocks are counted wrongly"
            assert blocks.last_use_of_slab.keys() == counted.keys(), f"{model}: a slab's last use is stale"
        self._pool.check_integrity(
            {model: [*blocks.references, *blocks.idle] for model, blocks in self._models.items()}
        )

    def _reference(self, model: str, block_id: int) -> None:
        blocks = self._models[model]
        if block_id in blocks.idle:
            self._no_longer_idle(model, block_id)
        blocks.references[block_id] += 1

    def _no_longer_idle(self, model: str, block_id: int) -> None:
        blocks, slab = self._models[model], self._pool.slab_of(model, block_id)
        del blocks.idle[block_id]
        blocks.idle_in_slab[slab] -= 1
        if not blocks.idle_in_slab[slab]:
            del blocks.idle_in_slab[slab]
            del blocks.last_use_of_slab[slab]

    def _allocate(self, model: str, num_blocks: int, max_new_slabs: int | None) -> tuple[int, ...] | None:
        """Blocks of the pool, of the model's own cache, and of slabs in which others have nothing but cache."""
        most = self._pool.num_slabs if max_new_slabs is None else max_new_slabs
        attainable = min(most, self._num_unused_slabs()) * self._pool.blocks_per_slab(model)
        if num_blocks > self._room_in_used_slabs(model) + attainable:
            return None
        if not self._has_room(model, num_blocks, most):
            self._make_room(model, num_blocks, most)
        return self._pool.allocate(model, num_blocks)

    def _room_in_used_slabs(self, model: str) -> int:
        return self.num_used_slabs(model) * self._pool.blocks_per_slab(model) - self.num_in_use(model)

    def _num_unused_slabs(self) -> int:
        """Free slabs, and those in which there is nothing but cache."""
        return self._pool.num_free_slabs + sum(len(self._idle_slabs(model)) for model in self._models)

    def _has_room(self, model: str, num_blocks: int, max_new_slabs: int) -> bool:
        slabs = min(max_new_slabs, self._pool.num_free_slabs)
        return num_blocks <= self._pool.num_free_in_slabs_of(model) + slabs * self._pool.blocks_per_slab(model)

    def _make_room(self, model: str, num_blocks: int, max_new_slabs: int) -> None:
        """Lets caches give way until there is room, least recently used first: blocks of the model's own, and slabs in
        which other models have nothing but cache.
        """
        idle = self._models[model].idle
        foreign = sorted(
            (self._models[other].last_use_of_slab[slab], other, slab)
            for other in self._models
            if other != model
            for slab in self._idle_slabs(other)
        )[::-1]
        while not self._has_room(model, num_blocks, max_new_slabs):
            useful = foreign and self._pool.num_free_slabs < max_new_slabs
            if idle and not (useful and foreign[-1][0] < next(iter(idle.values()))):
                self._forget(model, next(iter(idle)))
                continue
            _, other, slab = foreign.pop()
            for block_id in [known for known in self._models[other].idle if self._pool.slab_of(other, known) == slab]:
                self._forget(other, block_id)

    def _idle_slabs(self, model: str) -> list[int]:
        """Slabs of the model in which nothing is in use."""
        counts = self._models[model].idle_in_slab
        return [slab for slab, count in counts.items() if count == self._pool.num_used_in(model, slab)]

    def _forget(self, model: str, block_id: int) -> None:
        """A cached block becomes free."""
        blocks = self._models[model]
        self._no_longer_idle(model, block_id)
        del blocks.by_hash[blocks.hash_of.pop(block_id)]
        self._pool.free(model, (block_id,))
