"""Which token blocks are in use, by how many leases, and which are in the prefix cache. Pure.

    block     references    has a hash           memory
    free      0             no                   free in the `SlabPool`
    in use    at least 1    once published       allocated
    cached    0             yes                  allocated; evicted when it is needed

Cached blocks are evicted least recently used first. They count as available, so the cache never makes an allocation
fail. This module knows blocks by id and prefixes by hash; it knows neither leases nor tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.slab_pool import SlabPool
from muxmesh.types import blocks_for


@dataclass(frozen=True, slots=True)
class AllocatedBlocks:
    """Token blocks of a sequence, in order. The first ``num_cached`` already hold the KV of its prefix."""

    block_ids: tuple[int, ...]
    num_cached: int


OnPublished = Callable[[str, bytes, bool], None]
"""Called with a model, a hash, and whether a block is published under it from now on or no longer."""


def _ignore(model: str, block_hash: bytes, is_held: bool) -> None:
    pass


@dataclass(slots=True)
class _ModelBlocks:
    """The blocks of one model that are in use or cached.

    ``references``: block in use → number of leases that hold it. ``cached``: cached block → its last use, least
    recently used first. ``by_hash`` and ``hash_of``: each other's inverse, over published blocks in use and cached
    blocks. ``cached_in_slab``: slab → number of its cached blocks; ``last_use_of_slab``: slab → their latest use; both
    have no entry for a slab without cached blocks. A use is a value of `BlockTable`'s counter, not a time.
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

    Invariant: each allocated block of the pool is in use or cached, and no block is both. A slab of a model is called
    used if a block in it is in use.
    """

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self._models: dict[str, _ModelBlocks] = {}
        self._use_counter = 0
        self.on_published: OnPublished = _ignore

    def add_model(self, model: str, blocks_per_slab: int) -> None:
        """Adds a model without blocks. Raises ValueError if a slab does not hold one of its token blocks."""
        self._pool.add_model(model, blocks_per_slab)
        self._models[model] = _ModelBlocks()

    def remove_model(self, model: str) -> None:
        """Removes a model that has no block in use, and evicts its cache."""
        assert not self._models[model].references, f"{model} has blocks in use"
        self.drop_prefixes_of(model)
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
        """Returns ``num_blocks`` blocks, each with one more reference.

        The first ones hold the longest published prefix of ``hashes[:max_cached]``; the others are private. Returns
        None, and evicts nothing, if too few blocks are available or if the model would need more than
        ``max_new_slabs`` slabs beyond those that it uses. The allocation may spread over more slabs than it needs, if
        the model has slabs with cached blocks only.
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
        """Publishes blocks in use, whose KV is computed, under their hashes: later allocations may share them.

        A hash that is already published keeps its block, and the second copy stays private. ``block_ids`` and
        ``hashes`` may differ in length: the rest of the longer one is ignored.
        """
        blocks = self._models[model]
        for block_id, block_hash in zip(block_ids, hashes, strict=False):
            assert blocks.references[block_id] > 0, "only referenced blocks are published"
            if block_hash not in blocks.by_hash and block_id not in blocks.hash_of:
                blocks.by_hash[block_hash] = block_id
                blocks.hash_of[block_id] = block_hash
                self.on_published(model, block_hash, True)

    def free(self, model: str, block_ids: Sequence[int]) -> None:
        """Removes one reference from each block. A published block without references becomes cached.

        ``block_ids`` are in the order of the sequence; its last blocks are evicted first.
        """
        blocks = self._models[model]
        self._use_counter += 1
        freed: list[int] = []
        for block_id in reversed(block_ids):
            num_left = blocks.references[block_id] - 1
            if num_left > 0:
                blocks.references[block_id] = num_left
                continue
            del blocks.references[block_id]
            if block_id in blocks.hash_of:
                slab = self._pool.slab_of(model, block_id)
                blocks.cached[block_id] = self._use_counter
                blocks.cached_in_slab[slab] += 1
                blocks.last_use_of_slab[slab] = self._use_counter
            else:
                freed.append(block_id)
        self._pool.free(model, freed)

    def drop_prefixes(self) -> None:
        """Empties the prefix cache of all models. Blocks in use stay, but no later allocation finds them by a hash."""
        for model in self._models:
            self.drop_prefixes_of(model)

    def drop_prefixes_of(self, model: str) -> None:
        """Empties the prefix cache of one model, see `drop_prefixes`."""
        blocks = self._models[model]
        for block_id in list(blocks.cached):
            self._evict(model, block_id)
        for block_hash in blocks.by_hash:
            self.on_published(model, block_hash, False)
        blocks.by_hash.clear()
        blocks.hash_of.clear()

    def num_in_use(self, model: str) -> int:
        """Blocks with at least one reference; a shared block counts once."""
        return len(self._models[model].references)

    def num_cached(self, model: str) -> int:
        return len(self._models[model].cached)

    def count_cached(self, model: str, hashes: Sequence[bytes]) -> int:
        """Blocks that `allocate` would find in the prefix cache, whether in use or cached."""
        return len(self._match_prefix(model, hashes))

    def published(self) -> Iterator[tuple[str, tuple[bytes, ...]]]:
        """Each model with the hashes of its published blocks, in use or cached."""
        for model, blocks in self._models.items():
            yield model, tuple(blocks.by_hash)

    def num_available(self, model: str) -> int:
        """Blocks that can be allocated, cached blocks of all models included."""
        return self._num_free_in_used_slabs(model) + self._num_unused_slabs() * self._pool.blocks_per_slab(model)

    def num_used_slabs(self, model: str) -> int:
        """Slabs in which the model has a block in use. Other models cannot get them; the other slabs they can."""
        return self._pool.num_slabs_of(model) - len(self._unused_slabs_of(model))

    def num_slabs_with(self, model: str, num_blocks: int) -> int:
        """Slabs that the model needs if ``num_blocks`` more blocks are in use. It may use more: see `allocate`."""
        missing = max(0, num_blocks - self._num_free_in_used_slabs(model))
        return self.num_used_slabs(model) + blocks_for(missing, self._pool.blocks_per_slab(model))

    def queried_and_hit(self, model: str) -> tuple[int, int]:
        """Blocks that successful allocations looked up in the prefix cache, and those that they found there."""
        return self._models[model].num_queried_blocks, self._models[model].num_hit_blocks

    def check_integrity(self, held: Mapping[str, Counter[int]]) -> None:
        """Proves the invariant. ``held``: model → block → leases that hold it. Raises AssertionError."""
        for model, blocks in self._models.items():
            assert blocks.references == held.get(model, Counter()), f"{model}: references differ from the leases"
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
        """Blocks of the longest published prefix of ``hashes``."""
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
        """Allocates private blocks, and evicts if too few are free: see `_evict_until_fits`."""
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
        """Free slabs, and slabs that hold cached blocks only."""
        cached = sum(len(self._unused_slabs_of(model)) for model, blocks in self._models.items() if blocks.cached)
        return self._pool.num_free_slabs + cached

    def _fits(self, model: str, num_blocks: int, max_new_slabs: int) -> bool:
        slabs = min(max_new_slabs, self._pool.num_free_slabs)
        return num_blocks <= self._pool.num_free_in_slabs_of(model) + slabs * self._pool.blocks_per_slab(model)

    def _evict_until_fits(self, model: str, num_blocks: int, max_new_slabs: int) -> None:
        """Evicts until ``num_blocks`` blocks are free for ``model``, least recently used first.

        Candidates are the model's own cached blocks, one by one, and slabs in which another model has cached blocks
        only, as a whole.
        """
        own = self._models[model].cached
        foreign = sorted(
            (self._models[other].last_use_of_slab[slab], other, slab)
            for other in self._models
            if other != model
            for slab in self._unused_slabs_of(other)
        )[::-1]
        while not self._fits(model, num_blocks, max_new_slabs):
            can_add_slab = foreign and self._pool.num_free_slabs < max_new_slabs
            if own and not (can_add_slab and foreign[-1][0] < next(iter(own.values()))):
                self._evict(model, next(iter(own)))
                continue
            _, other, slab = foreign.pop()
            in_slab = [block for block in self._models[other].cached if self._pool.slab_of(other, block) == slab]
            for block_id in in_slab:
                self._evict(other, block_id)

    def _unused_slabs_of(self, model: str) -> list[int]:
        """Slabs of the model that hold cached blocks only."""
        counts = self._models[model].cached_in_slab
        return [slab for slab, count in counts.items() if count == self._pool.num_allocated_in(model, slab)]

    def _evict(self, model: str, block_id: int) -> None:
        blocks = self._models[model]
        self._remove_from_cache(model, block_id)
        block_hash = blocks.hash_of.pop(block_id)
        del blocks.by_hash[block_hash]
        self.on_published(model, block_hash, False)
        self._pool.free(model, (block_id,))
