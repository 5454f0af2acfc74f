"""How much workers that compute side by side slow each other down, as one factor. Pure.

Beside others whose shares sum to o (1 is the whole device) a step takes ``1 + contention * o`` times as long as alone
on the same share. The factor is fitted to measured slowdowns; the simulator and the placement search apply it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muxmesh.placement.measured_cells import MAX_CONTENTION, Cell, Slowdown
from muxmesh.profiler.grid import Grid, ModelLimits
from muxmesh.types import Role

_BATCH = 4
_LENGTHS = {Role.PREFILL: 128, Role.DECODE: 1024}
"""Workers side by side compute the largest batch and length of the grid that are at most these."""


@dataclass(frozen=True, slots=True)
class Contention:
    """The fitted factor, and the root of the mean squared error of a slowdown by it."""

    factor: float
    error: float


def fit_contention(slowdowns: Sequence[Slowdown]) -> Contention | None:
    """Least squares of ``ratio - 1 = factor * others`` over the slowdowns, from 0 to `MAX_CONTENTION`. None without."""
    if not slowdowns:
        return None
    products = sum(one.others * (one.ratio - 1) for one in slowdowns)
    factor = min(max(0.0, products / sum(one.others**2 for one in slowdowns)), MAX_CONTENTION)
    squares = sum((one.ratio - 1 - factor * one.others) ** 2 for one in slowdowns)
    return Contention(factor, math.sqrt(squares / len(slowdowns)))


def groups_of(grid: Grid, models: Sequence[ModelLimits]) -> list[tuple[Cell, ...]]:
    """Which workers to measure side by side: groups of two and of three, in every combination of roles.

    Their shares sum to at most the whole device, as the arbiter grants them: the largest share that all can have, and
    of two workers the most uneven shares. Neighbours are of different models as far as there are any. Empty if no two
    shares of the grid fit.
    """
    sizes = [(2, 2), (2, 1), (3, 3)]
    found: list[tuple[Cell, ...]] = []
    for num_workers, num_equal in sizes:
        if (shares := _shares(grid.shares, num_workers, num_equal)) is None:
            continue
        for num_prefills in range(num_workers):
            roles = [Role.PREFILL] * num_prefills + [Role.DECODE] * (num_workers - num_prefills)
            group = [
                _cell(grid, models[index % len(models)], role, share)
                for index, (role, share) in enumerate(zip(roles, shares, strict=True))
            ]
            found.append(tuple(group))
    return found


def _shares(axis: Sequence[int], num_workers: int, num_equal: int) -> tuple[int, ...] | None:
    """``num_workers`` shares of the axis that fit the device, ``num_equal`` of them alike; None if none fit."""
    if num_equal == num_workers:
        equal = [share for share in axis if share * num_workers <= 100]
        return (max(equal),) * num_workers if equal else None
    pairs = [(large, small) for small in axis for large in axis if small < large and small + large <= 100]
    return max(pairs, key=lambda pair: (sum(pair), pair[0])) if pairs else None


def _cell(grid: Grid, limits: ModelLimits, role: Role, share: int) -> Cell:
    batch = max(size for size in grid.batches if size <= max(min(_BATCH, limits.max_num_seqs), grid.batches[0]))
    length = max(tokens for tokens in grid.lengths if tokens <= max(_LENGTHS[role], grid.lengths[0]))
    return Cell(limits.name, role, share, 1 if role == Role.PREFILL else batch, length)
