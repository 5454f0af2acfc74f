"""Plans that are made of a pool of units, compared with a given plan. Pure.

Units do not influence each other, so each is estimated and replayed once, and the figures of a plan are the sums of
those of its units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from benchmarks.unit_partition import best_partition
from muxmesh.placement.plan import ModelLoad, PlacedUnit, Plan

REFERENCE_WEIGHTS = tuple(0.1 * step for step in range(31))
CORRECTED_WEIGHT = 0.1
ATTAINMENT_WEIGHTS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Beside a weight of 1 for the simulated throughput."""


class UnitFigures(NamedTuple):
    """What one unit adds to the figures of a plan."""

    reference: float
    """Sum of rate * throughput on MuxServe's estimator."""
    corrected: float
    """The same on the corrected one."""
    throughput: float
    """The same in simulation."""
    attainment: float
    """Requests within the SLO in simulation, as a part of all requests of the workload."""


@dataclass(frozen=True, slots=True)
class Gains:
    """A plan compared with another: relative, and for attainment the difference."""

    reference: float
    corrected: float
    throughput: float
    attainment: float


class PlanPool:
    """``figures`` of units, among them those of ``before``, to which plans are compared."""

    def __init__(
        self, loads: Sequence[ModelLoad], num_devices: int, figures: Mapping[PlacedUnit, UnitFigures], before: Plan
    ) -> None:
        self._num_models = len(loads)
        self._num_devices = num_devices
        self._units = list(figures)
        index = {load.name: one for one, load in enumerate(loads)}
        self._sets = [
            (unit.num_devices, frozenset(index[one.load.name] for one in unit.models)) for unit in self._units
        ]
        self._figures = np.array([figures[unit] for unit in self._units])
        self._before = np.array([figures[unit] for unit in before.units]).sum(axis=0)

    def plans(self) -> list[tuple[Plan, Gains]]:
        """The plans that are best by some weighted sum of the figures."""
        relative = self._figures / np.array([*self._before[:3], 1.0])
        found: dict[tuple[int, ...], tuple[Plan, Gains]] = {}
        for of_reference, of_attainment in product(REFERENCE_WEIGHTS, ATTAINMENT_WEIGHTS):
            values = relative @ np.array([of_reference, CORRECTED_WEIGHT, 1.0, of_attainment])
            chosen = best_partition(self._sets, values.tolist(), self._num_models, self._num_devices)
            assert chosen is not None, "the units of the other plan are in the pool"
            found[tuple(sorted(chosen))] = self._compared(chosen)
        return list(found.values())

    def _compared(self, chosen: Sequence[int]) -> tuple[Plan, Gains]:
        total = self._figures[list(chosen)].sum(axis=0)
        reference, corrected, throughput, _ = (total / self._before - 1).tolist()
        units = sorted(
            (self._units[one] for one in chosen), key=lambda one: (-one.num_devices, one.models[0].load.name)
        )
        return Plan(tuple(units)), Gains(reference, corrected, throughput, float(total[3] - self._before[3]))


def preference(gains: Gains, reference_gain: float) -> tuple[bool, bool, float]:
    """For `max`: what both estimators require, then not worse in simulation, then the simulated gains."""
    is_allowed = gains.reference >= reference_gain and gains.corrected >= 0
    return is_allowed, min(gains.throughput, gains.attainment) >= 0, gains.throughput + gains.attainment
