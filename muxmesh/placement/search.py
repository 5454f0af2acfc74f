"""The search for a plan: MuxServe's greedy enumeration (Alg. 1 and 2), then local search on it. Pure.

A state is a set of units, each a number of devices and the models on it; `unit_choices` has the best shares of each.
The local search anneals over moves of one model, swaps of two, and changes of units: doubled, halved, split, merged,
and devices moved from one to another. It keeps the best state, so it is never worse than what it started from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from random import Random

from muxmesh.errors import ConfigError
from muxmesh.placement.plan import Cluster, Plan
from muxmesh.placement.unit_choices import UnitChoice, UnitChoices
from muxmesh.placement.unit_moves import Unit, Units, neighbour
from muxmesh.quoting import named

_MAX_GROUPS = 400
"""Groups of meshes that the greedy enumeration tries; more are sampled."""
_GREEDY_MODELS = 64
"""Above so many models the search starts from `_constructed`."""
_HOTTEST = 0.02
"""First temperature, as a part of the start's value."""
_COLDEST = 1e-5
_NUM_BEST = 8

Group = tuple[int, ...]
"""Numbers of devices of the units, descending."""
State = tuple[Unit, ...]
"""All units of a plan."""


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search."""

    plans: tuple[Plan, ...]
    """The best ones, best first."""
    values: tuple[float, ...]
    """Of the plans, by the objective."""
    greedy_value: float
    """Of the start: that of Alg. 1, or of the constructed plan."""
    num_units_tried: int
    num_moves: int


def search(
    choices: UnitChoices, seed: int = 0, max_moves: int = 20_000, is_late: Callable[[], bool] = lambda: False
) -> Found:
    """Searches until ``max_moves`` moves were tried or ``is_late``. Raises ConfigError if no plan holds all models."""
    random = Random(seed)
    _refuse_unplaceable(choices)
    best: dict[State, float] = {}

    def keep(state: State, value: float) -> None:
        best[state] = value
        if len(best) > 2 * _NUM_BEST:
            del best[min(best, key=best.__getitem__)]

    starts = _starts(choices, random, is_late)
    if not starts:
        raise ConfigError(
            f"cluster: {choices.cluster.num_devices} devices do not hold all {len(choices.loads)} models, with at most "
            f"{choices.models_per_unit} in a unit; give it more devices or memory, or take models out of the workload"
        )
    greedy_value = starts[0][0]
    num_moves = 0
    rounds = min(len(starts), 3)
    for value, state in starts[:rounds]:
        keep(state, value)
        num_moves += _anneal(choices, state, value, random, max_moves // rounds, keep, is_late)
    ranked = sorted(best, key=best.__getitem__, reverse=True)[:_NUM_BEST]
    plans = tuple(Plan(tuple(map(choices.polished, _plan(choices, state).units))) for state in ranked)
    return Found(plans, tuple(best[one] for one in ranked), greedy_value, choices.num_tried, num_moves)


def _refuse_unplaceable(choices: UnitChoices) -> None:
    """Raises ConfigError, which names the first model that fits no unit of the cluster even alone."""
    for index, load in enumerate(choices.loads):
        if not any(choices.best(size, frozenset({index})) for size in choices.cluster.unit_sizes):
            raise ConfigError(
                f"models: {named(load.name)}: {load.kind} fits no unit of {choices.cluster.unit_sizes[-1]} or fewer "
                f"devices with {choices.cluster.memory_bytes / 2**30:.1f} GiB each, or was not profiled for any"
            )


def _greedy(choices: UnitChoices, group: Group) -> tuple[float, State] | None:
    """Alg. 1 for one group: models by rate times size, each to the unit whose value grows most. None: one fits none."""
    units: list[Unit] = [(size, frozenset()) for size in group]
    values = [0.0] * len(units)
    for model in _by_demand(choices):
        gains: dict[Unit, tuple[float, int]] = {}
        for index, (size, models) in enumerate(units):
            if (size, models) in gains:
                continue
            choice = choices.best(size, models | {model}) if len(models) < choices.models_per_unit else None
            if choice is not None:
                gains[size, models] = (choice.value - values[index], index)
        if not gains:
            return None
        gain, index = max(gains.values())
        size, models = units[index]
        units[index] = (size, models | {model})
        values[index] += gain
    return sum(values), tuple(unit for unit in units if unit[1])


def groups(cluster: Cluster) -> Iterator[Group]:
    """All sets of unit sizes that use every device: those of a node, combined over the nodes."""
    of_node = list(_splits(cluster.devices_per_node, cluster.unit_sizes[-1]))
    seen = set()
    for nodes in combinations_with_replacement(of_node, cluster.num_nodes):
        group = tuple(sorted((size for node in nodes for size in node), reverse=True))
        if group not in seen:
            seen.add(group)
            yield group


def _splits(devices: int, largest: int) -> Iterator[Group]:
    if devices == 0:
        yield ()
        return
    size = largest
    while size >= 1:
        if size <= devices:
            for rest in _splits(devices - size, size):
                yield (size, *rest)
        size //= 2


def _starts(choices: UnitChoices, random: Random, is_late: Callable[[], bool]) -> list[tuple[float, State]]:
    """States to start from, best first: the constructed one, and for small workloads those of the greedy search."""
    found = [_constructed(choices, random)]
    if len(choices.loads) <= _GREEDY_MODELS and choices.cluster.num_nodes <= 8:
        enumerated = list(groups(choices.cluster))
        if len(enumerated) > _MAX_GROUPS:
            enumerated = random.sample(enumerated, _MAX_GROUPS)
        found += [
            _greedy(choices, group)
            for group in enumerated
            if len(group) * choices.models_per_unit >= len(choices.loads) and not is_late()
        ]
    return sorted((start for start in found if start is not None), key=lambda start: start[0], reverse=True)


def _constructed(choices: UnitChoices, random: Random) -> tuple[float, State] | None:
    """Every model alone on the fewest devices that hold it; merged while devices lack, doubled while some are free."""
    units: list[Unit] = []
    for model in range(len(choices.loads)):
        sizes = [size for size in choices.cluster.unit_sizes if choices.best(size, frozenset({model}))]
        units.append((sizes[0], frozenset({model})))
    while not fits(choices.cluster, [size for size, _ in units]):
        merged = _cheapest_merge(choices, units, random)
        if merged is None:
            return None
        first, second, unit = merged
        units = [one for index, one in enumerate(units) if index not in (first, second)] + [unit]
    while (doubled := _best_doubling(choices, units)) is not None:
        index, unit = doubled
        units[index] = unit
    return sum(_chosen(choices, unit).value for unit in units), tuple(units)


def _cheapest_merge(choices: UnitChoices, units: Units, random: Random) -> tuple[int, int, Unit] | None:
    """The two units whose merger on the larger one's devices costs the least value, among a sample of pairs."""
    pairs = [(first, second) for first in range(len(units)) for second in range(first)]
    best: tuple[float, int, int, Unit] | None = None
    for first, second in random.sample(pairs, min(len(pairs), 400)):
        size = max(units[first][0], units[second][0])
        models = units[first][1] | units[second][1]
        if len(models) > choices.models_per_unit:
            continue
        choice = choices.best(size, models)
        if choice is None:
            continue
        saved = units[first][0] + units[second][0] - size
        cost = (_chosen(choices, units[first]).value + _chosen(choices, units[second]).value - choice.value) / saved
        if best is None or cost < best[0]:
            best = (cost, first, second, (size, models))
    return None if best is None else best[1:]


