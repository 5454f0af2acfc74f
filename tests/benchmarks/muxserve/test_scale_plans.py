"""Plans chosen by replays: which units make the best plan for a goal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.muxserve.cases import ModelOutcome, UnitCase
from benchmarks.muxserve.replay import SLO_SCALES
from benchmarks.muxserve.scale_cases import Workload
from benchmarks.muxserve.scale_plans import FOR_ALL, SCALES, Goal, best_units, chosen_plans, figures_of, goal_at
from muxmesh.placement.plan import ModelLoad
from tests.benchmarks.muxserve.miniature import model, replayer

WORKLOAD = Workload(
    "w",
    (ModelLoad("a", "llama-7b", 3.0, 100.0, 51.0), ModelLoad("b", "llama-7b", 1.0, 100.0, 51.0)),
    2.0,
    {"a": 1, "b": 1},
)
A, B = replace(model("a"), rate=3.0), model("b")
POOL = [UnitCase("both", 1, (A, B)), UnitCase("a", 1, (A,)), UnitCase("b", 1, (B,))]


def figures(**values: float) -> list[float]:
    """Of one unit; an attainment is `slo_8`."""
    return [values.get("throughput", 0.0), *(values.get(f"slo_{scale}", 0.0) for scale in SLO_SCALES)]


def test_a_plan_is_the_best_for_its_goal() -> None:
    of_units = np.array(
        [figures(throughput=1.0, slo_2=0.1), figures(throughput=0.6, slo_2=0.5), figures(throughput=0.3, slo_2=0.4)]
    )
    assert best_units(POOL, of_units, WORKLOAD, 2, Goal(1.0, {})) == [0]
    assert sorted(best_units(POOL, of_units, WORKLOAD, 2, goal_at(2))) == [1, 2]
    assert best_units(POOL, of_units, WORKLOAD, 1, goal_at(2)) == [0]


def test_plans_that_are_alike_at_a_scale_differ_by_their_margin() -> None:
    of_units = np.array([figures(slo_8=1.0, slo_6=0.8), figures(slo_8=0.5, slo_6=0.5), figures(slo_8=0.5, slo_6=0.5)])
    assert sorted(best_units(POOL, of_units, WORKLOAD, 2, goal_at(8))) == [1, 2]


def test_figures_are_parts_of_the_whole_workload() -> None:
    every: dict[float, int] = dict.fromkeys(SLO_SCALES, 6)
    throughput, *attainment = figures_of([ModelOutcome("a", 3.0, 6, 2.0, 1.0, 0.1, every)], WORKLOAD)
    assert throughput == pytest.approx(3 * 2 / (9 + 1))
    assert attainment == pytest.approx([0.75] * len(SLO_SCALES))


def test_chosen_plans_have_every_model_and_the_whole_duration() -> None:
    plans = chosen_plans(WORKLOAD, POOL, 2, replayer())
    assert list(plans) == [FOR_ALL, *SCALES]
    for units in plans.values():
        assert sorted(one.name for unit in units for one in unit.models) == ["a", "b"]
        assert {one.num_requests for unit in units for one in unit.models} == {6, 2}
