"""Which token blocks are in use, by how many leases, and which are cached prefixes. Pure.

A block is free (in the pool), in use (referenced by at least one lease) or cached: not referenced, but holding a
published prefix. Cached blocks are evicted when their memory is needed, least recently used first, so the cache never
refuses anyone memory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.slab_pool import SlabPool
from muxmesh.types import blocks_for


@dataclass(frozen=True, slots=True)
class AllocatedBlocks:
    """Token blocks of a sequence, in order; the first ``num_cached`` hold its prefix already."""

    block_ids: tuple[int, ...]
    num_cached: int


@dataclass(slots=True)
class _ModelBlocks:
    """The blocks of one model that are in use or cached.

    ``references`` has every block in use; ``cached`` every cached one → its last use, least recently used first;
    ``by_hash`` and ``hash_of`` are each other's inverse, over blocks of both kinds. ``cached_in_slab`` counts cached
    blocks, and ``last_use_of_slab`` is the latest use of one, for slabs that have any. Uses are counted, not timed.
    """

    references: Counter[int] = field(default_factory=Counter)
    cached: OrderedDict[int, int] = field(default_factory=OrderedDict)
    by_hash: dict[bytes, int] = field(default_factory=dict)
    hash_of: dict[int, bytes] = field(default_factory=dict)
    cached_in_slab: Counter[int] = field(default_factory=Counter)
    last_use_of_slab: dict[int, int] = field(default_factory=dict)
    num_queried_blocks: int = 0
    num_hit_blocks: int = 0


class BlockTable:
    """Owns the token blocks of a unit through its pool.

    Invariant: each block that the pool counts as in use is referenced or cached, and no block is both.
    """

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self._models: dict[str, _ModelBlocks] = {}
        self._clock = 0

    def add_model(self, model: str, blocks_per_slab: int) -> None:
        """A model shares the pool from now on. Raises ValueError if a slab does not hold one of its token blocks."""
        self._pool.add_model(model, blocks_per_slab)
        self._models[model] = _ModelBlocks()

    def remove_model(self, model: str) -> None:
        """Evicts the cache of a model that has no block in use; it shares the pool no longer."""
        blocks = self._models[model]
        assert not blocks.references, f"{model} has blocks in use"
        for block_id in list(blocks.cached):
            self._evict(model, block_id)
        del self._models[model]
        self._pool.remove_model(model)

    def allocate(
        self,
        model: str,
        num_blocks: int,
        hashes: Sequence[bytes] = (),
        max_cached: int = 0,
        max_new_slabs: int | None = None,
    ) -> AllocatedBlocks | None:
        """``num_blocks`` blocks, referenced, or None if there are not as many: all or nothing.

        The first ones are the longest known prefix of the first ``max_cached`` of ``hashes``, cached or in use. At
        most ``max_new_slabs`` slabs are added to those that the model uses.
        """
        blocks = self._models[model]
        prefix = self._match_prefix(model, hashes[: min(max_cached, num_blocks)])
        for block_id in prefix:
            self._reference(model, block_id)
        fresh = self._allocate_fresh(model, num_blocks - len(prefix), max_new_slabs)
        if fresh is None:
            self.free(model, prefix)
            return None
        blocks.references.update(fresh)
        blocks.num_queried_blocks += min(max_cached, len(hashes))
        blocks.num_hit_blocks += len(prefix)
        return AllocatedBlocks((*prefix, *fresh), len(prefix))

    def insert_prefix(self, model: str, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Publishes computed blocks, all referenced, under their hashes: other sequences may use them.

        A hash that is known already keeps its block, and the second copy stays private.
        """
        blocks = self._models[model]
        for block_id, block_hash in zip(block_ids, hashes, strict=False):
            assert blocks.references[block_id] > 0, "only referenced blocks are published"
            if block_hash not in blocks.by_hash and block_id not in blocks.hash_of:
                blocks.by_hash[block_hash] = block_id
                blocks.hash_of[block_id] = block_hash

    def free(self, model: str, block_ids: Sequence[int]) -> None:
        """Removes one reference from each block. Published ones stay cached; ends of sequences are evicted first."""
        blocks = self._models[model]
        self._clock += 1
        for block_id in reversed(block_ids):
            blocks.references[block_id] -= 1
            if blocks.references[block_id] > 0:
                continue
            del blocks.references[block_id]
            if block_id in blocks.hash_of:
                slab = self._pool.slab_of(model, block_id)
                blocks.cached[block_id] = self._clock
                blocks.cached_in_slab[slab] += 1
                blocks.last_use_of_slab[slab] = self._clock
            else:
                self._pool.free(model, (block_id,))

    def num_in_use(self, model: str) -> int:
        """Referenced blocks."""
        return len(self._models[model].references)

    def num_cached(self, model: str) -> int:
        """Cached blocks."""
        return len(self._models[model].cached)

    def count_cached(self, model: str, hashes: Sequence[bytes]) -> int:
        """How many of the first blocks `allocate` would find now."""
        return len(self._match_prefix(model, hashes))

    def num_available(self, model: str) -> int:
        """Blocks that can be allocated now, by evicting caches."""
        return self._num_free_in_used_slabs(model) + self._num_unused_slabs() * self._pool.blocks_per_slab(model)

    def num_used_slabs(self, model: str) -> int:
        """Slabs in which the model has a block in use: no other model can have them now."""
        return self._pool.num_slabs_of(model) - len(self._unused_slabs_of(model))

    def num_slabs_with(self, model: str, num_blocks: int) -> int:
        """Slabs that the model would use with ``num_blocks`` more blocks in use."""
        missing = max(0, num_blocks - self._num_free_in_used_slabs(model))
        return self.num_used_slabs(model) + blocks_for(missing, self._pool.blocks_per_slab(model))

    def queried_and_hit(self, model: str) -> tuple[int, int]:
        """Blocks that `allocate` looked for in the cache since the start, and those that it found."""
        return self._models[model].num_queried_blocks, self._models[model].num_hit_blocks

    def check_integrity(self, held: Mapping[str, Counter[int]]) -> None:
        """Proves the invariant against what is held, model → block → references; raises AssertionError."""
        for model, blocks in self._models.items():
            assert blocks.references == held.get(model, Counter()), f"{model}: references are not what is held"
            assert not blocks.references.keys() & blocks.cached.keys(), f"{model}: a block is in use and cached"
            assert {name: block for block, name in blocks.hash_of.items()} == blocks.by_hash, f"{model}: hashes differ"
            known = blocks.references.keys() | blocks.cached.keys()
            assert blocks.hash_of.keys() <= known, f"{model}: a free block has a hash"
            assert blocks.cached.keys() <= blocks.hash_of.keys(), f"{model}: a cached block has no hash"
            counted = Counter(self._pool.slab_of(model, block_id) for block_id in blocks.cached)
            assert counted == blocks.cached_in_slab, f"{model}: cached blocks are miscounted"
            assert blocks.last_use_of_slab.keys() == counted.keys(), f"{model}: a slab's last use is stale"
        assert held.keys() <= self._models.keys(), "blocks of an unknown model are held"
        self._pool.check_integrity(
            {model: [*blocks.references, *blocks.cached] for model, blocks in self._models.items()}
        )

    def _match_prefix(self, model: str, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of ``hashes``."""
        by_hash = self._models[model].by_hash
        prefix: list[int] = []
        for block_hash in hashes:
            if block_hash not in by_hash:
                break
            prefix.append(by_hash[block_hash])
        return prefix

    def _reference(self, model: str, block_id: int) -> None:
        blocks = self._models[model]
        if block_id in blocks.cached:
            self._remove_from_cache(model, block_id)
        blocks.references[block_id] += 1

    def _remove_from_cache(self, model: str, block_id: int) -> None:
        blocks, slab = self._models[model], self._pool.slab_of(model, block_id)
        del blocks.cached[block_id]
        blocks.cached_in_slab[slab] -= 1
        if not blocks.cached_in_slab[slab]:
            del blocks.cached_in_slab[slab]
            del blocks.last_use_of_slab[slab]

    def _allocate_fresh(self, model: str, num_blocks: int, max_new_slabs: int | None) -> tuple[int, ...] | None:
        """Blocks of the pool, of the model's own cache, and of slabs in which other models have nothing but cache."""
        limit = self._pool.num_slabs if max_new_slabs is None else max_new_slabs
        attainable = min(limit, self._num_unused_slabs()) * self._pool.blocks_per_slab(model)
        if num_blocks > self._num_free_in_used_slabs(model) + attainable:
            return None
        if not self._fits(model, num_blocks, limit):
            self._evict_until_fits(model, num_blocks, limit)
        return self._pool.allocate(model, num_blocks)

    def _num_free_in_used_slabs(self, model: str) -> int:
        return self.num_used_slabs(model) * self._pool.blocks_per_slab(model) - self.num_in_use(model)

    def _num_unused_slabs(self) -> int:
        """Free slabs, and those that hold nothing but cache."""
        return self._pool.num_free_slabs + sum(len(self._unused_slabs_of(model)) for model in self._models)

    def _fits(self, model: str, num_blocks: int, max_new_slabs: int) -> bool:
        slabs = min(max_new_slabs, self._pool.num_free_slabs)
        return num_blocks <= self._pool.num_free_in_slabs_of(model) + slabs * self._pool.blocks_per_slab(model)

    def _evict_until_fits(self, model: str, num_blocks: int, max_new_slabs: int) -> None:
        """Evicts, least recently used first: blocks of the model itself, and whole slabs in which other models have
        nothing but cache.
        """
        own = self._models[model].cached
        foreign = sorted(
            (self._models[other].last_use_of_slab[slab], other, slab)
            for other in self._models
            if other != model
            for slab in self._unused_slabs_of(other)
        )[::-1]
        while not self._fits(model, num_blocks, max_new_slabs):
            useful = foreign and self._pool.num_free_slabs < max_new_slabs
            if own and not (useful and foreign[-1][0] < next(iter(own.values()))):
                self._evict(model, next(iter(own)))
                continue
            _, other, slab = foreign.pop()
            for block_id in [known for known in self._models[other].cached if self._pool.slab_of(other, known) == slab]:
                self._evict(other, block_id)

    def _unused_slabs_of(self, model: str) -> list[int]:
        """Slabs of the model in which no block is in use."""
        counts = self._models[model].cached_in_slab
        return [slab for slab, count in counts.items() if count == self._pool.num_used_in(model, slab)]

    def _evict(self, model: str, block_id: int) -> None:
        """Frees a cached block."""
        blocks = self._models[model]
        self._remove_from_cache(model, block_id)
        del blocks.by_hash[blocks.hash_of.pop(block_id)]
        self._pool.free(model, (block_id,))
