"""Grants as words in shared memory: which slots get them, and which have to return them."""

import os
from collections.abc import Iterator

import pytest

from kvstore.arbiter import STEPS_PER_GRANT
from kvstore.grant_page import MAX_WORKERS, GrantPage, Word
from kvstore.grant_table import GrantTable, StalledWorkers
from muxmesh.clock import ManualClock
from muxmesh.config.arbiter_config import ArbiterConfig
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


def test_another_configuration_decides_at_once(table: GrantTable) -> None:
    first, second = add(table), add(table)
    table.arbitrate()
    assert [words(table, slot) for slot in (first, second)] == [(STEPS_PER_GRANT, 1), (0, 0)]
    table.configure(ArbiterConfig(mode="spatial"))
    assert [words(table, slot) for slot in (first, second)] == [(STEPS_PER_GRANT, 0), (STEPS_PER_GRANT, 0)]


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


# Grants that are not returned


def stalled_table() -> tuple[GrantTable, int, int]:
    """A worker with a grant that is recalled because another one waits, and their slots."""
    table = GrantTable(ArbiterConfig(longest_grant_s=2, kill_after_s=5))
    first = add(table)
    table.arbitrate()
    table.page.write(first, Word.DEMAND, 0)
    second = add(table)
    table.arbitrate()
    table.revoke_stalled(1)
    return table, first, second


def revoked_table() -> tuple[GrantTable, int, int]:
    """As `stalled_table`; the grant of the first worker is revoked, and the second one has one."""
    table, first, second = stalled_table()
    for _ in range(2):
        table.revoke_stalled(1)
    return table, first, second


def test_a_recalled_grant_that_is_not_returned_is_revoked_and_its_share_is_free() -> None:
    table, first, second = stalled_table()
    assert table.revoke_stalled(1) == StalledWorkers([], []) and words(table, second)[0] == 0
    assert table.revoke_stalled(1) == StalledWorkers([first], [])
    assert words(table, second) == (1, 0), "the other computes, and no worker waits for its share"
    assert table.num_revoked == {(Role.DECODE, "m"): 1}
    table.close()


def test_a_worker_with_a_revoked_grant_gets_no_other_one_until_it_returns_it() -> None:
    table, first, second = revoked_table()
    table.page.write(second, Word.GRANTED_STEPS, 0)
    table.page.write(second, Word.DEMAND, 0)
    table.page.write(first, Word.DEMAND, 1)
    table.arbitrate()
    assert words(table, first) == (1, 1), "the word of its old grant; the bell has not been rung"
    assert table.revoke_stalled(1) == StalledWorkers([], []), "it is revoked once"
    table.page.write(first, Word.GRANTED_STEPS, 0)
    table.arbitrate()
    assert words(table, first) == (1, 0)
    table.close()


def test_a_late_return_takes_nothing_from_the_worker_that_computes_meanwhile() -> None:
    table, first, second = revoked_table()
    table.page.write(first, Word.GRANTED_STEPS, 0)
    table.arbitrate()
    assert (words(table, first)[0], words(table, second)) == (0, (1, 0))
    table.close()


def test_a_worker_that_hangs_in_a_step_is_to_be_killed_even_if_no_worker_needs_its_share() -> None:
    table = GrantTable(ArbiterConfig(longest_grant_s=2, kill_after_s=5))
    slot = add(table)
    table.arbitrate()
    table.page.write(slot, Word.DEMAND, 0)
    found = [table.revoke_stalled(1).to_kill for _ in range(7)]
    assert found == [[], [], [], [], [], [slot], [slot]], "and not revoked, as it was not recalled"
    table.close()


def test_a_worker_that_computes_steps_is_left_alone_however_long_it_keeps_its_grant() -> None:
    table = GrantTable(ArbiterConfig(longest_grant_s=2, kill_after_s=5))
    slot = add(table)
    table.arbitrate()
    for _ in range(20):
        table.page.add(slot, Word.BUSY_NS, 1)
        assert table.revoke_stalled(4) == StalledWorkers([], [])
    table.close()


def test_the_time_under_a_grant_starts_with_each_grant_even_if_no_step_was_counted_between_two() -> None:
    table = GrantTable(ArbiterConfig(longest_grant_s=2, kill_after_s=5))
    slot = add(table)
    for _ in range(3):
        table.arbitrate()
        assert [table.revoke_stalled(1).to_kill for _ in range(5)] == [[]] * 5
        table.page.write(slot, Word.GRANTED_STEPS, 0)
    table.close()


def test_a_worker_has_the_whole_time_after_the_recall_to_end_its_step() -> None:
    table = GrantTable(ArbiterConfig(longest_grant_s=2, kill_after_s=50))
    first = add(table)
    table.arbitrate()
    for _ in range(10):
        table.revoke_stalled(1)
    add(table)
    table.arbitrate()
    assert [table.revoke_stalled(1).revoked for _ in range(3)] == [[], [], [first]]
    table.close()


def test_a_killed_worker_gets_no_grant_for_the_demand_that_it_leaves(table: GrantTable) -> None:
    killed, other = add(table), add(table)
    table.end_grants(killed)
    table.arbitrate()
    assert (words(table, killed), words(table, other)) == ((0, 0), (1, 0)), "and no grant is recalled for it"
    table.free_slot(killed)
    assert add(table) == killed
    table.arbitrate()
    assert words(table, other) == (1, 1), "the next worker in its slot takes turns"


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


