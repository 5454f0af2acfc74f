"""Pages of the swap region: allocation, freeing, and the invariant."""

import random

import pytest

from kvstore.swap_space import SwapSpace
from muxmesh.types import SWAP_PAGE_BYTES


def space_of(num_pages: int) -> SwapSpace:
    return SwapSpace(num_pages * SWAP_PAGE_BYTES)


@pytest.mark.parametrize(
    ("num_bytes", "num_pages"),
    [(1, 1), (SWAP_PAGE_BYTES, 1), (SWAP_PAGE_BYTES + 1, 2), (4 * SWAP_PAGE_BYTES, 4)],
)
def test_a_copy_gets_as_many_whole_pages_as_it_needs(num_bytes: int, num_pages: int) -> None:
    space = space_of(4)
    assert space.allocate(num_bytes) == tuple(range(num_pages))
    assert space.num_free_pages == 4 - num_pages


def test_a_copy_gets_all_its_pages_or_none() -> None:
    space = space_of(3)
    space.allocate(2 * SWAP_PAGE_BYTES)
    assert space.allocate(2 * SWAP_PAGE_BYTES) is None
    assert space.num_free_pages == 1
    assert space.allocate(SWAP_PAGE_BYTES) == (2,)


@pytest.mark.parametrize("num_bytes", [0, SWAP_PAGE_BYTES - 1])
def test_a_region_smaller_than_a_page_holds_nothing(num_bytes: int) -> None:
    space = SwapSpace(num_bytes)
    assert space.num_pages == 0
    assert space.allocate(1) is None


def test_a_rest_that_is_smaller_than_a_page_is_not_used() -> None:
    assert SwapSpace(3 * SWAP_PAGE_BYTES - 1).num_pages == 2


def test_freed_pages_need_not_be_adjacent_to_be_allocated_together() -> None:
    space = space_of(4)
    for _ in range(4):
        space.allocate(SWAP_PAGE_BYTES)
    space.free((0,))
    space.free((2,))
    assert set(space.allocate(2 * SWAP_PAGE_BYTES) or ()) == {0, 2}


def held_by(num_pages: int, pages: range) -> SwapSpace:
    """A space in which only ``pages`` are allocated."""
    space = space_of(num_pages)
    space.allocate(num_pages * SWAP_PAGE_BYTES)
    space.free(page for page in range(num_pages) if page not in pages)
    return space


def test_a_copy_gets_the_shortest_run_that_holds_it() -> None:
    space = held_by(10, range(4, 5))  # free: 4 and 5 pages
    assert space.allocate(3 * SWAP_PAGE_BYTES) == (0, 1, 2)
    assert space.allocate(5 * SWAP_PAGE_BYTES) == (5, 6, 7, 8, 9)
    assert space.allocate(SWAP_PAGE_BYTES) == (3,)


def test_a_copy_that_no_run_holds_gets_the_longest_runs() -> None:
    space = space_of(12)
    space.allocate(12 * SWAP_PAGE_BYTES)
    for pages in ((0,), (2, 3), (5, 6, 7), (9, 10)):
        space.free(pages)
    assert space.allocate(5 * SWAP_PAGE_BYTES) == (5, 6, 7, 2, 3)
    assert space.allocate(3 * SWAP_PAGE_BYTES) == (9, 10, 0)


def test_freed_pages_join_their_neighbours() -> None:
    space = space_of(6)
    space.allocate(6 * SWAP_PAGE_BYTES)
    for page in (0, 2, 4, 5, 3, 1):
        space.free((page,))
    assert space.allocate(6 * SWAP_PAGE_BYTES) == tuple(range(6))


def test_no_page_is_lost_or_held_twice_over_random_operations() -> None:
    space, rng = space_of(9), random.Random(1)
    copies: list[tuple[int, ...]] = []
    for _ in range(500):
        if copies and rng.random() < 0.5:
            space.free(copies.pop(rng.randrange(len(copies))))
        elif (pages := space.allocate(rng.randint(1, 4) * SWAP_PAGE_BYTES)) is not None:
            copies.append(pages)
        space.check_integrity(page for pages in copies for page in pages)
    assert space.num_free_pages == 9 - sum(map(len, copies))


@pytest.mark.parametrize("held", [(), (0,), (0, 1, 1), (0, 1, 2)])
def test_integrity_finds_pages_that_are_lost_or_held_twice(held: tuple[int, ...]) -> None:
    space = space_of(3)
    space.allocate(2 * SWAP_PAGE_BYTES)
    space.check_integrity((1, 0))
    with pytest.raises(AssertionError, match="a swap page is lost or held twice"):
        space.check_integrity(held)
