"""Plans chosen by replays: of a pool of units, the best set for each goal, found exactly.

Units do not influence each other, so each is replayed alone, and the figures of a plan are the sums of those of its
units. Each stage keeps the units of the plans that its replays prefer; the last one replays the whole duration.
Variants are tried twice, since each changes the shares or the SLO of a unit alone. The judge's arrivals are not those
of the study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.muxserve.cases import ModelOutcome, UnitCase
from benchmarks.muxserve.replay import SLO_SCALES, Replayer
from benchmarks.muxserve.scale_cases import Workload, lasting, variants
from benchmarks.unit_partition import best_partition

SCALES = (2, 3, 4, 5, 6, 8, 10, 20)
"""SLO scales for each of which there is a plan, beside the one for all."""
FOR_ALL = 0
"""Stands for the scale of the plan for all scales."""
_FOR_ALL_SCALES = (2, 3, 4, 6, 8)
_MARGIN_WEIGHT = 0.1
"""Of the attainment at the next smaller scale: plans that reach 100 % in the replays differ by their margin."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan maximizes: the weighted sum of its throughput, as a part of the rates, and of its attainments."""

    throughput: float
    attainment: Mapping[int, float]
    """SLO scale → weight."""


def goal_at(scale: int) -> Goal:
    """Requests within one SLO scale; throughput decides between plans that are alike in it."""
    smaller = SLO_SCALES[SLO_SCALES.index(scale) - 1]
    return Goal(0.02, {scale: 1.0, smaller: _MARGIN_WEIGHT})


GOALS = {FOR_ALL: Goal(2.0, dict.fromkeys(_FOR_ALL_SCALES, 1 / len(_FOR_ALL_SCALES)))} | {
    scale: goal_at(scale) for scale in SCALES
}
"""SLO scale → the goal of the plan for it."""
_WIDER_GOALS = (*GOALS.values(), Goal(1.0, {}), *(Goal(1.0, {scale: 1.0}) for scale in _FOR_ALL_SCALES))
"""Units of plans for these are kept until the last stage."""
_STAGES: tuple[tuple[float, Callable[[UnitCase], list[UnitCase]]], ...] = (
    (0.2, lambda unit: [unit]),
    (0.33, variants),
    (0.33, variants),
    (1.0, lambda unit: [unit]),
)
"""Duration as a part of the workload's, and what each unit is replayed as."""


def chosen_plans(
    workload: Workload, pool: Sequence[UnitCase], num_devices: int, judge: Replayer
) -> dict[int, list[UnitCase]]:
    """SLO scale → the best units of ``pool`` and their variants. The pool must hold at least one plan."""
    units = list(pool)
    figures = np.zeros((0, 0))
    for part, tried in _STAGES:
        units = list(dict.fromkeys(lasting(one, part * workload.duration_s) for unit in units for one in tried(unit)))
        figures = np.array([figures_of(judge.replay(unit), workload) for unit in units])
        best = [best_units(units, figures, workload, num_devices, goal) for goal in _WIDER_GOALS]
        kept = sorted({one for chosen in best for one in chosen})
        units, figures = [units[one] for one in kept], figures[kept]
    return {
        scale: [units[one] for one in best_units(units, figures, workload, num_devices, goal)]
        for scale, goal in GOALS.items()
    }


def figures_of(models: Sequence[ModelOutcome], workload: Workload) -> list[float]:
    """What a unit adds to a plan: its part of the rate-weighted rates, and of the requests within each SLO scale."""
    rates = [load.rate for load in workload.loads]
    within = {scale: sum(one.rate * one.attainment(scale) for one in models) / sum(rates) for scale in SLO_SCALES}
    return [sum(one.rate * one.throughput for one in models) / sum(rate**2 for rate in rates), *within.values()]


def best_units(
    units: Sequence[UnitCase], figures: NDArray[np.float64], workload: Workload, num_devices: int, goal: Goal
) -> list[int]:
    """The indices of the units of the best plan for a goal."""
    index = {load.name: one for one, load in enumerate(workload.loads)}
    sets = [(unit.num_devices, frozenset(index[one.name] for one in unit.models)) for unit in units]
    values = figures @ np.array([goal.throughput, *(goal.attainment.get(scale, 0.0) for scale in SLO_SCALES)])
    chosen = best_partition(sets, values.tolist(), len(workload.loads), num_devices)
    assert chosen is not None, "the pool holds a plan"
    return chosen
