import pytest

from benchmarks.shared_device.__main__ import CASES, MUST
from benchmarks.shared_device.measure import in_turn, rate_of_ends


def test_systems_are_measured_in_turns_of_alternating_order() -> None:
    assert in_turn(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert in_turn(["a", "b", "c"], 1) == ["c", "b", "a"]


def test_a_capacity_leaves_out_how_the_batch_fills_and_empties() -> None:
    ends_s = [*(5.0,) * 10, *(5 + 0.5 * n for n in range(1, 31)), *(90.0 + n for n in range(10))]
    assert rate_of_ends(ends_s) == pytest.approx(2.0)


def test_spatial_needs_as_many_cores_as_models_so_three_models_are_never_spatial() -> None:
    assert all("spatial" not in case.systems for case in CASES.values() if len(case.models) > 2)
    assert "spatial" in CASES[MUST].systems
