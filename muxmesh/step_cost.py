"""A linear model of step times, fitted to measured steps, and the time that a request takes by it. Pure.

A step that computes n tokens, which together attend to c earlier tokens, takes
``base_s + per_token_s * n + per_context_s * c``. The model covers prefill chunks, decode steps and mixed steps. The
coefficients differ between workers, because each worker has its own role and compute share. c makes the cost of a
prompt quadratic in its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from muxmesh.running_mean import RunningMean

COSTS_EVERY_S = 1.0
"""Interval at which a unit sends its step costs to the routers."""

_DECAY = 0.998
"""Factor on the weight of all earlier steps at each step. About the last 500 steps determine the fit."""
_OUTLIER = 2.0
"""Relative errors above this multiple of the mean deviation are down-weighted, by Huber's rule."""
_INITIAL_DEVIATION = 0.1
"""Initial value of the mean relative deviation."""
_WARMUP_STEPS = 8
_SOLVE_EVERY = 16
_RIDGE = 1e-9


@dataclass(frozen=True, slots=True)
class StepShape:
    """The size of a step. ``num_context`` is the number of earlier tokens that its tokens attend to, summed."""

    num_tokens: int
    num_context: int
    num_seqs: int


def context_of(start: int, num_tokens: int) -> int:
    """The number of earlier tokens that the tokens ``[start, start + num_tokens)`` attend to, summed."""
    return num_tokens * start + num_tokens * (num_tokens - 1) // 2


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients of one worker, and the mean number of sequences and context per token of its recent steps."""

    base_s: float
    per_token_s: float
    per_context_s: float
    mean_seqs: float = 1.0
    mean_context: float = 0.0

    def step_s(self, num_tokens: float, num_context: float) -> float:
        return self.base_s + self.per_token_s * num_tokens + self.per_context_s * num_context

    def prefill_s(self, num_tokens: int, start: int = 0, chunk: int = 128) -> float:
        """Seconds to compute the prompt tokens ``[start, start + num_tokens)`` in steps of ``chunk`` tokens."""
        steps = -(-num_tokens // chunk)
        return steps * self.base_s + self.step_s(num_tokens, context_of(start, num_tokens)) - self.base_s

    def decode_s(self, num_tokens: float, context: int) -> float:
        """Seconds of ``num_tokens`` decode steps of a sequence, the first with ``context`` tokens of context.

        Each step also computes one token for each of the other ``mean_seqs - 1`` sequences. Over r steps the sequence's
        own context adds up to r * context + r * (r - 1) / 2.
        """
        others = max(0.0, self.mean_seqs - 1)
        step_s = self.step_s(1 + others, others * self.mean_context)
        own = num_tokens * context + num_tokens * max(0.0, num_tokens - 1) / 2
        return num_tokens * step_s + self.per_context_s * own


def share_factor(share: float, scaling: float) -> float:
    """How many times as long a step takes on ``share`` of the device, in (0, 1], as on the whole device.

    ``scaling``: the part of the step's time that is inversely proportional to the share, in [0, 1] (Amdahl's law).
    """
    return (1 - scaling) + scaling / share


def at_share(cost: StepCost, share: float, scaling: float) -> StepCost:
    """The step cost of a worker that has ``share`` of the device. See `share_factor`."""
    factor = share_factor(share, scaling)
    return replace(
        cost,
        base_s=cost.base_s * factor,
        per_token_s=cost.per_token_s * factor,
        per_context_s=cost.per_context_s * factor,
    )


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Step costs of the prefill and the decode worker of one model on one unit."""

    prefill: StepCost
    decode: StepCost


UNMEASURED = ModelCosts(StepCost(0.02, 0.0005, 0.0), StepCost(0.02, 0.0005, 0.0))
"""Costs before the first measured step. Requests are only compared, so a common factor has no effect."""


