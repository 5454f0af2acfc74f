"""Grants as words in shared memory: who gets them, who has to return them."""

import os
from collections.abc import Collection, Iterator, Set

import pytest

from kvstore.arbiter import Demand
from kvstore.grant_page import MAX_WORKERS, GrantPage, Word
from kvstore.grant_table import GrantTable
from muxmesh.errors import Overloaded
from muxmesh.types import Role


@pytest.fixture
def table() -> Iterator[GrantTable]:
    grants = GrantTable()
    yield grants
    grants.close()


def add(table: GrantTable, demand: bool = True) -> int:
    slot, _ = table.allocate_slot(Role.DECODE, "m")
    table.page.write(slot, Word.DEMAND, int(demand))
    return slot


def words(table: GrantTable, slot: int) -> tuple[int, int]:
    """Granted steps, and whether the grant is recalled."""
    return table.page.read(slot, Word.GRANTED_STEPS), table.page.read(slot, Word.RECALLED)


def test_a_demand_is_granted_and_its_bell_rung(table: GrantTable) -> None:
    slot, bell_fd = table.allocate_slot(Role.PREFILL, "m")
    table.page.write(slot, Word.DEMAND, 1)
    os.eventfd_write(table.doorbell_fd, 1)
    table.on_doorbell()
    assert words(table, slot) == (1, 0)
    assert os.eventfd_read(bell_fd) == 1


def test_a_doorbell_that_nobody_rang_changes_nothing(table: GrantTable) -> None:
    slot = add(table)
    table.on_doorbell()
    assert words(table, slot) == (0, 0)


def test_the_one_who_computes_is_recalled_while_another_waits(table: GrantTable) -> None:
    first = add(table)
    table.arbitrate()
    table.page.write(first, Word.DEMAND, 0)
    second = add(table)
    table.arbitrate()
    assert (words(table, first), words(table, second)) == ((1, 1), (0, 0))
    table.page.write(first, Word.GRANTED_STEPS, 0)
    table.arbitrate()
    assert (words(table, first)[0], words(table, second)) == (0, (1, 0))


def test_a_grant_is_recalled_from_the_start_if_another_waits_already(table: GrantTable) -> None:
    first, second = add(table), add(table)
    table.arbitrate()
    assert (words(table, first), words(table, second)) == ((1, 1), (0, 0))


def test_a_worker_is_not_recalled_for_its_own_demand(table: GrantTable) -> None:
    slot = add(table)
    table.arbitrate()
    table.arbitrate()
    assert words(table, slot) == (1, 0)


def test_the_grant_of_a_dead_worker_goes_to_the_next(table: GrantTable) -> None:
    first, second = add(table), add(table)
    table.arbitrate()
    table.free_slot(first)
    assert words(table, second) == (1, 0)


def test_counters_of_a_slot_start_at_zero_for_its_next_worker(table: GrantTable) -> None:
    slot = add(table)
    table.page.add(slot, Word.NUM_STEPS, 7)
    table.free_slot(slot)
    assert add(table) == slot
    assert table.page.read(slot, Word.NUM_STEPS) == 0


def test_one_worker_too_many_is_refused(table: GrantTable) -> None:
    for _ in range(MAX_WORKERS):
        add(table, demand=False)
    with pytest.raises(Overloaded, match="at most"):
        table.allocate_slot(Role.DECODE, "m")


def test_the_policy_sees_who_wants_what() -> None:
    seen: list[Collection[Demand]] = []

    def watch(demands: Collection[Demand], computing: Set[int], last_granted: int) -> frozenset[int]:
        seen.append(demands)
        return frozenset()

    table = GrantTable(watch)
    slot, _ = table.allocate_slot(Role.PREFILL, "large", share=0.4)
    for word, value in ((Word.DEMAND, 1), (Word.PRIORITY, -2), (Word.SLACK_US, 1500)):
        table.page.write(slot, word, value)
    table.arbitrate()
    assert list(seen[0]) == [Demand(slot, Role.PREFILL, "large", 0.4, -2, 0.0015)]
    assert words(table, slot) == (0, 0), "it is applied as it is"
    table.close()


def test_a_policy_may_grant_several_at_once() -> None:
    table = GrantTable(lambda demands, computing, last: frozenset({d.slot for d in demands} | set(computing)))
    first, second = add(table), add(table)
    table.arbitrate()
    assert words(table, first) == words(table, second) == (1, 0)
    table.close()


def test_both_sides_see_the_same_words(table: GrantTable) -> None:
    other = GrantPage(table.page_fd)
    other.write(3, Word.DEMAND, 1)
    assert table.page.read(3, Word.DEMAND) == 1
