"""References, the prefix cache and its eviction, example by example. Random operations: test_unit."""

from kvstore.blocks import BlockTable
from kvstore.slab_pool import SlabPool
from muxmesh.prefix import block_hashes


def make_table(num_slabs: int = 2) -> BlockTable:
    """Slabs of 4 blocks of `a` or 2 of `b`."""
    return BlockTable(SlabPool(num_slabs, {"a": 4, "b": 2}))


def names(count: int, topic: int = 0) -> tuple[bytes, ...]:
    return block_hashes([topic] * 16 * count, 16, "")


def taken(table: BlockTable, model: str, num_blocks: int, hashes: tuple[bytes, ...] = ()) -> tuple[int, ...]:
    found = table.take(model, num_blocks, hashes, len(hashes))
    assert found is not None
    return found.block_ids


def test_equal_hashes_mean_equal_beginnings_under_one_salt() -> None:
    whole = block_hashes(range(50), 16, "salt")
    assert len(whole) == 3
    assert block_hashes(range(40), 16, "salt") == whole[:2]
    assert block_hashes([0, 0, *range(2, 50)], 16, "salt")[0] != whole[0]
    assert not set(block_hashes([99, *range(1, 50)], 16, "salt")) & set(whole), "a block stands for all before it too"
    assert not set(block_hashes(range(50), 16, "other")) & set(whole)


def test_only_a_prefix_without_a_gap_is_found() -> None:
    table = make_table()
    first = taken(table, "a", 4)
    table.publish("a", first, names(4))
    found = table.take("a", 4, (names(4)[0], b"unknown", names(4)[2]), 3)
    assert found is not None and found.num_cached == 1 and found.block_ids[0] == first[0]
    assert table.queried_and_hit("a") == (3, 1)


def test_what_is_released_stays_until_its_room_is_needed_ends_first() -> None:
    table = make_table()
    first = taken(table, "a", 4)
    table.publish("a", first, names(4))
    table.give_back("a", first)
    assert (table.num_in_use("a"), table.num_cached("a"), table.num_available("a")) == (0, 4, 8)
    taken(table, "a", 6)  # four are free, so two of the cache give way: the last two of the sequence
    again = table.take("a", 2, names(4), 4)
    assert again is not None and (again.block_ids, again.num_cached) == (first[:2], 2)


def test_the_least_recently_used_sequence_gives_way_first() -> None:
    table = make_table()
    for topic in (1, 2):
        blocks = taken(table, "a", 4)
        table.publish("a", blocks, names(4, topic))
        table.give_back("a", blocks)
    table.give_back("a", taken(table, "a", 4, names(4, 1)))  # used again
    table.give_back("a", taken(table, "a", 2))
    kept = {topic: table.take("a", 4, names(4, topic), 4) for topic in (1, 2)}
    assert kept[1] is not None and kept[1].num_cached == 4
    assert kept[2] is not None and kept[2].num_cached == 2


def test_another_models_idle_slab_gives_way_and_a_slab_in_use_does_not() -> None:
    table = make_table()
    kept, idle = taken(table, "a", 4), taken(table, "a", 4)
    table.publish("a", kept, names(4, 1))
    table.publish("a", idle, names(4, 2))
    table.give_back("a", idle)
    table.give_back("a", kept[1:])
    assert table.num_available("b") == 2
    assert table.take("b", 3) is None
    assert table.num_cached("a") == 7, "a refusal costs no cache"
    assert len(taken(table, "b", 2)) == 2
    assert table.num_cached("a") == 3


def test_a_stale_cache_of_another_model_goes_before_a_fresh_one_of_ones_own() -> None:
    table = make_table(3)
    stale, fresh = taken(table, "b", 2), taken(table, "a", 4)
    table.publish("b", stale, names(2, 1))
    table.publish("a", fresh, names(4, 2))
    table.give_back("b", stale)
    table.give_back("a", fresh)
    taken(table, "a", 6)
    assert (table.num_cached("b"), table.num_cached("a")) == (0, 4)
    taken(table, "a", 4)
    assert table.num_cached("a") == 2


def test_no_more_slabs_than_allowed_are_added() -> None:
    table = make_table(3)
    first = taken(table, "a", 4)
    table.publish("a", first, names(3))
    table.give_back("a", first[1:])
    assert table.take("a", 4, max_new_slabs=0) is None
    assert table.take("a", 3, max_new_slabs=0) is not None
    assert (table.num_used_slabs("a"), table.num_cached("a")) == (1, 0)
    assert table.num_slabs_with("a", 1) == 2


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    table = make_table()
    first = taken(table, "a", 3)
    table.publish("a", first, names(2))
    second = taken(table, "a", 3, names(2))
    assert second[:2] == first[:2] and table.num_in_use("a") == 4
    table.give_back("a", first)
    assert table.num_in_use("a") == 3
    table.give_back("a", second)
    assert (table.num_in_use("a"), table.num_cached("a")) == (0, 2)


def test_a_refused_take_holds_nothing_of_what_it_found() -> None:
    table = make_table(1)
    first = taken(table, "a", 2)
    table.publish("a", first, names(2))
    table.give_back("a", first)
    assert table.take("a", 5, names(2), 2) is None
    assert (table.num_in_use("a"), table.num_cached("a")) == (0, 2)


def test_the_second_copy_of_a_prefix_stays_private() -> None:
    table = make_table()
    first, second = taken(table, "a", 2), taken(table, "a", 2)
    table.publish("a", first, names(2))
    table.publish("a", second, names(2))
    table.give_back("a", second)
    assert table.num_cached("a") == 0
    assert taken(table, "a", 2, names(2)) == first
