"""Plans from a pool of units: which are found, what they gain, and which is preferred."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from benchmarks.plan_pool import Gains, PlanPool, UnitFigures, preference
from muxmesh.placement.plan import PlacedModel, PlacedUnit, Plan
from tests.support.placement import load

LOADS = [load("a", 3.0), load("b", 1.0)]


def unit(num_devices: int, *models: int) -> PlacedUnit:
    return PlacedUnit(num_devices, tuple(PlacedModel(LOADS[one], 100, 60, 8) for one in models))


BEFORE = Plan((unit(2, 0, 1),))
FIGURES = {
    unit(2, 0, 1): UnitFigures(10.0, 10.0, 10.0, 0.8),
    unit(1, 0): UnitFigures(8.0, 6.0, 9.0, 0.5),
    unit(1, 1): UnitFigures(4.0, 5.0, 3.0, 0.2),
    unit(2, 0): UnitFigures(99.0, 99.0, 99.0, 0.9),
}


def test_plans_have_all_models_on_the_devices_there_are() -> None:
    found = dict(PlanPool(LOADS, 2, FIGURES, BEFORE).plans())
    gains = found[Plan((unit(1, 0), unit(1, 1)))]
    assert astuple(gains) == pytest.approx((0.2, 0.1, 0.2, -0.1))
    assert set(found) <= {BEFORE, Plan((unit(1, 0), unit(1, 1)))}


def test_what_estimates_require_goes_before_what_the_simulation_gains() -> None:
    worse_on_an_estimator = Gains(0.2, -0.01, 0.9, 0.1)
    worse_in_simulation = Gains(0.1, 0.0, 0.5, -0.01)
    not_worse = Gains(0.1, 0.0, 0.02, 0.0)
    assert not_worse == max(
        [worse_on_an_estimator, worse_in_simulation, not_worse], key=lambda one: preference(one, 0.1)
    )
    assert worse_in_simulation == max(
        [worse_on_an_estimator, worse_in_simulation], key=lambda one: preference(one, 0.1)
    )
