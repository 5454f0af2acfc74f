"""Who computes next, situation by situation."""

from collections.abc import Collection, Set

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.arbiter import Demand, decide, one_at_a_time
from muxmesh.types import Role


def demands(*slots: int) -> list[Demand]:
    return [Demand(slot, Role.DECODE, "m") for slot in slots]


@pytest.mark.parametrize(
    ("wanting", "last", "expected"),
    [((), 0, ()), ((3,), 3, (3,)), ((1, 2, 5), 2, (5,)), ((1, 2), 5, (1,)), ((0, 4), -1, (0,))],
)
def test_an_idle_device_is_granted_in_turn(wanting: tuple[int, ...], last: int, expected: tuple[int, ...]) -> None:
    granted, kept = decide(one_at_a_time, demands(*wanting), frozenset(), last)
    assert granted == set(expected)
    assert kept == (set(expected) if len(wanting) == 1 else set()), (
        "with others waiting, the grant is for its steps only"
    )


def test_a_worker_that_computes_alone_goes_on() -> None:
    assert decide(one_at_a_time, (), frozenset({2}), 2) == (frozenset(), frozenset({2}))


def test_a_worker_that_computes_is_recalled_when_another_wants_to() -> None:
    assert decide(one_at_a_time, demands(1, 3), frozenset({2}), 2) == (frozenset(), frozenset())


def test_a_policy_may_let_several_compute() -> None:
    """What a policy returns is applied as it is: shares are its business."""

    def halves(demands: Collection[Demand], computing: Set[int], last_granted: int) -> frozenset[int]:
        slots = sorted({demand.slot for demand in demands} | computing)
        return frozenset(slots[:2])

    assert decide(halves, demands(1, 2, 3), frozenset(), -1) == (frozenset({1, 2}), frozenset({1, 2}))
    assert decide(halves, demands(1), frozenset({2, 3}), -1) == (frozenset({1}), frozenset({1, 2}))


@given(st.sets(st.integers(0, 7)), st.integers(-1, 7), st.integers(1, 40))
def test_over_time_everyone_who_wants_to_computes_equally_often(wanting: set[int], last: int, rounds: int) -> None:
    counts = dict.fromkeys(wanting, 0)
    for _ in range(rounds):
        granted, _ = decide(one_at_a_time, demands(*wanting), frozenset(), last)
        assert len(granted) == bool(wanting)
        for slot in granted:
            counts[slot] += 1
            last = slot
    assert max(counts.values(), default=0) - min(counts.values(), default=0) <= 1
