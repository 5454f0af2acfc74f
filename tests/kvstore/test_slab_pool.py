"""Slabs and their token blocks, example by example and against a reference that only counts."""

import random
from collections import Counter

import pytest

from kvstore.slab_pool import SlabPool


def make_pool(num_slabs: int, **blocks_per_slab: int) -> SlabPool:
    pool = SlabPool(num_slabs)
    for model, count in blocks_per_slab.items():
        pool.add_model(model, count)
    return pool


def allocated(pool: SlabPool, model: str, num_blocks: int) -> tuple[int, ...]:
    block_ids = pool.allocate(model, num_blocks)
    assert block_ids is not None
    return block_ids


# Blocks


def test_an_allocation_gets_all_blocks_or_none() -> None:
    pool = make_pool(2, a=4)
    assert pool.allocate("a", 9) is None
    assert len(allocated(pool, "a", 8)) == 8
    assert pool.allocate("a", 1) is None


def test_a_block_id_gives_its_slab_and_its_index() -> None:
    pool = make_pool(2, a=4)
    block_ids = allocated(pool, "a", 5)
    assert sorted(block_ids) == [0, 1, 2, 3, 4]
    assert [pool.slab_of("a", block_id) for block_id in sorted(block_ids)] == [0, 0, 0, 0, 1]
    assert [pool.num_allocated_in("a", slab) for slab in (0, 1)] == [4, 1]


def test_the_fullest_slab_is_used_first() -> None:
    pool = make_pool(2, a=4)
    first, second = allocated(pool, "a", 4), allocated(pool, "a", 4)
    pool.free("a", first[:1])
    pool.free("a", second[:3])
    assert pool.allocate("a", 1) == first[:1]


def test_partly_used_slabs_are_filled_before_a_free_slab_is_added() -> None:
    pool = make_pool(3, a=4)
    first, second = allocated(pool, "a", 4), allocated(pool, "a", 4)
    pool.free("a", (*first[:2], *second[:2]))
    allocated(pool, "a", 4)
    assert (pool.num_slabs_of("a"), pool.num_free_slabs) == (2, 1)
    allocated(pool, "a", 1)
    assert (pool.num_slabs_of("a"), pool.num_free_slabs) == (3, 0)


def test_free_blocks_are_those_of_held_and_of_free_slabs() -> None:
    pool = make_pool(3, a=4, b=2)
    allocated(pool, "a", 5)
    assert (pool.num_free_in_slabs_of("a"), pool.num_free_blocks("a")) == (3, 7)
    assert (pool.num_free_in_slabs_of("b"), pool.num_free_blocks("b")) == (0, 2)
    assert (pool.capacity_blocks("a"), pool.capacity_blocks("b")) == (12, 6)


@pytest.mark.parametrize("block_id", [0, 2, 4, 400])
def test_a_free_block_cannot_be_freed(block_id: int) -> None:
    pool = make_pool(2, a=4)
    pool.free("a", [block for block in allocated(pool, "a", 2) if block == block_id])
    with pytest.raises(ValueError, match=f"token block {block_id} of a is not allocated"):
        pool.free("a", (block_id,))


# Models


def test_an_empty_slab_goes_to_another_model() -> None:
    pool = make_pool(1, a=4, b=3)
    block_ids = allocated(pool, "a", 1)
    assert pool.allocate("b", 1) is None
    pool.free("a", block_ids)
    assert pool.allocate("b", 3) == (0, 1, 2)


def test_models_with_blocks_of_different_sizes_share_the_pool() -> None:
    pool = make_pool(3, a=4, b=1)
    a, b = allocated(pool, "a", 5), allocated(pool, "b", 1)
    assert pool.num_free_slabs == 0
    pool.check_integrity({"a": a, "b": b})


def test_a_model_whose_token_block_exceeds_a_slab_cannot_be_added() -> None:
    pool = make_pool(1, a=4)
    with pytest.raises(ValueError, match="a slab is too small for a token block of b"):
        pool.add_model("b", 0)
    pool.check_integrity({})


def test_a_model_cannot_be_added_twice() -> None:
    with pytest.raises(AssertionError, match="a is already added"):
        make_pool(1, a=4).add_model("a", 4)


def test_a_removed_model_leaves_its_slabs_to_an_added_one() -> None:
    pool = make_pool(2, a=4)
    pool.free("a", allocated(pool, "a", 8))
    pool.remove_model("a")
    pool.add_model("b", 3)
    assert len(allocated(pool, "b", 6)) == 6
    pool.check_integrity({"b": range(6)})


def test_a_model_can_return_with_another_block_size() -> None:
    pool = make_pool(2, a=4)
    pool.remove_model("a")
    pool.add_model("a", 7)
    assert (pool.blocks_per_slab("a"), pool.capacity_blocks("a")) == (7, 14)


def test_a_model_with_allocated_blocks_cannot_be_removed() -> None:
    pool = make_pool(1, a=4)
    allocated(pool, "a", 1)
    with pytest.raises(AssertionError, match="a has allocated blocks"):
        pool.remove_model("a")


# Integrity


def test_integrity_finds_a_block_that_no_caller_holds() -> None:
    pool = make_pool(1, a=4)
    block_ids = allocated(pool, "a", 2)
    with pytest.raises(AssertionError, match=r"a: allocated \[0, 1\], held \[0\]"):
        pool.check_integrity({"a": block_ids[:1]})


def test_integrity_finds_a_block_that_is_held_twice() -> None:
    pool = make_pool(1, a=4)
    block_ids = allocated(pool, "a", 2)
    with pytest.raises(AssertionError, match="a token block of a is held twice"):
        pool.check_integrity({"a": (*block_ids, block_ids[0])})


def test_integrity_finds_blocks_of_an_unknown_model() -> None:
    with pytest.raises(AssertionError, match="unknown model"):
        make_pool(1, a=4).check_integrity({"b": [0]})


def test_counts_and_slabs_are_right_over_random_operations() -> None:
    blocks_per_slab = {"a": 4, "b": 3, "c": 1}
    pool, rng = make_pool(5, **blocks_per_slab), random.Random(7)
    held: dict[str, list[int]] = {model: [] for model in blocks_per_slab}
    for _ in range(600):
        model = rng.choice("abc")
        num_slabs_of = {name: len({block // blocks_per_slab[name] for block in ids}) for name, ids in held.items()}
        num_free_slabs = 5 - sum(num_slabs_of.values())
        num_free = (num_slabs_of[model] + num_free_slabs) * blocks_per_slab[model] - len(held[model])
        assert (pool.num_free_slabs, pool.num_free_blocks(model)) == (num_free_slabs, num_free)
        assert pool.num_slabs_of(model) == num_slabs_of[model]
        if rng.random() < 0.5:
            rng.shuffle(held[model])
            count = rng.randint(0, len(held[model]))
            pool.free(model, held[model][:count])
            del held[model][:count]
        else:
            count = rng.randint(1, 9)
            block_ids = pool.allocate(model, count)
            assert (block_ids is not None) == (count <= num_free)
            held[model] += block_ids or ()
        assert max(Counter(held[model]).values(), default=1) == 1
        pool.check_integrity(held)
