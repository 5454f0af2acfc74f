"""The words that kvstore and its workers share."""

import os
from collections.abc import Iterator

import pytest

from kvstore.device_memory import new_memfd
from kvstore.grant_page import MAX_WORKERS, PAGE_BYTES, GrantPage, Word
from muxmesh.step_cost import StepCost


@pytest.fixture
def page_fd() -> Iterator[int]:
    fd = new_memfd("test", PAGE_BYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def page(page_fd: int) -> GrantPage:
    return GrantPage(page_fd)


def test_each_word_of_each_slot_has_its_own_memory(page: GrantPage) -> None:
    written = {}
    for slot in (0, 1, MAX_WORKERS - 1):
        for word in Word:
            written[slot, word] = 1000 * slot + word + 1
            page.write(slot, word, written[slot, word])
    assert {key: page.read(*key) for key in written} == written


def test_all_mappings_of_a_page_see_the_same_words(page: GrantPage, page_fd: int) -> None:
    other = GrantPage(page_fd)
    other.write(3, Word.DEMAND, 1)
    other.add(3, Word.NUM_STEPS, 5)
    page.add(3, Word.NUM_STEPS, 2)
    assert (page.read(3, Word.DEMAND), other.read(3, Word.NUM_STEPS)) == (1, 7)


def test_a_grant_is_read_before_the_demand_that_a_step_under_it_may_have_ended(page: GrantPage) -> None:
    for word in (
        Word.GRANTED_STEPS,
        Word.DEMAND,
        Word.RECALLED,
        Word.PRIORITY,
        Word.DUE_US,
        Word.LOST_US,
        Word.ARRIVED_US,
        Word.BUSY_NS,
    ):
        page.write(2, word, 100 + word)
    assert page.read_demand(2) == list(range(100, 108))
    assert Word.GRANTED_STEPS < Word.DEMAND, "words are read in the order of their indices"


def test_a_step_cost_is_read_as_it_was_written_and_overwrites_no_counter(page: GrantPage) -> None:
    cost = StepCost(0.01, 0.002, 0.0003, 4.5, 321.0)
    page.write(7, Word.SWAP_NS, 99)
    page.write(8, Word.DEMAND, 98)
    page.write_cost(7, cost)
    assert page.read_cost(7) == cost
    assert (page.read(7, Word.SWAP_NS), page.read(8, Word.DEMAND)) == (99, 98)


def test_a_worker_has_no_step_cost_before_its_first_step(page: GrantPage) -> None:
    page.write_cost(6, StepCost(0.01, 0.002, 0.0003))
    assert page.read_cost(7) is None


def test_a_cleared_slot_is_all_zeros_and_its_neighbours_stay(page: GrantPage) -> None:
    for slot in (4, 5, 6):
        page.add(slot, Word.NUM_STEPS, slot)
        page.write_cost(slot, StepCost(1.0, 1.0, 1.0))
    page.clear(5)
    assert [page.read(slot, Word.NUM_STEPS) for slot in (4, 5, 6)] == [4, 0, 6]
    assert page.read_cost(5) is None and page.read_cost(6) is not None


def test_words_hold_negative_priorities_and_large_counters(page: GrantPage) -> None:
    page.write(0, Word.PRIORITY, -(2**31))
    page.add(0, Word.BUSY_NS, 2**62)
    assert (page.read(0, Word.PRIORITY), page.read(0, Word.BUSY_NS)) == (-(2**31), 2**62)


@pytest.mark.parametrize("slot", [MAX_WORKERS, -MAX_WORKERS - 1])
def test_a_slot_outside_the_page_cannot_be_accessed(page: GrantPage, slot: int) -> None:
    with pytest.raises(IndexError):
        page.read(slot, Word.DEMAND)
