"""Which slots compute, situation by situation and over many rounds."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.arbiter import Demand, all_at_once, decide, one_at_a_time, slots_of
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
    granted, kept = decide(one_at_a_time, demands(*waiting), (), last_granted)
    assert granted == set(expected)
    assert kept == (set(expected) if len(waiting) == 1 else set()), "while others wait, a grant is recalled at once"


def test_the_order_of_the_demands_does_not_matter() -> None:
    assert one_at_a_time(demands(5, 1, 3), (), 2) == one_at_a_time(demands(1, 3, 5), (), 2) == {3}


def test_a_worker_that_computes_alone_keeps_its_grant() -> None:
    assert decide(one_at_a_time, (), demands(2), 2) == (frozenset(), frozenset({2}))


def test_the_grant_of_a_computing_worker_is_recalled_when_another_demands() -> None:
    assert decide(one_at_a_time, demands(1, 3), demands(2), 2) == (frozenset(), frozenset())


def first_two(waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
    """A policy that lets the two lowest slots compute."""
    return frozenset(sorted(slots_of(waiting) | slots_of(computing))[:2])


def test_a_policy_may_let_several_workers_compute() -> None:
    assert decide(first_two, demands(1, 2, 3), (), -1) == (frozenset({1, 2}), frozenset({1, 2}))
    assert decide(first_two, demands(1), demands(2, 3), -1) == (frozenset({1}), frozenset({1, 2}))


def test_the_second_pass_of_a_policy_sees_the_new_grants_as_computing() -> None:
    calls: list[tuple[frozenset[int], frozenset[int], int]] = []

    def recorded(waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
        calls.append((slots_of(waiting), slots_of(computing), last_granted))
        return first_two(waiting, computing, last_granted)

    decide(recorded, demands(1, 4, 6), demands(2), 0)
    assert calls == [(frozenset({1, 4, 6}), frozenset({2}), 0), (frozenset({4, 6}), frozenset({1, 2}), 1)]


def shares(waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
    """A policy that fills the device with workers, by their shares, in the order of their slots."""
    used, result = sum(one.share for one in computing), set(slots_of(computing))
    for demand in sorted(waiting, key=lambda one: one.slot):
        if used + demand.share <= 1:
            used += demand.share
            result.add(demand.slot)
    return frozenset(result)


def test_a_policy_sees_the_shares_of_the_computing_workers() -> None:
    small, large = Demand(1, Role.DECODE, "m", 0.25), Demand(2, Role.PREFILL, "m", 0.75)
    assert decide(shares, [small], [large], 2) == (frozenset({1}), frozenset({1, 2}))
    assert decide(shares, [small], [Demand(2, Role.PREFILL, "m", 0.8)], 2) == (frozenset(), frozenset({2}))


@given(SLOTS, SLOTS, st.integers(-1, 7))
def test_only_demands_are_granted_and_only_computing_slots_keep_a_grant(
    waiting: set[int], computing: set[int], last_granted: int
) -> None:
    for policy in (one_at_a_time, first_two):
        granted, kept = decide(policy, demands(*waiting - computing), demands(*computing), last_granted)
        assert granted <= waiting - computing
        assert kept <= computing | granted


@given(SLOTS, st.integers(-1, 7), st.integers(1, 40))
def test_over_time_all_slots_that_demand_are_granted_equally_often(
    waiting: set[int], last_granted: int, rounds: int
) -> None:
    counts = dict.fromkeys(waiting, 0)
    for _ in range(rounds):
        granted, _ = decide(one_at_a_time, demands(*waiting), (), last_granted)
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
        granted, kept = decide(one_at_a_time, demands(*waiting), demands(*computing), last_granted)
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


@given(SLOTS, SLOTS)
def test_all_at_once_grants_every_demand_and_recalls_nothing(waiting: set[int], computing: set[int]) -> None:
    wait, compute = demands(*(waiting - computing)), demands(*computing)
    assert decide(all_at_once, wait, compute, 3) == (slots_of(wait), frozenset(waiting | computing))
