"""References, the prefix cache and its eviction, example by example and over random operations."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from kvstore.block_table import BlockTable
from kvstore.slab_pool import SlabPool
from muxmesh.block_hashes import block_hashes


def make_table(num_slabs: int = 2) -> BlockTable:
    """Slabs of 4 blocks of `a` or 2 of `b`."""
    table = BlockTable(SlabPool(num_slabs))
    table.add_model("a", 4)
    table.add_model("b", 2)
    return table


def hashes_of(count: int, topic: int = 0) -> tuple[bytes, ...]:
    return block_hashes([topic] * 16 * count, 16, b"root")


def allocated(table: BlockTable, model: str, num_blocks: int, hashes: tuple[bytes, ...] = ()) -> tuple[int, ...]:
    found = table.allocate(model, num_blocks, hashes, len(hashes))
    assert found is not None
    return found.block_ids


def cached(table: BlockTable, model: str, num_blocks: int, topic: int = 0) -> tuple[int, ...]:
    """Blocks that hold a prefix of ``topic`` and are not in use."""
    block_ids = allocated(table, model, num_blocks)
    table.insert_prefix(model, block_ids, hashes_of(num_blocks, topic))
    table.free(model, block_ids)
    return block_ids


# References


def test_a_shared_block_is_free_when_its_last_reference_is_removed() -> None:
    table = make_table()
    first = allocated(table, "a", 3)
    table.insert_prefix("a", first, hashes_of(2))
    second = allocated(table, "a", 3, hashes_of(2))
    assert second[:2] == first[:2] and table.num_in_use("a") == 4
    table.free("a", first)
    assert table.num_in_use("a") == 3
    table.free("a", second)
    assert (table.num_in_use("a"), table.num_cached("a")) == (0, 2)


def test_a_refused_allocation_keeps_no_reference_to_the_prefix_that_it_found() -> None:
    table = make_table(1)
    cached(table, "a", 2)
    assert table.allocate("a", 5, hashes_of(2), 2) is None
    assert (table.num_in_use("a"), table.num_cached("a")) == (0, 2)
    assert table.queried_and_hit("a") == (0, 0)


def test_no_more_slabs_than_allowed_are_added() -> None:
    table = make_table(3)
    first = allocated(table, "a", 4)
    table.insert_prefix("a", first, hashes_of(3))
    table.free("a", first[1:])
    assert table.allocate("a", 4, max_new_slabs=0) is None
    assert table.allocate("a", 3, max_new_slabs=0) is not None
    assert (table.num_used_slabs("a"), table.num_cached("a")) == (1, 0)
    assert table.num_slabs_with("a", 1) == 2


@pytest.mark.parametrize(("num_blocks", "num_slabs"), [(0, 1), (3, 1), (4, 2), (7, 2), (8, 3)])
def test_the_slabs_that_more_blocks_need_are_counted(num_blocks: int, num_slabs: int) -> None:
    table = make_table(3)
    allocated(table, "a", 1)
    assert table.num_slabs_with("a", num_blocks) == num_slabs


# The prefix cache


def test_only_a_prefix_without_a_gap_is_found() -> None:
    table = make_table()
    first = allocated(table, "a", 4)
    table.insert_prefix("a", first, hashes_of(4))
    found = table.allocate("a", 4, (hashes_of(4)[0], b"unknown", hashes_of(4)[2]), 3)
    assert found is not None and found.num_cached == 1 and found.block_ids[0] == first[0]
    assert table.queried_and_hit("a") == (3, 1)


@pytest.mark.parametrize(("num_blocks", "max_cached", "num_found"), [(4, 4, 3), (4, 2, 2), (2, 4, 2), (4, 0, 0)])
def test_the_cached_part_is_limited_by_the_demand(num_blocks: int, max_cached: int, num_found: int) -> None:
    table = make_table()
    first = cached(table, "a", 3)
    found = table.allocate("a", num_blocks, hashes_of(3), max_cached)
    assert found is not None
    assert (found.num_cached, found.block_ids[:num_found]) == (num_found, first[:num_found])
    assert len(set(found.block_ids)) == num_blocks


def test_a_prefix_is_found_while_it_is_in_use_and_while_it_is_cached() -> None:
    table = make_table()
    block_ids = allocated(table, "a", 2)
    assert table.count_cached("a", hashes_of(2)) == 0, "not published"
    table.insert_prefix("a", block_ids, hashes_of(2))
    assert table.count_cached("a", hashes_of(2)) == 2
    table.free("a", block_ids)
    assert table.count_cached("a", hashes_of(2)) == 2


def test_models_do_not_share_prefixes() -> None:
    table = make_table()
    cached(table, "a", 2)
    assert table.count_cached("b", hashes_of(2)) == 0


def test_the_second_copy_of_a_prefix_stays_private() -> None:
    table = make_table()
    first, second = allocated(table, "a", 2), allocated(table, "a", 2)
    table.insert_prefix("a", first, hashes_of(2))
    table.insert_prefix("a", second, hashes_of(2))
    table.free("a", second)
    assert table.num_cached("a") == 0
    assert allocated(table, "a", 2, hashes_of(2)) == first


def test_a_block_keeps_its_first_hash() -> None:
    table = make_table()
    block_ids = allocated(table, "a", 1)
    table.insert_prefix("a", block_ids, hashes_of(1, topic=1))
    table.insert_prefix("a", block_ids, hashes_of(1, topic=2))
    assert [table.count_cached("a", hashes_of(1, topic)) for topic in (1, 2)] == [1, 0]


def test_dropped_prefixes_are_not_found_whether_they_are_in_use_or_cached() -> None:
    table = make_table()
    cached(table, "a", 2, topic=1)
    cached(table, "b", 1)
    in_use = allocated(table, "a", 2)
    table.insert_prefix("a", in_use, hashes_of(2))
    table.drop_prefixes()
    assert [table.count_cached(*of) for of in (("a", hashes_of(2, 1)), ("a", hashes_of(2)), ("b", hashes_of(1)))] == [
        0
    ] * 3
    assert (table.num_in_use("a"), table.num_cached("a"), table.num_cached("b")) == (2, 0, 0)
    table.free("a", in_use)
    assert table.num_cached("a") == 0
    table.check_integrity({})


def test_only_blocks_in_use_can_be_published() -> None:
    table = make_table()
    block_ids = allocated(table, "a", 1)
    table.free("a", block_ids)
    with pytest.raises(AssertionError, match="only referenced blocks are published"):
        table.insert_prefix("a", block_ids, hashes_of(1))


# Eviction


def test_freed_blocks_stay_cached_until_their_memory_is_needed_the_last_ones_first() -> None:
    table = make_table()
    first = cached(table, "a", 4)
    assert (table.num_in_use("a"), table.num_cached("a"), table.num_available("a")) == (0, 4, 8)
    allocated(table, "a", 6)  # four are free, so two are evicted: the last two of the sequence
    again = table.allocate("a", 2, hashes_of(4), 4)
    assert again is not None and (again.block_ids, again.num_cached) == (first[:2], 2)


def test_the_least_recently_used_sequence_is_evicted_first() -> None:
    table = make_table()
    for topic in (1, 2):
        cached(table, "a", 4, topic)
    table.free("a", allocated(table, "a", 4, hashes_of(4, 1)))  # used again
    table.free("a", allocated(table, "a", 2))
    kept = {topic: table.allocate("a", 4, hashes_of(4, topic), 4) for topic in (1, 2)}
    assert kept[1] is not None and kept[1].num_cached == 4
    assert kept[2] is not None and kept[2].num_cached == 2


def test_a_slab_of_another_model_is_evicted_only_if_no_block_in_it_is_in_use() -> None:
    table = make_table()
    kept, idle = allocated(table, "a", 4), allocated(table, "a", 4)
    table.insert_prefix("a", kept, hashes_of(4, 1))
    table.insert_prefix("a", idle, hashes_of(4, 2))
    table.free("a", idle)
    table.free("a", kept[1:])
    assert table.num_available("b") == 2
    assert table.allocate("b", 3) is None
    assert table.num_cached("a") == 7, "a refusal evicts nothing"
    assert len(allocated(table, "b", 2)) == 2
    assert table.num_cached("a") == 3


def test_an_old_slab_of_another_model_is_evicted_before_a_recent_block_of_the_model_itself() -> None:
    table = make_table(3)
    stale, recent = allocated(table, "b", 2), allocated(table, "a", 4)
    table.insert_prefix("b", stale, hashes_of(2, 1))
    table.insert_prefix("a", recent, hashes_of(4, 2))
    table.free("b", stale)
    table.free("a", recent)
    allocated(table, "a", 6)
    assert (table.num_cached("b"), table.num_cached("a")) == (0, 4)
    allocated(table, "a", 4)
    assert table.num_cached("a") == 2


def test_without_another_slab_allowed_the_model_evicts_its_own_cache() -> None:
    table = make_table(2)
    cached(table, "b", 2)
    block_ids = allocated(table, "a", 4)
    table.insert_prefix("a", block_ids, hashes_of(4))
    table.free("a", block_ids[1:])
    assert table.allocate("a", 3, max_new_slabs=0) is not None
    assert (table.num_cached("a"), table.num_cached("b")) == (0, 2)


def test_the_prefix_of_the_allocation_itself_is_not_evicted_for_it() -> None:
    table = make_table(1)
    first = cached(table, "a", 3)
    again = table.allocate("a", 4, hashes_of(3), 3)
    assert again is not None
    assert (again.num_cached, again.block_ids[:3]) == (3, first)


# Models


def test_a_removed_model_takes_its_cache_with_it() -> None:
    table = make_table()
    cached(table, "a", 4)
    table.remove_model("a")
    assert table.num_available("b") == 4
    table.add_model("a", 4)
    assert table.count_cached("a", hashes_of(4)) == 0, "an added model starts without a cache"
    table.check_integrity({})


def test_a_removed_model_leaves_the_blocks_of_the_others() -> None:
    table = make_table()
    kept = allocated(table, "b", 2)
    cached(table, "a", 2)
    table.remove_model("a")
    table.check_integrity({"b": Counter(kept)})


def test_a_model_with_blocks_in_use_cannot_be_removed() -> None:
    table = make_table()
    allocated(table, "a", 1)
    with pytest.raises(AssertionError, match="a has blocks in use"):
        table.remove_model("a")


def test_a_model_whose_token_block_exceeds_a_slab_cannot_be_added() -> None:
    table = make_table()
    with pytest.raises(ValueError, match="a slab is too small for a token block of c"):
        table.add_model("c", 0)
    table.check_integrity({})


# Integrity


def lose_the_hash(table: BlockTable) -> None:
    del table._models["a"].by_hash[hashes_of(2)[0]]


def lose_a_cached_block(table: BlockTable) -> None:
    table._models["a"].cached.popitem()


def use_a_cached_block(table: BlockTable) -> None:
    table._models["a"].references[next(iter(table._models["a"].cached))] += 1


def miscount_a_slab(table: BlockTable) -> None:
    table._models["a"].cached_in_slab[0] += 1


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lose_the_hash, "a: hashes differ"),
        (lose_a_cached_block, "a: a free block has a hash"),
        (use_a_cached_block, "a: references differ from the leases"),
        (miscount_a_slab, "a: cached blocks are miscounted"),
    ],
)
def test_integrity_finds_damage(damage: Callable[[BlockTable], None], problem: str) -> None:
    table = make_table()
    cached(table, "a", 2)
    table.check_integrity({})
    damage(table)
    with pytest.raises(AssertionError, match=problem):
        table.check_integrity({})


def test_integrity_finds_blocks_of_an_unknown_model() -> None:
    with pytest.raises(AssertionError, match="blocks of an unknown model are held"):
        make_table().check_integrity({"c": Counter([1])})


def test_an_allocation_succeeds_exactly_if_enough_blocks_are_available_over_random_operations() -> None:
    table, rng = make_table(4), random.Random(3)
    sequences: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(600):
        model = rng.choice("ab")
        if sequences and rng.random() < 0.5:
            owner, block_ids = sequences.pop(rng.randrange(len(sequences)))
            table.insert_prefix(owner, block_ids, hashes_of(len(block_ids), rng.randint(0, 3)))
            table.free(owner, block_ids)
        else:
            hashes, num_blocks = hashes_of(rng.randint(0, 4), rng.randint(0, 3)), rng.randint(1, 6)
            num_shared = sum(
                block in table._models[model].references for block in table._match_prefix(model, hashes[:num_blocks])
            )
            fits = num_blocks - num_shared <= table.num_available(model)
            found = table.allocate(model, num_blocks, hashes, len(hashes))
            assert (found is not None) == fits
            if found is not None:
                sequences.append((model, found.block_ids))
        held = {name: Counter(block for owner, ids in sequences if owner == name for block in ids) for name in "ab"}
        table.check_integrity(held)
