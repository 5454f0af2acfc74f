"""The plans that searches with different objectives and seeds find: a pool of units to make plans of. Pure."""

from __future__ import annotations

from collections.abc import Callable

from muxmesh.placement.plan import Plan
from muxmesh.placement.search import search
from muxmesh.placement.unit_choices import Objective, UnitChoices

OBJECTIVES = tuple(
    Objective(*weights) for weights in ((1.0, 0.0), (1.0, 0.15), (1.0, 0.3), (1.0, 0.6), (1.0, 1.0), (0.3, 1.0))
)


def searched_plans(choices_of: Callable[[Objective], UnitChoices], num_seeds: int, max_moves: int) -> list[Plan]:
    """The different plans of searches with all objectives and seeds."""
    found: dict[Plan, None] = {}
    for objective in OBJECTIVES:
        choices = choices_of(objective)
        for seed in range(num_seeds):
            found |= dict.fromkeys(search(choices, seed, max_moves).plans)
    return list(found)
