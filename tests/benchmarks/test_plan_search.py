"""Searches with several objectives and seeds."""

from __future__ import annotations

from benchmarks.muxserve.constants import read_constants
from benchmarks.muxserve.estimators import Estimators, cluster_of
from benchmarks.muxserve.scale_cases import synthetic
from benchmarks.plan_search import OBJECTIVES, searched_plans
from muxmesh.placement.unit_choices import Objective, UnitChoices
from tests.benchmarks.muxserve.miniature import profile

LOADS = synthetic(1.0, 1.0, 1.0).loads[:2]


def test_every_objective_is_searched_and_no_plan_is_found_twice() -> None:
    asked: list[Objective] = []
    constants = read_constants()
    estimators = Estimators(profile(), constants, cluster_of(constants))

    def choices_of(objective: Objective) -> UnitChoices:
        asked.append(objective)
        return estimators.choices(LOADS, objective)

    plans = searched_plans(choices_of, num_seeds=2, max_moves=5)
    assert asked == list(OBJECTIVES)
    assert len(plans) == len(set(plans))
    assert all(sum(len(unit.models) for unit in plan.units) == 2 for plan in plans)
