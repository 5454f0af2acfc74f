"""The best plan of given units, compared with all plans."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.unit_partition import MAX_MODELS, best_partition
from muxmesh.placement.unit_moves import Unit

UNITS = st.tuples(st.sampled_from([1, 2, 4]), st.frozensets(st.integers(0, 3), min_size=1))


def best_value(units: list[Unit], values: list[float], num_devices: int) -> float | None:
    """The value of the best of all subsets of ``units``."""
    found = [
        sum(values[one] for one in chosen)
        for count in range(1, 5)
        for chosen in combinations(range(len(units)), count)
        if sorted(model for one in chosen for model in units[one][1]) == [0, 1, 2, 3]
        and sum(units[one][0] for one in chosen) <= num_devices
    ]
    return max(found, default=None)


@given(st.lists(st.tuples(UNITS, st.integers(-5, 20)), max_size=12), st.integers(1, 8))
def test_no_choice_of_units_is_better(entries: list[tuple[Unit, int]], num_devices: int) -> None:
    units, values = [unit for unit, _ in entries], [float(value) for _, value in entries]
    expected = best_value(units, values, num_devices)
    chosen = best_partition(units, values, 4, num_devices)
    if chosen is None:
        assert expected is None
        return
    assert sorted(model for one in chosen for model in units[one][1]) == [0, 1, 2, 3]
    assert sum(units[one][0] for one in chosen) <= num_devices
    assert sum(values[one] for one in chosen) == expected


def test_too_many_models_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 20"):
        best_partition([], [], MAX_MODELS + 1, 8)


def test_of_units_alike_the_most_valuable_is_chosen() -> None:
    both: Unit = (1, frozenset({0, 1}))
    assert best_partition([both, both, both], [1.0, 3.0, 2.0], 2, 1) == [1]
