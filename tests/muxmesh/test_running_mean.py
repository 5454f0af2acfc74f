from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.running_mean import RunningMean

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


def mean_of(values: list[float], min_rate: float) -> RunningMean:
    running = RunningMean(min_rate)
    for value in values:
        running.add(value)
    return running


@given(VALUES)
def test_without_a_minimum_rate_the_mean_is_arithmetic(values: list[float]) -> None:
    running = mean_of(values, 0.0)
    assert running.mean == pytest.approx(fmean(values), rel=1e-9, abs=1e-6)
    assert running.count == len(values)


def test_the_mean_is_arithmetic_up_to_the_window() -> None:
    values = [3.0, 1.0, 8.0, 4.0]
    assert mean_of(values, 1 / 4).mean == pytest.approx(4.0)


def test_after_the_window_each_value_has_the_minimum_rate() -> None:
    running = mean_of([4.0] * 100, 1 / 4)
    running.add(8.0)
    assert running.mean == pytest.approx(4.0 + (8.0 - 4.0) / 4)


def test_after_the_window_old_values_decay_geometrically() -> None:
    running = mean_of([1.0] * 10 + [0.0] * 20, 1 / 10)
    assert running.mean == pytest.approx(0.9**20)


@given(VALUES, st.floats(0, 1))
def test_the_mean_is_within_the_range_of_the_values(values: list[float], min_rate: float) -> None:
    slack = 1e-9 * max(map(abs, values)) + 1e-9
    assert min(values) - slack <= mean_of(values, min_rate).mean <= max(values) + slack


def test_a_minimum_rate_of_one_is_the_last_value() -> None:
    assert mean_of([5.0, 2.0, 7.0], 1.0).mean == 7.0


def test_an_average_continues_from_a_saved_mean_and_count() -> None:
    whole, first = mean_of([1.0, 5.0, 9.0], 0.1), mean_of([1.0, 5.0], 0.1)
    resumed = RunningMean(0.1, first.mean, first.count)
    resumed.add(9.0)
    assert resumed == whole
