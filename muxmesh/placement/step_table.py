"""Measured step times of one model at one tensor-parallel degree, by role, share, batch and length. Pure.

A table is a grid: every share has the same batches and every batch the same lengths. A cell without a value was not
measured, or did not fit the device's memory. `next_larger` reads it as MuxServe's estimator does, `interpolated` as a
function of real numbers. Knows neither models nor files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from muxmesh.types import Role

NO_VALUE = -1.0
"""Stands for a cell without a value in files, and is what `StepTable.next_larger` returns for it."""

_SMOOTHING_ROUNDS = 100
_SMOOTHING_TOLERANCE = 1e-3
"""Of the logarithms. What is left after it is removed by a running maximum."""
_REWEIGHTINGS = 4
_OUTLIER = 0.03
"""Relative errors above this lose weight, so that a stall in one measurement does not move its neighbours."""
_FILLED_WEIGHT = 1e-3
"""Weight of an extrapolated cell beside a measured one."""

Grid = NDArray[np.float64]
"""Seconds by share, batch and length; NaN is a cell without a value."""


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """Step times in seconds over ``shares`` (percent), ``batches`` (sequences), ``lengths`` (tokens), each ascending.

    A prefill step computes ``batch`` prompts of ``length`` tokens. A decode step computes one token for each of
    ``batch`` sequences with ``length`` tokens of context.
    """

    shares: tuple[int, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    prefill: Grid
    decode: Grid

    def __post_init__(self) -> None:
        """Raises ValueError, which names the axis or the role that is invalid."""
        for name, axis in (("shares", self.shares), ("batches", self.batches), ("lengths", self.lengths)):
            if not axis or list(axis) != sorted(set(axis)) or axis[0] < 1:
                raise ValueError(f"{name}: are {list(axis)}; positive numbers in ascending order are needed")
        if self.shares[-1] > 100:
            raise ValueError(f"shares: are {list(self.shares)}; percent from 1 to 100 are needed")
        for role in Role:
            if self.grid(role).shape != self.shape:
                raise ValueError(f"{role}: has the shape {self.grid(role).shape}; {self.shape} is needed")
            if np.any(self.grid(role) <= 0) or np.any(np.isinf(self.grid(role))):
                raise ValueError(
                    f"{role}: has a time that is not positive and finite; {NO_VALUE:g} stands for no value"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.shares), len(self.batches), len(self.lengths)

    def grid(self, role: Role) -> Grid:
        return self.prefill if role == Role.PREFILL else self.decode

    def next_larger(self, role: Role, share: int, batch: int, length: int) -> float:
        """The cell of ``share`` at the next profiled batch and length that are at least ``batch`` and ``length``.

        MuxServe's lookup, which never interpolates. `NO_VALUE` if the cell has no value, or there is none so large.
        Raises ValueError if ``share`` is none of `shares`.
        """
        batch_index, length_index = bisect_left(self.batches, batch), bisect_left(self.lengths, length)
        share_index = self.shares.index(share)
        if batch_index == len(self.batches) or length_index == len(self.lengths):
            return NO_VALUE
        seconds = float(self.grid(role)[share_index, batch_index, length_index])
        return NO_VALUE if np.isnan(seconds) else seconds

    def interpolated(self, role: Role, share: float, batch: float, length: float) -> float:
        """Seconds by linear interpolation between cells, in each of the three axes.

        Below the smallest batch or length it is that one's time, above the largest the line through the last two. Below
        the smallest share the time grows as the share shrinks; above the largest it is that one's. `smoothed` has a
        value for every cell; without it NaN is returned where a cell in between has none.
        """
        values = self.grid(role)
        low, weight = between(self.lengths, length, extends=True)
        values = _blend(values, 2, low, weight)
        low, weight = between(self.batches, batch, extends=True)
        values = _blend(values, 1, low, weight)
        low, weight = between(self.shares, share, extends=False)
        seconds = float(_blend(values, 0, low, weight))
        return seconds * max(1.0, self.shares[0] / share)

    def smoothed(self) -> StepTable:
        """The nearest monotone table without gaps: more share never slower, larger batch or length never faster.

        Isotonic regression of the logarithms in three dimensions: pool-adjacent-violators along each axis in turn with
        Dykstra's corrections (Dykstra and Robertson, 1982), with Huber's weights, by which a stalled measurement loses
        to its neighbours. Gaps are first filled by the line through the two cells
        before them, as a larger prefill would be computed in several steps. Raises ValueError if a role has no values.
        """
        return replace(self, prefill=self._monotone(self.prefill), decode=self._monotone(self.decode))

    def _monotone(self, grid: Grid) -> Grid:
        if np.all(np.isnan(grid)):
            raise ValueError("a role has no values at all")
        return _nearest_monotone(_filled(grid, self.batches, self.lengths), np.isnan(grid))


def table_from_cells(
    shares: Sequence[int],
    batches: Sequence[int],
    lengths: Sequence[int],
    prefill: Sequence[Sequence[Sequence[float]]],
    decode: Sequence[Sequence[Sequence[float]]],
) -> StepTable:
    """A table from nested lists of seconds, by share, batch and length, in which negative numbers are no values.

    Raises ValueError, also if the lists do not have the shape of the axes.
    """
    grids = []
    for role, cells in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        try:
            grid = np.array(cells, dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"{role}: must have a list for each share, of one for each batch, of seconds") from error
        grid[grid < 0] = np.nan
        grids.append(grid)
    return StepTable(tuple(shares), tuple(batches), tuple(lengths), *grids)


def between(axis: Sequence[int], value: float, *, extends: bool) -> tuple[int, float]:
    """The index of the lower neighbour in ``axis`` and the weight of the upper one, above 1 if extended."""
    if len(axis) == 1 or value <= axis[0]:
        return 0, 0.0
    low = min(bisect_left(axis, value), len(axis) - 1) - 1
    weight = (value - axis[low]) / (axis[low + 1] - axis[low])
    return low, weight if extends else min(1.0, weight)


def _blend(values: Grid, dimension: int, low: int, weight: float) -> Grid:
    lower = np.asarray(values.take(low, dimension))
    return lower if weight == 0.0 else np.asarray(lower + weight * (values.take(low + 1, dimension) - lower))


def _nearest_monotone(grid: Grid, is_filled: NDArray[np.bool_]) -> Grid:
    """The nearest grid that descends along shares and ascends along batches and lengths."""
    logs = np.log(grid)[::-1]  # from the largest share to the smallest, so that every axis ascends
    trust = np.where(is_filled, _FILLED_WEIGHT, 1.0)[::-1]
    ascending = _ascending(logs, trust)
    for _ in range(_REWEIGHTINGS):
        errors = np.abs(ascending - logs)
        ascending = _ascending(logs, trust * np.minimum(1.0, _OUTLIER / np.maximum(errors, _OUTLIER)))
    for axis in range(3):
        ascending = np.maximum.accumulate(ascending, axis=axis)
    return np.ascontiguousarray(np.exp(ascending)[::-1])


def _ascending(logs: Grid, weights: Grid) -> Grid:
    """The nearest grid that ascends along every axis, but for the tolerance."""
    corrections = [np.zeros_like(logs) for _ in range(3)]
    for _ in range(_SMOOTHING_ROUNDS):
        before = logs
        for axis in range(3):
            moved = logs + corrections[axis]
            logs = _ascending_along(moved, weights, axis)
            corrections[axis] = moved - logs
        if np.max(np.abs(logs - before)) < _SMOOTHING_TOLERANCE:
            break
    return logs


def _ascending_along(values: Grid, weights: Grid, axis: int) -> Grid:
    """Pools adjacent violators in every line along ``axis``; lines that ascend already stay."""
    lines, line_weights = np.moveaxis(values, axis, -1).copy(), np.moveaxis(weights, axis, -1)
    for first, second in np.argwhere(np.any(np.diff(lines) < 0, axis=-1)).tolist():
        lines[first, second] = _pooled(lines[first, second].tolist(), line_weights[first, second].tolist())
    return np.moveaxis(lines, -1, axis)


def _pooled(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest ascending sequence, by weighted squares."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, total, count = pools.pop()
            both = total + pool[1]
            pool = ((mean * total + pool[0] * pool[1]) / both, both, count + pool[2])
        pools.append(pool)
    return [mean for mean, _, count in pools for _ in range(count)]


def _filled(grid: Grid, batches: Sequence[int], lengths: Sequence[int]) -> Grid:
    """``grid`` with a positive value in every cell: along batches, then along lengths, then from the nearest share."""
    filled = grid.copy()
    for axis, positions in ((1, batches), (2, lengths)):
        lines = np.moveaxis(filled, axis, -1)
        for index in np.ndindex(lines.shape[:-1]):
            lines[index] = _extended(lines[index], np.array(positions, dtype=np.float64))
    known = [share for share in range(len(filled)) if not np.any(np.isnan(filled[share]))]
    for share in range(len(filled)):
        nearest = filled[min(known, key=lambda one: abs(one - share))]
        filled[share] = np.where(np.isnan(filled[share]), nearest, filled[share])
    return filled


def _extended(line: Grid, positions: Grid) -> Grid:
    """``line`` with values between, before and after its known ones.

    After the last it is the line through the last two, or proportional to the position if one is known.
    """
    known = np.flatnonzero(~np.isnan(line))
    if len(known) == 0 or len(known) == len(line):
        return line
    extended: Grid = np.interp(positions, positions[known], line[known])
    last = known[-1]
    if len(known) > 1:
        slope = max(0.0, (line[last] - line[known[-2]]) / (positions[last] - positions[known[-2]]))
    else:
        slope = line[last] / positions[last]
    extended[last + 1 :] = line[last] + slope * (positions[last + 1 :] - positions[last])
    return extended