class CostFit:
    """Owns the fit of one worker: least squares with exponential decay and Huber weights (Huber, 1964).

    Errors are relative to the time of a step. Coefficients are non-negative: the fit solves each subset of the three
    and chooses the best non-negative solution, which is exact.
    """

    def __init__(self) -> None:
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._deviation = _INITIAL_DEVIATION
        self._seqs, self._context = RunningMean(1 - _DECAY), RunningMean(1 - _DECAY)
        self.cost: StepCost | None = None
        """The current fit, updated every few steps. None before the first step."""
        self.num_steps = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Adds a measured step. Ignores times that are not positive and finite, and steps without tokens."""
        if not 0 < seconds < float("inf") or shape.num_tokens < 1:
            return
        self.num_steps += 1
        weight = self._weight(shape, seconds) / seconds**2
        row = (1.0, float(shape.num_tokens), float(shape.num_context))
        for i, left in enumerate(row):
            self._targets[i] = self._targets[i] * _DECAY + weight * left * seconds
            for j, right in enumerate(row):
                self._products[i][j] = self._products[i][j] * _DECAY + weight * left * right
        self._seqs.add(shape.num_seqs)
        self._context.add(shape.num_context / shape.num_tokens)
        if self.num_steps <= _WARMUP_STEPS or self.num_steps % _SOLVE_EVERY == 0:
            base, token, context = _non_negative(self._products, self._targets)
            self.cost = StepCost(base, token, context, self._seqs.mean, self._context.mean)

    def _weight(self, shape: StepShape, seconds: float) -> float:
        """Huber weight of a step: 1 near the fit, less for an outlier such as a stall of the machine."""
        if self.cost is None or self.num_steps <= _WARMUP_STEPS:
            return 1.0
        error = abs(self.cost.step_s(shape.num_tokens, shape.num_context) / seconds - 1)
        weight = min(1.0, _OUTLIER * self._deviation / error) if error else 1.0
        self._deviation += 0.02 * (min(error, 4 * self._deviation) - self._deviation) + 1e-6
        return weight


def least_squares_cost(measured: Sequence[tuple[float, float, float, float]]) -> StepCost:
    """The non-negative cost that fits ``measured`` with the least squares of relative errors.

    Each is (number of steps, tokens, context, seconds), over all of its steps; seconds are positive.
    """
    products, targets = [[0.0] * 3 for _ in range(3)], [0.0] * 3
    for *row, seconds in measured:
        for i in range(3):
            targets[i] += row[i] / seconds
            for j in range(3):
                products[i][j] += row[i] * row[j] / seconds**2
    return StepCost(*_non_negative(products, targets))


def _non_negative(products: Sequence[Sequence[float]], targets: Sequence[float]) -> tuple[float, float, float]:
    """Solves the normal equations of least squares for three non-negative unknowns."""
    best, best_loss = (0.0, 0.0, 0.0), float("inf")
    for size in (3, 2, 1):
        for chosen in combinations(range(3), size):
            solution = _solve([[products[i][j] for j in chosen] for i in chosen], [targets[i] for i in chosen])
            if solution is None or min(solution) < 0:
                continue
            full = [0.0] * 3
            for index, value in zip(chosen, solution, strict=True):
                full[index] = value
            quadratic = sum(full[i] * products[i][j] * full[j] for i in range(3) for j in range(3))
            loss = quadratic - 2 * sum(value * target for value, target in zip(full, targets, strict=True))
            if loss < best_loss:
                best, best_loss = (full[0], full[1], full[2]), loss
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Solves a linear system by Gauss-Jordan elimination with scaled rows. None if the matrix is singular."""
    size = len(right)
    scale = [matrix[i][i] ** 0.5 for i in range(size)]
    if min(scale) <= 0:
        return None
    rows = [[matrix[i][j] / (scale[i] * scale[j]) for j in range(size)] + [right[i] / scale[i]] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(rows[row][i]))
        if abs(rows[pivot][i]) < _RIDGE:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for other in range(size):
            if other != i:
                rows[other] = [a - rows[other][i] * b for a, b in zip(rows[other], rows[i], strict=True)]
    return [rows[i][size] / scale[i] for i in range(size)]