def _best_doubling(choices: UnitChoices, units: Units) -> tuple[int, Unit] | None:
    """The unit that gains most for each device if it has twice as many, within the cluster."""
    sizes = [size for size, _ in units]
    free = choices.cluster.num_devices - sum(sizes)
    best: tuple[float, int] | None = None
    for index, (size, models) in enumerate(units):
        if size > free or 2 * size > choices.cluster.unit_sizes[-1]:
            continue
        choice = choices.best(2 * size, models)
        gain = 0.0 if choice is None else (choice.value - _chosen(choices, units[index]).value) / size
        if gain > 1e-9 and (best is None or gain > best[0]):
            best = (gain, index)
    if best is None:
        return None
    size, models = units[best[1]]
    sizes[best[1]] = 2 * size
    return (best[1], (2 * size, models)) if fits(choices.cluster, sizes) else None


def fits(cluster: Cluster, sizes: Sequence[int]) -> bool:
    """Whether units of these sizes, powers of two, fit the nodes."""
    if sum(sizes) > cluster.num_devices:
        return False
    if cluster.devices_per_node == cluster.unit_sizes[-1]:
        return True
    return cluster.first_fit(sorted(sizes, reverse=True)) is not None


def _anneal(
    choices: UnitChoices,
    state: State,
    value: float,
    random: Random,
    max_moves: int,
    keep: Callable[[State, float], None],
    is_late: Callable[[], bool],
) -> int:
    """Anneals from ``state``, and gives every new best state to ``keep``. Returns the number of moves."""
    units = list(state)
    best = value
    start = max(value, 1e-9)
    for move in range(max_moves):
        if move % 64 == 0 and is_late():
            return move
        changed = neighbour(choices.cluster, choices.models_per_unit, units, random)
        if changed is None:
            continue
        gone, added = changed
        cost = cost_of(choices, units, gone, added)
        if cost is None:
            continue
        temperature = start * _HOTTEST * (_COLDEST / _HOTTEST) ** (move / max_moves)
        if cost > 0 and random.random() >= math.exp(-cost / temperature):
            continue
        units = [*(one for index, one in enumerate(units) if index not in gone), *added]
        value -= cost
        if value > best + 1e-12:
            best = value
            keep(tuple(units), value)
    return max_moves


def cost_of(choices: UnitChoices, units: Units, gone: Collection[int], added: Units) -> float | None:
    """What the value falls by if ``added`` take the place of the units with the indices ``gone``.

    None if they do not fit the cluster, or a unit does not fit its memory.
    """
    kept = [size for index, (size, _) in enumerate(units) if index not in gone]
    if not fits(choices.cluster, [*kept, *(size for size, _ in added)]):
        return None
    found = [choices.best(*one) for one in added]
    if any(one is None for one in found):
        return None
    return sum(_chosen(choices, units[index]).value for index in gone) - sum(one.value for one in found if one)


def _by_demand(choices: UnitChoices) -> list[int]:
    """Models by rate times size, descending."""
    return sorted(
        range(len(choices.loads)), key=lambda one: choices.loads[one].rate * choices.weights_bytes(one), reverse=True
    )


def _chosen(choices: UnitChoices, unit: Unit) -> UnitChoice:
    """The best shares of a unit of a state, which fits its memory."""
    choice = choices.best(*unit)
    assert choice is not None, unit
    return choice


def _plan(choices: UnitChoices, state: State) -> Plan:
    units = [_chosen(choices, unit).unit for unit in state]
    return Plan(tuple(sorted(units, key=lambda unit: (-unit.num_devices, unit.models[0].load.name))))
