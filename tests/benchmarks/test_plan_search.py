"""Searches with several objectives and seeds."""

from __future__ import annotations

from benchmarks.muxserve import scale_cases
from benchmarks.muxserve.constants import read_constants
from benchmarks.plan_search import OBJECTIVES, searched_plans
from muxmesh.placement.unit_choices import Objective, UnitChoices
from tests.benchmarks.muxserve.miniature import profile

WORKLOAD = scale_cases.Workload("w", scale_cases.synthetic(1.0, 1.0, 1.0).loads[:2], 1.0, {})


def test_every_objective_is_searched_and_no_plan_is_found_twice() -> None:
    asked: list[Objective] = []

    def choices_of(objective: Objective) -> UnitChoices:
        asked.append(objective)
        return scale_cases.unit_choices(WORKLOAD, profile(), read_constants(), objective)

    plans = searched_plans(choices_of, num_seeds=2, max_moves=5)
    assert asked == list(OBJECTIVES)
    assert len(plans) == len(set(plans))
    assert all(sum(len(unit.models) for unit in plan.units) == 2 for plan in plans)
