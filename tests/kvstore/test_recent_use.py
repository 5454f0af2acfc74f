"""How much of the device each model has used lately."""

import math

import pytest

from kvstore.recent_use import MEMORY_S, RecentUse


def used(**parts: float) -> RecentUse:
    """Models that have computed on these parts of the device, in steps of 10 ms, from 0 to 30 s."""
    use = RecentUse()
    for step in range(3000):
        for model, part in parts.items():
            use.count(model, part * 0.01, step * 0.01 + 0.01)
    return use


def test_the_part_of_a_model_that_computes_without_a_pause_is_one() -> None:
    assert used(a=1.0).part("a", 30.0) == pytest.approx(1.0, rel=0.01)
    assert used(a=0.3, b=0.2).part("b", 30.0) == pytest.approx(0.2, rel=0.01)


def test_use_is_forgotten_with_time() -> None:
    use = used(a=1.0)
    assert use.part("a", 30.0 + MEMORY_S) == pytest.approx(use.part("a", 30.0) / math.e)
    assert use.part("a", 1000.0) < 1e-9
    assert use.part("never seen", 30.0) == 0


def test_a_model_is_above_its_part_if_it_uses_more_than_an_equal_one() -> None:
    assert used(a=0.6, b=0.3, c=0.1).above_equal_part(30.0) == {"a"}


def test_models_that_use_nothing_take_no_part() -> None:
    assert used(a=0.45, b=0.4, c=0.001).above_equal_part(30.0) == set(), "less than a half"
    assert used(a=1.0).above_equal_part(31.0) == set(), "it is alone"
