import pytest

from muxmesh.metrics.family import Histogram, bounds_1_2_5, counter, gauge, merged


def test_a_histogram_counts_values_up_to_each_bound() -> None:
    values = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        values.observe(value)
    values.observe(2.0, count=3)
    assert values.value.cumulative == (2, 6, 6, 7)
    assert values.value.sum == pytest.approx(0.5 + 1 + 1.5 + 7 + 3 * 2)


def test_a_value_of_a_histogram_does_not_change() -> None:
    values = Histogram((1.0,))
    before = values.value
    values.observe(0.5)
    assert before.cumulative == (0, 0)


def test_bounds_end_at_the_largest() -> None:
    assert bounds_1_2_5(100) == (1, 2, 5, 10, 20, 50, 100)
    assert bounds_1_2_5(99) == (1, 2, 5, 10, 20, 50)
    assert bounds_1_2_5(1) == (1,)


def test_families_of_one_name_are_merged() -> None:
    one = gauge("g", "Help.", ("model_name",), {("a",): 1})
    two = gauge("g", "Help.", ("model_name",), {("b",): 2})
    other = counter("c_total", "Help.", (), {(): 3})
    assert merged([one, other, two]) == [gauge("g", "Help.", ("model_name",), {("a",): 1, ("b",): 2}), other]


def test_the_name_of_a_counter_ends_in_total() -> None:
    with pytest.raises(AssertionError):
        counter("c", "Help.", (), {})
