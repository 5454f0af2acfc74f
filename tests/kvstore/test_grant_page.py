"""The words that kvstore and its workers share."""

import pytest

from kvstore.device_memory import new_memfd
from kvstore.grant_page import MAX_WORKERS, PAGE_BYTES, GrantPage, Word
from muxmesh.step_cost import StepCost


@pytest.fixture
def page() -> GrantPage:
    return GrantPage(new_memfd("test", PAGE_BYTES))


def test_every_word_of_every_slot_has_a_place_of_its_own(page: GrantPage) -> None:
    written = {}
    for slot in (0, 1, MAX_WORKERS - 1):
        for word in Word:
            written[slot, word] = 1000 * slot + word + 1
            page.write(slot, word, written[slot, word])
    assert {key: page.read(*key) for key in written} == written


def test_a_step_cost_is_read_as_it_was_written(page: GrantPage) -> None:
    cost = StepCost(0.01, 0.002, 0.0003, 4.5, 321.0)
    page.write(7, Word.SWAP_NS, 99)
    page.write_cost(7, cost)
    assert page.read_cost(7) == cost
    assert page.read(7, Word.SWAP_NS) == 99


def test_before_the_first_step_there_is_no_cost(page: GrantPage) -> None:
    assert page.read_cost(7) is None


def test_a_cleared_slot_is_as_new_and_its_neighbours_stay(page: GrantPage) -> None:
    for slot in (4, 5, 6):
        page.add(slot, Word.NUM_STEPS, slot)
        page.write_cost(slot, StepCost(1.0, 1.0, 1.0))
    page.clear(5)
    assert [page.read(slot, Word.NUM_STEPS) for slot in (4, 5, 6)] == [4, 0, 6]
    assert page.read_cost(5) is None and page.read_cost(6) is not None


def test_counters_take_negative_priorities_and_large_values(page: GrantPage) -> None:
    page.write(0, Word.PRIORITY, -(2**31))
    page.add(0, Word.BUSY_NS, 2**62)
    assert (page.read(0, Word.PRIORITY), page.read(0, Word.BUSY_NS)) == (-(2**31), 2**62)
