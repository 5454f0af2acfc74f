"""The random moves of the local search: from a set of units to a neighbouring one. Pure.

A unit is a number of devices and the indices of the models on it. Knows neither values nor memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from muxmesh.placement.plan import Cluster

Unit = tuple[int, frozenset[int]]
"""The number of devices, and the indices of the models."""
Units = Sequence[Unit]
Change = tuple[set[int], list[Unit]]
"""Indices of units that go, and the units that take their place."""


def neighbour(cluster: Cluster, models_per_unit: int, units: Units, random: Random) -> Change | None:
    """A random move. None if the sampled one is not possible; whether it fits the cluster is not checked."""
    first, second = random.randrange(len(units)), random.randrange(len(units))
    change = random.choice(_MOVES)(cluster, units, first, second, random)
    if change is None:
        return None
    largest = cluster.unit_sizes[-1]
    if any(len(models) > models_per_unit or not 1 <= size <= largest for size, models in change[1]):
        return None
    return change


def _moved(cluster: Cluster, units: Units, first: int, second: int, random: Random) -> Change | None:
    """A model moves from the first unit to the second; a unit that becomes empty frees its devices."""
    if first == second:
        return None
    (size, models), (other_size, others) = units[first], units[second]
    model = random.choice(sorted(models))
    left = models - {model}
    added = [(other_size, others | {model})]
    return {first, second}, added + ([(size, left)] if left else [])


def _swapped(cluster: Cluster, units: Units, first: int, second: int, random: Random) -> Change | None:
    """Two models trade places."""
    if first == second:
        return None
    (size, models), (other_size, others) = units[first], units[second]
    one, two = random.choice(sorted(models)), random.choice(sorted(others))
    return {first, second}, [(size, models - {one} | {two}), (other_size, others - {two} | {one})]


def _resized(cluster: Cluster, units: Units, first: int, second: int, random: Random) -> Change:
    """The first unit is doubled or halved."""
    size, models = units[first]
    return {first}, [(size * 2 if random.random() < 0.7 else size // 2, models)]


def _traded(cluster: Cluster, units: Units, first: int, second: int, random: Random) -> Change | None:
    """The first unit is doubled and the second halved, or both swap their sizes."""
    if first == second:
        return None
    (size, models), (other_size, others) = units[first], units[second]
    if random.random() < 0.5:
        return {first, second}, [(other_size, models), (size, others)]
    return {first, second}, [(size * 2, models), (other_size // 2, others)]


def _split(cluster: Cluster, units: Units, first: int, second: int, random: Random) -> Change | None:
    """The first unit becomes two halves, with its models divided at random."""
    size, models = units[first]
    if size < 2 or len(models) < 2:
        return None
    ordered = sorted(models)
    random.shuffle(ordered)
    at = random.randrange(1, len(ordered))
    return {first}, [(size // 2, frozenset(ordered[:at])), (size // 2, frozenset(ordered[at:]))]


def _merged(cluster: Cluster, units: Units, first: int, second: int, random: Random) -> Change | None:
    """Two units of one size become one of twice the size, or of the same size."""
    if first == second or units[first][0] != units[second][0]:
        return None
    size = units[first][0] * random.choice((1, 2))
    return {first, second}, [(size, units[first][1] | units[second][1])]


def _alone(cluster: Cluster, units: Units, first: int, second: int, random: Random) -> Change | None:
    """A model of the first unit gets a unit of its own, on free devices or on half of those of the second unit."""
    size, models = units[first]
    if len(models) < 2:
        return None
    model = random.choice(sorted(models))
    new_size = random.choice(cluster.unit_sizes)
    free = cluster.num_devices - sum(one for one, _ in units)
    if new_size <= free:
        return {first}, [(size, models - {model}), (new_size, frozenset({model}))]
    if first == second or units[second][0] < 2:
        return None
    half = units[second][0] // 2
    return {first, second}, [(size, models - {model}), (half, units[second][1]), (half, frozenset({model}))]


_MOVES = (_moved, _moved, _swapped, _swapped, _resized, _traded, _split, _merged, _alone)
