"""References, the prefix cache and its eviction, example by example. Random operations: test_unit."""

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


def names(count: int, topic: int = 0) -> tuple[bytes, ...]:
    return block_hashes([topic] * 16 * count, 16, b"root")


def allocated(table: BlockTable, model: str, num_blocks: int, hashes: tuple[bytes, ...] = ()) -> tuple[int, ...]:
    found = table.allocate(model, num_blocks, hashes, len(hashes))
    assert found is not None
    return found.block_ids


def test_equal_hashes_mean_equal_prefixes_under_one_root() -> None:
    whole = block_hashes(range(50), 16, b"salt")
    assert len(whole) == 3
    assert block_hashes(range(40), 16, b"salt") == whole[:2]
    assert block_hashes([0, 0, *range(2, 50)], 16, b"salt")[0] != whole[0]
    assert not set(block_hashes([99, *range(1, 50)], 16, b"salt")) & set(whole), "a block stands for all before it too"
    assert not set(block_hashes(range(50), 16, b"other")) & set(whole)


def test_only_a_prefix_without_a_gap_is_found() -> None:
    table = make_table()
    first = allocated(table, "a", 4)
    table.insert_prefix("a", first, names(4))
    found = table.allocate("a", 4, (names(4)[0], b"unknown", names(4)[2]), 3)
    assert found is not None and found.num_cached == 1 and found.block_ids[0] == first[0]
    assert table.queried_and_hit("a") == (3, 1)


def test_released_blocks_stay_cached_until_their_memory_is_needed_ends_first() -> None:
    table = make_table()
    first = allocated(table, "a", 4)
    table.insert_prefix("a", first, names(4))
    table.free("a", first)
    assert (table.num_in_use("a"), table.num_cached("a"), table.num_available("a")) == (0, 4, 8)
    allocated(table, "a", 6)  # four are free, so two are evicted: the last two of the sequence
    again = table.allocate("a", 2, names(4), 4)
    assert again is not None and (again.block_ids, again.num_cached) == (first[:2], 2)


def test_the_least_recently_used_sequence_is_evicted_first() -> None:
    table = make_table()
    for topic in (1, 2):
        blocks = allocated(table, "a", 4)
        table.insert_prefix("a", blocks, names(4, topic))
        table.free("a", blocks)
    table.free("a", allocated(table, "a", 4, names(4, 1)))  # used again
    table.free("a", allocated(table, "a", 2))
    kept = {topic: table.allocate("a", 4, names(4, topic), 4) for topic in (1, 2)}
    assert kept[1] is not None and kept[1].num_cached == 4
    assert kept[2] is not None and kept[2].num_cached == 2


def test_another_models_unused_slab_is_evicted_and_a_slab_in_use_is_not() -> None:
    table = make_table()
    kept, idle = allocated(table, "a", 4), allocated(table, "a", 4)
    table.insert_prefix("a", kept, names(4, 1))
    table.insert_prefix("a", idle, names(4, 2))
    table.free("a", idle)
    table.free("a", kept[1:])
    assert table.num_available("b") == 2
    assert table.allocate("b", 3) is None
    assert table.num_cached("a") == 7, "a refusal evicts nothing"
    assert len(allocated(table, "b", 2)) == 2
    assert table.num_cached("a") == 3


def test_an_old_slab_of_another_model_is_evicted_before_a_recent_block_of_the_model_itself() -> None:
    table = make_table(3)
    stale, fresh = allocated(table, "b", 2), allocated(table, "a", 4)
    table.insert_prefix("b", stale, names(2, 1))
    table.insert_prefix("a", fresh, names(4, 2))
    table.free("b", stale)
    table.free("a", fresh)
    allocated(table, "a", 6)
    assert (table.num_cached("b"), table.num_cached("a")) == (0, 4)
    allocated(table, "a", 4)
    assert table.num_cached("a") == 2


def test_no_more_slabs_than_allowed_are_added() -> None:
    table = make_table(3)
    first = allocated(table, "a", 4)
    table.insert_prefix("a", first, names(3))
    table.free("a", first[1:])
    assert table.allocate("a", 4, max_new_slabs=0) is None
    assert table.allocate("a", 3, max_new_slabs=0) is not None
    assert (table.num_used_slabs("a"), table.num_cached("a")) == (1, 0)
    assert table.num_slabs_with("a", 1) == 2


def test_a_shared_block_is_free_when_its_last_reference_is_removed() -> None:
    table = make_table()
    first = allocated(table, "a", 3)
    table.insert_prefix("a", first, names(2))
    second = allocated(table, "a", 3, names(2))
    assert second[:2] == first[:2] and table.num_in_use("a") == 4
    table.free("a", first)
    assert table.num_in_use("a") == 3
    table.free("a", second)
    assert (table.num_in_use("a"), table.num_cached("a")) == (0, 2)


def test_a_refused_allocation_keeps_no_reference_to_what_it_found() -> None:
    table = make_table(1)
    first = allocated(table, "a", 2)
    table.insert_prefix("a", first, names(2))
    table.free("a", first)
    assert table.allocate("a", 5, names(2), 2) is None
    assert (table.num_in_use("a"), table.num_cached("a")) == (0, 2)


def test_the_second_copy_of_a_prefix_stays_private() -> None:
    table = make_table()
    first, second = allocated(table, "a", 2), allocated(table, "a", 2)
    table.insert_prefix("a", first, names(2))
    table.insert_prefix("a", second, names(2))
    table.free("a", second)
    assert table.num_cached("a") == 0
    assert allocated(table, "a", 2, names(2)) == first


def test_a_model_that_leaves_takes_its_cache_with_it() -> None:
    table = make_table()
    first = allocated(table, "a", 4)
    table.insert_prefix("a", first, names(4))
    table.free("a", first)
    table.remove_model("a")
    assert table.num_available("b") == 4
    table.add_model("a", 4)
    assert table.count_cached("a", names(4)) == 0, "what comes under the same name starts without a cache"
    table.check_integrity({})


def test_a_model_in_use_does_not_leave() -> None:
    table = make_table()
    allocated(table, "a", 1)
    with pytest.raises(AssertionError, match="a has blocks in use"):
        table.remove_model("a")
