"""Which slots compute, situation by situation and over many rounds."""

from collections.abc import Collection, Set

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.arbiter import Demand, decide, one_at_a_time
from muxmesh.types import Role

SLOTS = st.sets(st.integers(0, 7))


def demands(*slots: int) -> list[Demand]:
    return [Demand(slot, Role.DECODE, "m") for slot in slots]


@pytest.mark.parametrize(
    ("waiting", "last_granted", "expected"),
    [((), 0, ()), ((3,), 3, (3,)), ((1, 2, 5), 2, (5,)), ((1, 2), 5, (1,)), ((0, 4), -1, (0,)), ((2, 3), 2, (3,))],
)
def test_an_idle_device_is_granted_round_robin(
    waiting: tuple[int, ...], last_granted: int, expected: tuple[int, ...]
) -> None:
    granted, kept = decide(one_at_a_time, demands(*waiting), frozenset(), last_granted)
    assert granted == set(expected)
    assert kept == (set(expected) if len(waiting) == 1 else set()), "while others wait, a grant is recalled at once"


def test_the_order_of_the_demands_does_not_matter() -> None:
    assert one_at_a_time(demands(5, 1, 3), frozenset(), 2) == one_at_a_time(demands(1, 3, 5), frozenset(), 2) == {3}


def test_a_worker_that_computes_alone_keeps_its_grant() -> None:
    assert decide(one_at_a_time, (), frozenset({2}), 2) == (frozenset(), frozenset({2}))


def test_the_grant_of_a_computing_worker_is_recalled_when_another_demands() -> None:
    assert decide(one_at_a_time, demands(1, 3), frozenset({2}), 2) == (frozenset(), frozenset())


def first_two(demands: Collection[Demand], computing: Set[int], last_granted: int) -> frozenset[int]:
    """A policy that lets the two lowest slots compute."""
    return frozenset(sorted({demand.slot for demand in demands} | computing)[:2])


def test_a_policy_may_let_several_workers_compute() -> None:
    assert decide(first_two, demands(1, 2, 3), frozenset(), -1) == (frozenset({1, 2}), frozenset({1, 2}))
    assert decide(first_two, demands(1), frozenset({2, 3}), -1) == (frozenset({1}), frozenset({1, 2}))


def test_the_second_pass_of_a_policy_sees_the_new_grants_as_computing() -> None:
    calls: list[tuple[set[int], set[int], int]] = []

    def recorded(demands: Collection[Demand], computing: Set[int], last_granted: int) -> frozenset[int]:
        calls.append(({demand.slot for demand in demands}, set(computing), last_granted))
        return first_two(demands, computing, last_granted)

    decide(recorded, demands(1, 4, 6), frozenset({2}), 0)
    assert calls == [({1, 4, 6}, {2}, 0), ({4, 6}, {1, 2}, 1)]


@given(SLOTS, SLOTS, st.integers(-1, 7))
def test_only_demands_are_granted_and_only_computing_slots_keep_a_grant(
    waiting: set[int], computing: set[int], last_granted: int
) -> None:
    for policy in (one_at_a_time, first_two):
        granted, kept = decide(policy, demands(*waiting - computing), frozenset(computing), last_granted)
        assert granted <= waiting - computing
        assert kept <= computing | granted


@given(SLOTS, st.integers(-1, 7), st.integers(1, 40))
def test_over_time_all_slots_that_demand_are_granted_equally_often(
    waiting: set[int], last_granted: int, rounds: int
) -> None:
    counts = dict.fromkeys(waiting, 0)
    for _ in range(rounds):
        granted, _ = decide(one_at_a_time, demands(*waiting), frozenset(), last_granted)
        assert len(granted) == bool(waiting)
        for slot in granted:
            counts[slot] += 1
            last_granted = slot
    assert max(counts.values(), default=0) - min(counts.values(), default=0) <= 1


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["demand", "step", "finish"])), max_size=60))
def test_one_worker_computes_at_a_time_and_each_waits_for_at_most_one_turn_of_the_others(
    events: list[tuple[int, str]],
) -> None:
    """Workers as in a unit: one returns its grant if it was recalled, or when it has nothing more to compute."""
    waiting: set[int] = set()
    computing: set[int] = set()
    recalled: set[int] = set()
    num_passed_over = dict.fromkeys(range(6), 0)
    last_granted = -1
    for slot, event in events:
        if event == "demand" and slot not in computing:
            waiting.add(slot)
        elif slot in computing and (event == "finish" or slot in recalled):
            computing.remove(slot)
        granted, kept = decide(one_at_a_time, demands(*waiting), frozenset(computing), last_granted)
        for new in granted:
            last_granted = new
            num_passed_over = {one: count + 1 if one in waiting else 0 for one, count in num_passed_over.items()}
            num_passed_over[new] = 0
        waiting -= granted
        computing |= granted
        recalled = computing - kept
        assert len(computing) <= 1
        assert computing or not waiting, "the device is idle while a worker waits"
        assert max(num_passed_over.values()) < 6, "a worker waits for more than one turn of each other worker"
