"""Why each model of a plan is where it is: the next best place for it, and what that would cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from muxmesh.placement.plan import Plan, place_text
from muxmesh.placement.search import cost_of
from muxmesh.placement.unit_choices import UnitChoices
from muxmesh.placement.unit_moves import Unit


@dataclass(frozen=True, slots=True)
class Reason:
    """The place of one model, its runner-up, and the difference."""

    model: str
    place: str
    runner_up: str
    cost: float
    """Of the runner-up: the loss of the plan's value, in requests per second (rate-weighted mean)."""


def reasons(plan: Plan, choices: UnitChoices) -> list[Reason]:
    """One reason for each model, in the order of ``plan``."""
    index = {load.name: one for one, load in enumerate(choices.loads)}
    units = [(unit.num_devices, frozenset(index[one.load.name] for one in unit.models)) for unit in plan.units]
    return [
        _reason(choices, units, number, model) for number, (_, models) in enumerate(units) for model in sorted(models)
    ]


def _reason(choices: UnitChoices, units: list[Unit], number: int, model: int) -> Reason:
    name = choices.loads[model].name
    here = _place(choices, units[number], model)
    found = []
    for place, changed in _alternatives(choices, units, number, model):
        cost = cost_of(choices, units, changed, [unit for instead in changed.values() for unit in instead])
        if cost is not None:
            found.append((cost, place))
    if not found:
        return Reason(name, here, "nowhere else: it fits no other unit", float("inf"))
    cost, place = min(found)
    return Reason(name, here, place, cost)


def _alternatives(
    choices: UnitChoices, units: list[Unit], number: int, model: int
) -> Iterator[tuple[str, dict[int, list[Unit]]]]:
    """(description, index of a unit → what takes its place) of the other places of a model."""
    size, models = units[number]
    is_shared = len(models) > 1
    left = [(size, models - {model})] if is_shared else []
    for other, (other_size, others) in enumerate(units):
        if other != number and len(others) < choices.models_per_unit:
            grown = (other_size, others | {model})
            yield _place(choices, grown, model), {number: left, other: [grown]}
    for alone in choices.cluster.unit_sizes if is_shared else ():
        unit = (alone, frozenset({model}))
        yield _place(choices, unit, model), {number: [*left, unit]}


def _place(choices: UnitChoices, unit: Unit, model: int) -> str:
    size, models = unit
    return place_text(size, (choices.loads[one].name for one in sorted(models) if one != model))
