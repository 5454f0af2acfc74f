"""Grants as words in shared memory: which slots get them, and which have to return them."""

import math
import os
from collections.abc import Collection, Iterator

import pytest

from kvstore.arbiter import STEPS_PER_GRANT, Demand, slots_of
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


def num_rings(bell_fd: int) -> int:
    try:
        return os.eventfd_read(bell_fd)
    except BlockingIOError:
        return 0


# Grants and recalls


def test_a_demand_is_granted_and_its_bell_is_rung() -> None:
    table = GrantTable()
    (slot, bell_fd), (_, other_bell_fd) = (table.allocate_slot(Role.PREFILL, "m") for _ in range(2))
    table.page.write(slot, Word.DEMAND, 1)
    os.eventfd_write(table.doorbell_fd, 1)
    table.on_doorbell()
    assert words(table, slot) == (STEPS_PER_GRANT, 0)
    assert (num_rings(bell_fd), num_rings(other_bell_fd)) == (1, 0)
    table.arbitrate()
    assert num_rings(bell_fd) == 0, "a bell is rung for a new grant only"
    table.close()


def test_a_doorbell_that_was_not_rung_changes_nothing(table: GrantTable) -> None:
    slot = add(table)
    table.on_doorbell()
    assert words(table, slot) == (0, 0)


def test_several_rings_of_the_doorbell_are_answered_at_once(table: GrantTable) -> None:
    slot = add(table)
    for _ in range(3):
        os.eventfd_write(table.doorbell_fd, 1)
    table.on_doorbell()
    assert words(table, slot) == (1, 0)
    assert num_rings(table.doorbell_fd) == 0


def test_the_grant_of_a_computing_worker_is_recalled_while_another_waits(table: GrantTable) -> None:
    first = add(table)
    table.arbitrate()
    table.page.write(first, Word.DEMAND, 0)
    second = add(table)
    table.arbitrate()
    assert (words(table, first), words(table, second)) == ((1, 1), (0, 0))
    table.page.write(first, Word.GRANTED_STEPS, 0)
    table.arbitrate()
    assert (words(table, first)[0], words(table, second)) == (0, (1, 0))


def test_a_recall_is_withdrawn_when_the_other_demand_has_ended(table: GrantTable) -> None:
    first = add(table)
    table.arbitrate()
    second = add(table)
    table.arbitrate()
    assert words(table, first) == (1, 1)
    table.page.write(second, Word.DEMAND, 0)
    table.arbitrate()
    assert words(table, first) == (1, 0)


def test_a_grant_is_recalled_from_its_start_if_another_worker_waits_already(table: GrantTable) -> None:
    first, second = add(table), add(table)
    table.arbitrate()
    assert (words(table, first), words(table, second)) == ((1, 1), (0, 0))


def test_a_worker_is_not_recalled_for_its_own_demand(table: GrantTable) -> None:
    slot = add(table)
    table.arbitrate()
    table.arbitrate()
    assert words(table, slot) == (1, 0)


def test_workers_that_always_demand_are_granted_round_robin(table: GrantTable) -> None:
    slots = [add(table) for _ in range(3)]
    granted = []
    for _ in range(7):
        table.arbitrate()
        (slot,) = (slot for slot in slots if words(table, slot)[0])
        granted.append(slot)
        table.page.write(slot, Word.GRANTED_STEPS, 0)
    assert granted == [0, 1, 2, 0, 1, 2, 0]


# Slots


def test_the_grant_of_an_exited_worker_goes_to_the_next_one(table: GrantTable) -> None:
    first, second = add(table), add(table)
    table.arbitrate()
    table.free_slot(first)
    assert words(table, second) == (1, 0)


def test_a_slot_starts_at_zero_for_its_next_worker(table: GrantTable) -> None:
    slot = add(table)
    table.page.add(slot, Word.NUM_STEPS, 7)
    table.free_slot(slot)
    assert add(table) == slot
    assert table.page.read(slot, Word.NUM_STEPS) == 0


def test_a_worker_that_still_writes_into_a_freed_slot_does_not_disturb_the_next_one(table: GrantTable) -> None:
    slot = add(table)
    table.free_slot(slot)
    table.page.add(slot, Word.HEARTBEATS, 1)
    assert add(table, demand=False) == slot
    assert table.page.read(slot, Word.HEARTBEATS) == 0


def test_a_freed_slot_closes_its_bell(table: GrantTable) -> None:
    slot, bell_fd = table.allocate_slot(Role.DECODE, "m")
    table.free_slot(slot)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(bell_fd)


def test_a_worker_without_a_free_slot_is_refused_until_another_exits(table: GrantTable) -> None:
    for _ in range(MAX_WORKERS):
        add(table, demand=False)
    with pytest.raises(Overloaded, match=f"a unit has at most {MAX_WORKERS} workers"):
        table.allocate_slot(Role.DECODE, "m")
    table.free_slot(5)
    assert add(table) == 5


# Policies


def test_the_policy_gets_the_words_and_the_registration_of_each_demand() -> None:
    seen, running = list[list[Demand]](), list[list[Demand]]()

    def recorded(waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
        seen.append(list(waiting))
        running.append(list(computing))
        return frozenset()

    table = GrantTable(recorded)
    first, _ = table.allocate_slot(Role.PREFILL, "large", share=0.4)
    for word, value in ((Word.DEMAND, 1), (Word.PRIORITY, -2), (Word.SLACK_US, 1500)):
        table.page.write(first, word, value)
    second = add(table)
    add(table, demand=False)
    table.arbitrate()
    assert seen[0] == [
        Demand(first, Role.PREFILL, "large", 0.4, -2, 0.0015),
        Demand(second, Role.DECODE, "m", 1.0, 0, math.inf),
    ]
    assert running[0] == []
    assert words(table, first) == (0, 0), "what the policy does not return is not granted"
    table.page.write(second, Word.GRANTED_STEPS, 1)
    table.arbitrate()
    assert [demand.slot for demand in seen[-1]] == [first]
    assert running[-1] == [Demand(second, Role.DECODE, "m", 1.0, 0, math.inf)]
    table.close()


def test_a_policy_may_grant_several_slots_at_once() -> None:
    table = GrantTable(lambda waiting, computing, last: slots_of([*waiting, *computing]))
    first, second = add(table), add(table)
    table.arbitrate()
    assert words(table, first) == words(table, second) == (1, 0)
    table.close()


def test_the_page_of_the_table_is_shared_by_its_file_descriptor(table: GrantTable) -> None:
    other = GrantPage(table.page_fd)
    other.write(3, Word.DEMAND, 1)
    assert table.page.read(3, Word.DEMAND) == 1
