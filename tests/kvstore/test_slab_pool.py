import pytest

from kvstore.slab_pool import SlabPool


def make_pool(num_slabs: int, blocks_per_slab: dict[str, int]) -> SlabPool:
    pool = SlabPool(num_slabs)
    for model, count in blocks_per_slab.items():
        pool.add_model(model, count)
    return pool


def test_a_request_gets_all_blocks_or_none() -> None:
    pool = make_pool(2, {"a": 4})
    assert pool.allocate("a", 9) is None
    assert len(pool.allocate("a", 8) or ()) == 8
    assert pool.allocate("a", 1) is None


def test_block_ids_name_their_slab_and_place() -> None:
    pool = make_pool(2, {"a": 4})
    ids = pool.allocate("a", 5) or ()
    assert sorted(ids) == [0, 1, 2, 3, 4]


def test_an_empty_slab_goes_to_another_model() -> None:
    pool = make_pool(1, {"a": 4, "b": 3})
    ids = pool.allocate("a", 1) or ()
    assert pool.allocate("b", 1) is None
    pool.free("a", ids)
    assert pool.allocate("b", 3) == (0, 1, 2)


def test_models_of_different_size_share_the_pool() -> None:
    pool = make_pool(3, {"a": 4, "b": 1})
    a, b = pool.allocate("a", 5) or (), pool.allocate("b", 1) or ()
    assert pool.num_free_slabs == 0
    pool.check_integrity({"a": a, "b": b})


def test_the_fullest_slab_is_used_first() -> None:
    pool = make_pool(2, {"a": 4})
    first, second = pool.allocate("a", 4) or (), pool.allocate("a", 4) or ()
    pool.free("a", first[:1])
    pool.free("a", second[:3])
    assert pool.allocate("a", 1) == first[:1]


def test_freeing_twice_is_refused() -> None:
    pool = make_pool(1, {"a": 4})
    ids = pool.allocate("a", 2) or ()
    pool.free("a", ids[:1])
    with pytest.raises(ValueError, match="not in use"):
        pool.free("a", ids[:1])


def test_a_slab_too_small_for_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="too small for a token block of b"):
        make_pool(1, {"a": 4, "b": 0})


def test_integrity_finds_a_lost_block() -> None:
    pool = make_pool(1, {"a": 4})
    ids = pool.allocate("a", 2) or ()
    with pytest.raises(AssertionError, match="in use"):
        pool.check_integrity({"a": ids[:1]})


def test_a_model_that_leaves_gives_its_share_to_one_that_comes() -> None:
    pool = make_pool(2, {"a": 4})
    pool.free("a", pool.allocate("a", 8) or ())
    pool.remove_model("a")
    pool.add_model("b", 3)
    assert len(pool.allocate("b", 6) or ()) == 6
    pool.check_integrity({"b": range(6)})


def test_a_model_with_blocks_in_use_does_not_leave() -> None:
    pool = make_pool(1, {"a": 4})
    pool.allocate("a", 1)
    with pytest.raises(AssertionError, match="a has blocks in use"):
        pool.remove_model("a")


def test_integrity_finds_blocks_of_an_unknown_model() -> None:
    with pytest.raises(AssertionError, match="unknown model"):
        make_pool(1, {"a": 4}).check_integrity({"b": [0]})
