"""The study at the size of the paper: systems, and who replays what."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.muxserve.scale import Size, Study
from benchmarks.muxserve.scale_cases import Workload
from muxmesh.placement.plan import ModelLoad
from tests.benchmarks.muxserve.miniature import profile, replayer

SIZE = Size(duration_s=4.0, traced_s=4.0, num_seeds=1, max_moves=10)
WORKLOAD = Workload(
    "two models",
    (ModelLoad("hot", "llama-7b", 20.0, 100.0, 50.0), ModelLoad("cold", "llama-7b", 0.5, 100.0, 50.0)),
    SIZE.duration_s,
    {"hot": 1, "cold": 1},
)
STUDY = Study(profile(), replayer(), SIZE)


def test_plans_are_judged_by_other_arrivals() -> None:
    assert STUDY.judge.seed != STUDY.replayer.seed


def test_every_system_serves_every_model() -> None:
    systems = STUDY.systems(WORKLOAD)
    assert {"muxmesh", "muxmesh, plan for SLO 2", "spatial", "temporal"} <= set(systems)
    for units in systems.values():
        assert sorted(one.name for unit in units for one in unit.models) == ["cold", "hot"]
        assert {one.duration_s for unit in units for one in unit.models} == {SIZE.duration_s}


def test_a_unit_of_several_systems_has_one_outcome() -> None:
    units = STUDY.systems(WORKLOAD)["spatial"]
    outcomes = STUDY.outcomes({"a": units, "b": list(reversed(units))})
    assert outcomes["a"].throughput == pytest.approx(outcomes["b"].throughput)
    assert np.isclose(list(outcomes["a"].attainment.values()), list(outcomes["b"].attainment.values())).all()


def test_the_orders_differ_in_the_arbiter_only() -> None:
    orders = STUDY.orders()
    assert [unit.mode for (unit,) in orders.values()] == ["adbs", "temporal", "roundrobin", "fcfs"]
    assert {tuple(one.num_requests for one in unit.models) for (unit,) in orders.values()} == {(4, 32)}
