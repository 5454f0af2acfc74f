"""Step times of a model from its table in a profile, for the simulator. Pure.

A table has whole prefills, which a worker computes in steps of its token budget, each longer than the one before. So
the cost of a step is fitted to the prefills of a share: the same linear cost that workers fit to their own steps. The
decode steps of one number of sequences are fitted too, to a line over their context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.config.section import Location
from muxmesh.engine.token_budget import divide_token_budget
from muxmesh.placement.profile import ModelProfile, Profile
from muxmesh.placement.step_table import StepTable, between
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import StepCost, StepShape, context_of, least_squares_cost
from muxmesh.types import Role, SchedulingState
from simulator.step_times import StepTimes


class MeasuredStepTimes:
    """`StepTimes` of a table with a prefill and a decode in it."""

    def __init__(self, table: StepTable, token_budget: int | None, part: float = 1.0) -> None:
        """``token_budget``: with which the prefills were measured; None: each was one step.

        ``part``: of the profiled device that the unit has, in (0, 1].
        """
        self._part = part
        self._smoothed = table.smoothed()
        self._shares = table.shares
        self._prefill_costs = [prefill_cost(table, index, token_budget) for index in range(len(table.shares))]

    @staticmethod
    def of(model: ModelProfile, degree: int, part: float = 1.0) -> MeasuredStepTimes:
        """The times of ``model`` on ``degree`` devices; without settings, as of MuxServe, each prefill was one step."""
        budget = None if model.settings is None else model.settings.step_token_budget
        return MeasuredStepTimes(model.tables[degree], budget, part)

    def prefill_s(self, shape: StepShape, share: float) -> float:
        percent = share * self._part * 100
        low, weight = between(self._shares, percent, extends=False)
        seconds = self._prefill_costs[low].step_s(shape.num_tokens, shape.num_context)
        if weight:
            seconds += weight * (self._prefill_costs[low + 1].step_s(shape.num_tokens, shape.num_context) - seconds)
        return seconds * max(1.0, self._shares[0] / percent)

    def decode_cost(self, num_seqs: int, share: float) -> tuple[float, float]:
        table, percent = self._smoothed, share * self._part * 100
        times = [(one, table.interpolated(Role.DECODE, percent, num_seqs, one)) for one in table.lengths]
        cost = least_squares_cost([(1, 0, num_seqs * length, seconds) for length, seconds in times])
        return cost.base_s, cost.per_context_s


def prefill_cost(table: StepTable, share_index: int, token_budget: int | None) -> StepCost:
    """The cost of a prefill step on one share of a table, fitted to its prefills.

    A share without prefills has the cost of the nearest smaller one, or else of the nearest larger one.
    """
    grid = table.prefill
    has_values = [bool(np.any(~np.isnan(of_share))) for of_share in grid]
    order = [*range(share_index, -1, -1), *range(share_index + 1, len(grid))]
    of_share = grid[next(index for index in order if has_values[index])]
    return least_squares_cost(
        [
            (len(prefill_steps(batch, length, token_budget)), batch * length, batch * context_of(0, length), seconds)
            for batch, line in zip(table.batches, of_share.tolist(), strict=True)
            for length, seconds in zip(table.lengths, line, strict=True)
            if not math.isnan(seconds)
        ]
    )


@dataclass(slots=True)
class _Prompt:
    num_uncomputed_tokens: int
    scheduling: SchedulingState
    num_computed_tokens: int = 0


@lru_cache(maxsize=1024)
def prefill_steps(batch: int, length: int, token_budget: int | None) -> tuple[StepShape, ...]:
    """The steps in which the engine's scheduler computes ``batch`` prompts of ``length`` tokens; one without it."""
    prompts = [_Prompt(length, SchedulingState(0, float(index))) for index in range(batch)]
    steps = []
    while prompts:
        planned = divide_token_budget(prompts, FCFS, 0.0, batch, token_budget or batch * length)
        context = sum(context_of(prompt.num_computed_tokens, count) for prompt, count in planned)
        steps.append(StepShape(sum(count for _, count in planned), context, len(planned)))
        for prompt, count in planned:
            prompt.num_computed_tokens += count
            prompt.num_uncomputed_tokens -= count
        prompts = [prompt for prompt in prompts if prompt.num_uncomputed_tokens]
    return tuple(steps)


def measured_times(config: MeshConfig, profile: Profile) -> Mapping[tuple[str, str], StepTimes]:
    """(unit, model) → step times of the models of ``config`` that ``profile`` has; see `profile_problems`."""
    found: dict[tuple[str, str], StepTimes] = {}
    for unit, model in config.placements():
        if model.engine != "sim":
            measured = profile.models[_name(model)]
            part = _part_of(unit, profile)
            found[unit.name, model.name] = MeasuredStepTimes.of(measured, unit.tensor_parallel, part)
    return found


def _part_of(unit: UnitConfig, profile: Profile) -> float:
    """The part of the profiled device that a unit has: on a CPU some of its cores, else all."""
    if unit.is_cuda or unit.cores is None or not profile.machine.cores:
        return 1.0
    return min(1.0, len(unit.cores) / profile.machine.cores)


def profile_problems(config: MeshConfig, profile: Profile) -> Iterator[tuple[Location, str]]:
    """Yields what of ``config`` cannot be simulated with ``profile``. Models of the sim engine have their own times."""
    for unit_index, unit in enumerate(config.units):
        kind = "cuda" if unit.is_cuda else "cpu"
        for model_index, model in enumerate(unit.models):
            if model.engine == "sim":
                continue
            location: Location = ("units", unit_index, "models", model_index)
            if kind != profile.machine.device:
                yield ("units", unit_index, "device"), f"is {unit.device}; the profile is of a {profile.machine.device}"
                break
            yield from (
                ((*location, field), problem) for field, problem in _problems(model, unit.tensor_parallel, profile)
            )


def _problems(model: ModelConfig, degree: int, profile: Profile) -> Iterator[tuple[str, str]]:
    measured = profile.models.get(_name(model))
    if measured is None:
        yield "source", f"{_name(model)} is not in the profile, which has {', '.join(sorted(profile.models))}"
        return
    if degree not in measured.tables:
        yield "source", f"{_name(model)} has no step times with tensor_parallel {degree} in the profile"
    elif problem := _table_problem(measured.tables[degree]):
        yield "source", f"{_name(model)}: {problem}; let `muxmesh profile` continue"
    if measured.settings is not None and measured.settings.dtype != model.dtype:
        yield "dtype", f"is {model.dtype}; the profile has the times of {measured.settings.dtype}"


def _table_problem(table: StepTable) -> str | None:
    for role in Role:
        if np.all(np.isnan(table.grid(role))):
            return f"the profile has no {role} times"
    try:
        table.smoothed()
    except ValueError as error:
        return f"the profile has too few step times: {error}"
    return None


def _name(model: ModelConfig) -> str:
    return model.source or model.name
