"""The best shares for a set of models on a number of devices, found by trying all, and kept. Pure.

A unit holds few models, since the smallest profiled share times their number is at most the limit on the sum of decode
shares (four models at 30 % each with 20 % over-subscription). So the optimum of a unit is exact, and a search is about
which models go where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muxmesh.placement.corrected_estimator import Candidate, CorrectedEstimator
from muxmesh.placement.plan import Cluster, ModelLoad, PlacedModel, PlacedUnit
from muxmesh.placement.profile import Profile
from muxmesh.placement.reference_estimator import ReferenceEstimator

_ATTAINMENT_WEIGHT = 0.01
"""Of the SLO attainment beside the throughput: it decides between plans that meet the same rates."""
_LARGEST_SHARED_DECODE = 90
"""MuxServe's candidates are shares of 30 to 90 percent (Alg. 2)."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is maximized: a weighted sum of two estimates of the rate-weighted throughput."""

    reference: float = 0.0
    corrected: float = 1.0


@dataclass(frozen=True, slots=True)
class UnitChoice:
    """A unit with the shares that are best for it. ``value`` is its part of the objective."""

    value: float
    unit: PlacedUnit


class UnitChoices:
    """The best units over one workload and cluster, by the indices of their models."""

    def __init__(
        self,
        loads: Sequence[ModelLoad],
        profile: Profile,
        cluster: Cluster,
        objective: Objective,
        reference: ReferenceEstimator,
        corrected: CorrectedEstimator,
    ) -> None:
        self.loads = loads
        self.cluster = cluster
        self._objective = objective
        self._profile = profile
        self._reference = reference
        self._corrected = corrected
        self._total_rate = sum(load.rate for load in loads)
        self._chosen: dict[tuple[int, frozenset[int]], UnitChoice | None] = {}
        self._prefill_shares = {kind: prefill_share(profile, kind) for kind in {load.kind for load in loads}}

        smallest = max(min(table.shares) for load in loads for table in profile.models[load.kind].tables.values())
        self.models_per_unit = max(1, cluster.max_share // smallest)
        """Limit that follows from the smallest profiled share."""

    def weights_bytes(self, model: int) -> int:
        return self._profile.models[self.loads[model].kind].weights_bytes

    @property
    def num_tried(self) -> int:
        """Sets of models whose best shares were computed."""
        return len(self._chosen)

    def best(self, num_devices: int, models: frozenset[int]) -> UnitChoice | None:
        """The best unit of these models on ``num_devices``. None if they do not fit."""
        key = (num_devices, models)
        if key not in self._chosen:
            self._chosen[key] = self._best(num_devices, sorted(models), is_thorough=False)
        return self._chosen[key]

    def polished(self, unit: PlacedUnit) -> PlacedUnit:
        """``unit`` with the best of all shares, those too that leave a part of the device unused."""
        index = {load.name: one for one, load in enumerate(self.loads)}
        models = sorted(index[model.load.name] for model in unit.models)
        chosen = self._best(unit.num_devices, models, is_thorough=True)
        return chosen.unit if chosen else unit

    def _best(self, num_devices: int, models: Sequence[int], *, is_thorough: bool) -> UnitChoice | None:
        loads = [self.loads[one] for one in models]
        kinds = [load.kind for load in loads]
        tables = [self._profile.models[kind].tables.get(num_devices) for kind in kinds]
        if any(table is None for table in tables) or self._corrected.kv_bytes(num_devices, kinds) <= 0:
            return None
        shares = sorted(set.intersection(*(set(table.shares) for table in tables if table is not None)))
        best: UnitChoice | None = None
        for chosen in decode_shares(shares, len(models), self.cluster.max_share, is_thorough=is_thorough):
            choice = self._valued(num_devices, loads, chosen)
            if choice is not None and (best is None or choice.value > best.value):
                best = choice
        return best

    def _valued(self, num_devices: int, loads: Sequence[ModelLoad], shares: Sequence[int]) -> UnitChoice | None:
        candidates = [
            Candidate(load, self._prefill_shares[load.kind], share) for load, share in zip(loads, shares, strict=True)
        ]
        estimate = self._corrected.estimate_unit(num_devices, candidates)
        if estimate is None:
            return None
        corrected = sum(
            load.rate * (one.throughput + _ATTAINMENT_WEIGHT * load.rate * one.attainment)
            for load, one in zip(loads, estimate.models, strict=True)
        )
        value = self._objective.corrected * corrected
        if self._objective.reference:
            found = self._reference.throughputs_of(num_devices, [(one.load, one.decode_share) for one in candidates])
            value += self._objective.reference * sum(
                load.rate * throughput for load, throughput in zip(loads, found, strict=True)
            )
        placed = tuple(
            PlacedModel(one.load, one.prefill_share, one.decode_share, cap)
            for one, cap in zip(candidates, estimate.max_num_seqs, strict=True)
        )
        return UnitChoice(value / self._total_rate, PlacedUnit(num_devices, placed))


def decode_shares(
    shares: Sequence[int], num_models: int, limit: int, *, is_thorough: bool
) -> Iterator[tuple[int, ...]]:
    """All decode shares of ``num_models`` models whose sum is at most ``limit`` percent.

    Unless ``is_thorough`` only those of which none can be larger: with smoothed times the others are seldom better. A
    model that shares its device gets at most 90 percent where that was profiled.
    """
    if num_models > 1:
        shares = [one for one in shares if one <= _LARGEST_SHARED_DECODE] or shares

    def extended(chosen: tuple[int, ...], left: int) -> Iterator[tuple[int, ...]]:
        if len(chosen) == num_models:
            if is_thorough or all(_larger(shares, one) > one + left for one in chosen):
                yield chosen
            return
        others = (num_models - len(chosen) - 1) * shares[0]
        for share in shares:
            if share + others <= left:
                yield from extended((*chosen, share), left - share)

    yield from extended((), limit)


def _larger(shares: Sequence[int], share: int) -> float:
    """The next profiled share above ``share``; infinite above the largest."""
    return next((one for one in shares if one > share), float("inf"))


def prefill_share(profile: Profile, kind: str) -> int:
    """The smallest profiled share at which prefills of ``kind`` are at most 10 % slower than on the whole device.

    For the models of MuxServe's profile it is the share of the published plans: 80, 90 or 100 by size.
    """
    model = profile.models[kind]
    if model.prototype is not None:
        return model.prototype.prefill_share
    table = model.smoothed[min(model.tables)]
    full = table.prefill[-1]
    fits = [share for index, share in enumerate(table.shares) if (table.prefill[index] <= 1.1 * full).all()]
    return fits[0] if fits else table.shares[-1]
