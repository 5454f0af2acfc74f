"""The most urgent of a worker's sequences."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.urgency import Urgency
from muxmesh.types import SchedulingState

NOW_S = 100.0


def urgency(*sequences: tuple[int, float, float, float]) -> Urgency:
    """Of sequences with priority, arrival, the time to start by and the time at which all is lost."""
    found = Urgency()
    for priority, arrived_at_s, start_by_s, lost_at_s in sequences:
        found.note(SchedulingState(priority, arrived_at_s), start_by_s, lost_at_s, NOW_S)
    return found


@pytest.mark.parametrize(
    ("sequences", "slack_s"),
    [
        ([(0, 1.0, math.inf, math.inf)], math.inf),
        ([(0, 1.0, 100.5, 100.7)], 0.5),
        ([(0, 1.0, 100.5, 100.7), (0, 1.0, 100.2, 100.7)], 0.2),
        # One that is late may catch up; one that has missed its SLO is not counted beside others.
        ([(0, 1.0, 99.0, 101.0), (0, 1.0, 100.5, 101.0)], -1.0),
        ([(0, 1.0, 98.0, 99.0), (0, 1.0, 100.5, 101.0)], 0.5),
        ([(0, 1.0, 98.0, 99.0), (0, 1.0, 97.0, 97.0)], -3.0),
    ],
)
def test_slack_is_that_of_the_first_sequence_which_can_still_meet_its_slo(
    sequences: list[tuple[int, float, float, float]], slack_s: float
) -> None:
    assert urgency(*sequences).demand(NOW_S).slack_s == pytest.approx(slack_s)


@given(st.lists(st.tuples(st.integers(-5, 5), *[st.floats(0, 200)] * 3), min_size=1, max_size=9))
def test_a_demand_has_the_minimum_of_each_value_whatever_the_order_of_the_sequences_is(
    sequences: list[tuple[int, float, float, float]],
) -> None:
    demand = urgency(*sequences).demand(NOW_S)
    can_meet = [(start_by_s, lost_at_s) for _, _, start_by_s, lost_at_s in sequences if lost_at_s >= NOW_S]
    missed = [(lost_at_s, lost_at_s) for *_, lost_at_s in sequences]
    start_by_s, _ = min(can_meet or missed)
    assert demand.lost_s + NOW_S in [pytest.approx(lost) for start, lost in can_meet or missed if start == start_by_s]
    assert demand.slack_s == start_by_s - NOW_S
    assert (demand.priority, demand.arrived_at_s) == (
        min(one[0] for one in sequences),
        min(one[1] for one in sequences),
    )


def test_it_is_outdated_once_its_most_urgent_sequence_has_missed_its_slo() -> None:
    found = urgency((0, 1.0, 100.5, 100.7), (0, 1.0, 101.0, 102.0))
    assert not found.is_outdated(100.6)
    assert found.is_outdated(100.8)
    assert Urgency().is_empty and not found.is_empty
