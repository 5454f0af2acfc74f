"""Why each model is where it is: the runner-up of its place, and what that would cost."""

from __future__ import annotations

import math

import pytest

from muxmesh.placement.corrected_estimator import CorrectedEstimator
from muxmesh.placement.explanation import reasons
from muxmesh.placement.plan import Cluster, Plan
from muxmesh.placement.reference_estimator import ReferenceEstimator
from muxmesh.placement.search import search
from muxmesh.placement.unit_choices import Objective, UnitChoices
from tests.support.placement import load, profile

PROFILE = profile(kinds=(("small", 0.1, 100), ("large", 0.3, 3000)))


def choices(cluster: Cluster, *names: str) -> UnitChoices:
    loads = [load(name, 20.0 / (1 + index), ("small", "large")[index % 2]) for index, name in enumerate(names)]
    corrected = CorrectedEstimator(PROFILE, cluster)
    return UnitChoices(loads, PROFILE, cluster, Objective(), ReferenceEstimator(PROFILE, 200, 100), corrected)


def test_a_model_that_fits_no_other_unit_has_no_runner_up() -> None:
    tried = choices(Cluster(1, 1, 100_000), "a")
    (reason,) = reasons(search(tried, max_moves=10).plans[0], tried)
    assert (reason.model, reason.runner_up) == ("a", "nowhere else: it fits no other unit")
    assert math.isinf(reason.cost)


def test_in_the_best_plan_no_runner_up_gains_anything() -> None:
    tried = choices(Cluster(2, 2, 100_000), "a", "b", "c", "d")
    plan = search(tried, max_moves=1500).plans[0]
    found = reasons(plan, tried)
    assert sorted(one.model for one in found) == ["a", "b", "c", "d"]
    assert [unit.num_devices for unit in plan.units for _ in unit.models] == [int(one.place[0]) for one in found]
    assert all(one.cost >= -1e-9 and one.runner_up != one.place for one in found)


def test_the_cost_of_a_runner_up_is_the_value_that_the_plan_would_lose() -> None:
    tried = choices(Cluster(1, 2, 100_000), "a", "b")
    a, b, both = (tried.best(1, frozenset(models)) for models in ({0}, {1}, {0, 1}))
    assert a and b and both
    for reason, other in zip(reasons(Plan((a.unit, b.unit)), tried), "ba", strict=True):
        assert (reason.place, reason.runner_up) == ("1 device alone", f"1 device with {other}")
        assert reason.cost == pytest.approx(a.value + b.value - both.value)