# What the arbiter decides from


def test_the_best_class_that_workers_report_goes_first(table: GrantTable) -> None:
    first, second = add(table), add(table)
    table.page.write(first, Word.PRIORITY, 1)
    table.arbitrate()
    assert (words(table, first)[0], words(table, second)[0]) == (0, 1)


def test_the_time_left_counts_from_the_moment_of_the_decision() -> None:
    clock = ManualClock()
    table = GrantTable(ArbiterConfig(urgent_slack_s=0.1), clock)
    holder, due = (table.allocate_slot(role, "m")[0] for role in (Role.PREFILL, Role.DECODE))
    for word in (Word.DUE_US, Word.LOST_US):
        table.page.write(due, word, int((clock.monotonic_s() + 5) * 1e6))
    granted = []
    for _ in range(3):
        for slot in (holder, due):
            table.page.write(slot, Word.DEMAND, 1)
            table.page.write(slot, Word.GRANTED_STEPS, 0)
        table.arbitrate()
        granted.append([words(table, slot)[0] for slot in (holder, due)])
        clock.advance(4.95)
    assert granted == [[1, 0], [0, 1], [1, 0]], "it is due soon at the second decision, and too late at the third"
    table.close()


@pytest.mark.parametrize(("passed_s", "goes_first"), [(0.3, True), (0.6, False)])
def test_a_late_sequence_is_urgent_until_it_has_missed_its_target(passed_s: float, goes_first: bool) -> None:
    clock = ManualClock(50.0)
    table = GrantTable(ArbiterConfig(), clock)
    prefill, late = (table.allocate_slot(role, "m")[0] for role in (Role.PREFILL, Role.DECODE))
    for word, in_s in ((Word.DUE_US, -0.1), (Word.LOST_US, 0.5)):
        table.page.write(late, word, int((clock.monotonic_s() + in_s) * 1e6))
    for slot in (prefill, late):
        table.page.write(slot, Word.DEMAND, 1)
    clock.advance(passed_s)
    table.arbitrate()
    assert [words(table, slot)[0] for slot in (prefill, late)] == [int(not goes_first), int(goes_first)]
    table.close()


def test_what_workers_have_computed_decides_which_model_is_above_its_part() -> None:
    clock = ManualClock(50.0)
    table = GrantTable(ArbiterConfig(), clock)
    flooded, other = table.allocate_slot(Role.PREFILL, "a")[0], table.allocate_slot(Role.DECODE, "b")[0]
    for word in (Word.DUE_US, Word.LOST_US):
        table.page.write(flooded, word, int((clock.monotonic_s() - 1) * 1e6))
    granted = []
    for busy_ns in (0, 2_000_000_000):
        for slot, busy in ((flooded, busy_ns), (other, busy_ns // 10)):
            table.page.write(slot, Word.BUSY_NS, busy)
            table.page.write(slot, Word.DEMAND, 1)
            table.page.write(slot, Word.GRANTED_STEPS, 0)
        table.arbitrate()
        granted.append([words(table, slot)[0] for slot in (flooded, other)])
    assert granted == [[1, 0], [0, 1]], "once it has used more than half, its late prompts wait"
    table.close()


def test_with_fcfs_the_oldest_request_that_workers_report_goes_first() -> None:
    table = GrantTable(ArbiterConfig(mode="fcfs"))
    slots = [table.allocate_slot(Role.PREFILL, model)[0] for model in "ab"]
    for slot, arrived_at_s in zip(slots, (1001.5, 1001.25), strict=True):
        table.page.write(slot, Word.DEMAND, 1)
        table.page.write(slot, Word.ARRIVED_US, int(arrived_at_s * 1e6))
    table.arbitrate()
    assert [words(table, slot)[0] for slot in slots] == [0, 1]
    table.close()


def test_workers_whose_shares_fit_are_granted_together(table: GrantTable) -> None:
    slots = [table.allocate_slot(Role.DECODE, model, share)[0] for model, share in (("a", 0.6), ("b", 0.4), ("c", 0.1))]
    for slot in slots:
        table.page.write(slot, Word.DEMAND, 1)
    table.arbitrate()
    assert [words(table, slot) for slot in slots] == [(1, 1), (1, 0), (0, 0)]


def test_the_page_of_the_table_is_shared_by_its_file_descriptor(table: GrantTable) -> None:
    other = GrantPage(table.page_fd)
    other.write(3, Word.DEMAND, 1)
    assert table.page.read(3, Word.DEMAND) == 1


def test_the_page_has_the_end_of_a_prefill_step_only_while_a_decode_waits_for_it() -> None:
    clock = ManualClock(50.0)
    table = GrantTable(ArbiterConfig(mode="adbs", max_stall_s=0.25), clock)
    prefill, decode = (table.allocate_slot(role, "m")[0] for role in (Role.PREFILL, Role.DECODE))
    table.page.write(prefill, Word.DEMAND, 1)
    table.arbitrate()
    words = [table.page.read(prefill, word) for word in (Word.LONGEST_STEP_US, Word.STEP_END_US)]
    assert words == [250_000, 0]
    table.page.write(decode, Word.DEMAND, 1)
    table.arbitrate()
    assert table.page.read(prefill, Word.STEP_END_US) == 50_250_000
    table.page.write(decode, Word.DEMAND, 0)
    table.arbitrate()
    assert table.page.read(prefill, Word.STEP_END_US) == 0
    table.close()
