"""The throughput estimator of MuxServe's prototype, with its simplifications, to compare plans on it. Pure.

Source: MuxServe (Duan et al., ICML 2024), section 3, and its published prototype, whose scores of the published plans
this estimator reproduces. The simplifications below are the prototype's; `corrected_estimator` is without them.

Every prompt has P tokens and every output O: 161 and 337 in the prototype, whatever the workload has. For model m with
batch b_m on the g devices of a unit:

    p_m(b)  prefill of b prompts on the whole device, whatever the model's prefill share is: the cell of the first
            profiled length above P, or where that has no value, of the longest one below it
    D_m(b)  a decode step: c + b * overhead_m. Of the cells v_1 .. v_n of all profiled lengths up to the first one above
            O, r_k is the mean of v_1 .. v_k, and c the mean of r_1 .. r_n: short contexts weigh more
    x_m     b_m / (O * D_m(b_m) + sum over the unit's models of p_i(b_i)) requests per second, not limited by the rate

p and c are those of the next larger profiled batch. Prefills of a unit run one after another, and decodes side by side
without slowing each other down.

    memory  0.98 * 80 * g less the weights and 6 for each model, in GB, is KV memory, of which model m has a part in
            proportion to rate_m * KV bytes of a token. b_m is at most the number of sequences of P + O tokens that fit
            in it, and at most the largest profiled batch
    start   bisection for the least batch at which the model alone meets its rate; b_m is the last one tried, rounded
            down
    growth  a model is satisfied if x_m + min(0.5, 0.1 * x_m) reaches its rate. Of those that are not, and are below
            their limit, the one with the least x_m / rate_m gets one more sequence, until there is none
    score   rate-weighted mean of x_m, in that state of each unit in which it is largest. A state in which all batches
            are at their limits ends the growth and does not count

`PrototypeConstants` of a model has its weights and its overhead. A model without them, as in all profiles but
MuxServe's, has no overhead, and its unit no memory limit. Lengths are in ascending order here; the prototype's file has
another order in some rows of 7B on 8 devices, which changes c there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.placement.plan import (
    SHAREGPT_OUTPUT_TOKENS,
    SHAREGPT_PROMPT_TOKENS,
    ModelLoad,
    PlacedUnit,
    Plan,
    weighted_mean,
)
from muxmesh.placement.profile import Profile
from muxmesh.placement.step_table import Grid

_DEVICE_GB = 80.0
_USABLE = 0.98
"""Part of a device's memory."""
_MODEL_GB = 6.0
"""What each model of a unit needs beside weights and KV."""
_SLACK, _MOST_SLACK = 0.1, 0.5
"""A rate is met by a throughput that is this part lower, but not by more than so many requests per second."""


@dataclass(frozen=True, slots=True)
class _Steps:
    """Seconds of one model by profiled batch."""

    batches: tuple[int, ...]
    prefill_s: tuple[float, ...]
    outputs_s: tuple[float, ...]
    """Of all decode steps of an output, without `overhead_s`."""
    overhead_s: float
    """Of all decode steps of an output, for each sequence of the batch."""

    def cell(self, batch: float) -> int:
        """The index of the next larger profiled batch."""
        return min(bisect_left(self.batches, batch), len(self.batches) - 1)

    def throughput(self, cell: int, batch: float, prefill_s: float) -> float:
        """Requests per second; ``prefill_s``: of all models of the unit."""
        return batch / (self.outputs_s[cell] + self.overhead_s * batch + prefill_s)

    def batch_of(self, cell: int, throughput: float, prefill_s: float) -> float:
        """The batch that has ``throughput``; infinite if none has."""
        left = 1 - throughput * self.overhead_s
        return throughput * (self.outputs_s[cell] + prefill_s) / left if left > 0 else float("inf")


class ReferenceEstimator:
    """Estimates units and plans over one profile. ``prompt_tokens`` and ``output_tokens`` hold for all models."""

    def __init__(
        self,
        profile: Profile,
        prompt_tokens: int = SHAREGPT_PROMPT_TOKENS,
        output_tokens: int = SHAREGPT_OUTPUT_TOKENS,
    ) -> None:
        self._profile = profile
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._steps: dict[tuple[str, int, int], _Steps] = {}

    def score(self, plan: Plan) -> float:
        """Rate-weighted mean throughput of the models of ``plan`` in requests per second."""
        found = [
            (model.load, throughput)
            for unit in plan.units
            for model, throughput in zip(unit.models, self.throughputs(unit), strict=True)
        ]
        return weighted_mean(found)

    def throughputs(self, unit: PlacedUnit) -> list[float]:
        """Requests per second of each model of ``unit`` in its best state; see `throughputs_of`."""
        return self.throughputs_of(unit.num_devices, [(one.load, one.decode_share) for one in unit.models])

    def throughputs_of(self, num_devices: int, models: Sequence[tuple[ModelLoad, int]]) -> list[float]:
        """Like `throughputs`, of models with their decode shares.

        All 0 where the profile has no table or share for one of them, or the memory holds no more than one sequence of
        each.
        """
        steps = [self._steps_of(load.kind, num_devices, share) for load, share in models]
        if not all(one.batches for one in steps):
            return [0.0] * len(models)
        limits = self.limits(num_devices, [load for load, _ in models])
        batches = [
            _Batch.started(one, load.rate, one.batches[-1] if limit is None else min(one.batches[-1], limit))
            for one, (load, _), limit in zip(steps, models, limits, strict=True)
        ]
        return _best_throughputs(batches)

    def limits(self, num_devices: int, loads: Sequence[ModelLoad]) -> list[int | None]:
        """The sequences of each model of a unit for which there is memory; None: not limited."""
        profiles = [self._profile.models[load.kind] for load in loads]
        costs = [one.prototype for one in profiles]
        weights_gb = [one.weights_gb for one in costs if one is not None]
        if len(weights_gb) < len(loads):
            return [None] * len(loads)
        kv_gb = max(0.0, _USABLE * _DEVICE_GB * num_devices - sum(weights_gb) - _MODEL_GB * len(loads))
        token_gb = [one.kv_bytes_per_token / 2**30 for one in profiles]
        demand = [load.rate * one for load, one in zip(loads, token_gb, strict=True)]
        tokens = self._prompt_tokens + self._output_tokens
        return [int(kv_gb * own / sum(demand) / (tokens * one)) for own, one in zip(demand, token_gb, strict=True)]

    def _steps_of(self, kind: str, num_devices: int, decode_share: int) -> _Steps:
        key = (kind, num_devices, decode_share)
        if key not in self._steps:
            self._steps[key] = self._read_steps(*key)
        return self._steps[key]

    def _read_steps(self, kind: str, num_devices: int, decode_share: int) -> _Steps:
        """Batches without a value in one of the two roles are left out."""
        model = self._profile.models[kind]
        table = model.tables.get(num_devices)
        if table is None or decode_share not in table.shares:
            return _Steps((), (), (), 0.0)
        decode = table.decode[table.shares.index(decode_share)]
        cells = []
        for index, batch in enumerate(table.batches):
            prefills = _visited(table.lengths, table.prefill[-1, index], self._prompt_tokens)
            decodes = _visited(table.lengths, decode[index], self._output_tokens)
            if prefills and decodes:
                cells.append((batch, prefills[-1], self._output_tokens * _mean_of_running_means(decodes)))
        batches, prefill_s, outputs_s = zip(*cells, strict=True) if cells else ((), (), ())
        overhead_s = model.prototype.sequence_overhead_s if model.prototype is not None else 0.0
        return _Steps(tuple(batches), tuple(prefill_s), tuple(outputs_s), self._output_tokens * overhead_s)


def _visited(lengths: Sequence[int], cells: Grid, tokens: int) -> list[float]:
    """The values of ``cells`` up to the first one at a length above ``tokens``."""
    found = []
    for length, seconds in zip(lengths, cells.tolist(), strict=True):
        if not np.isnan(seconds):
            found.append(seconds)
            if length > tokens:
                break
    return found


def _mean_of_running_means(values: Sequence[float]) -> float:
    means = [sum(values[:count]) / count for count in range(1, len(values) + 1)]
    return sum(means) / len(means)


@dataclass(slots=True)
class _Batch:
    """The batch of one model while batches grow, the index of its profiled batch, and its largest size."""

    steps: _Steps
    rate: float
    limit: int
    size: int
    cell: int

    @classmethod
    def started(cls, steps: _Steps, rate: float, limit: int) -> _Batch:
        """With the batch at which a bisection of real numbers ends that looks for the rate without other models."""
        low, high = 1.0, float(max(2, limit))
        middle = low
        while high - low >= 1:
            middle = (low + high) / 2
            cell = steps.cell(middle)
            is_met = steps.throughput(cell, middle, steps.prefill_s[cell]) >= rate
            low, high = (low, middle) if is_met else (middle, high)
        return cls(steps, rate, limit, int(middle), steps.cell(int(middle)))

    @property
    def prefill_s(self) -> float:
        return self.steps.prefill_s[self.cell]

    @property
    def top(self) -> int:
        """The profiled batch whose times hold now."""
        return self.steps.batches[self.cell]

    @property
    def is_at_limit(self) -> bool:
        return self.size >= self.limit

    def throughput(self, size: int, prefill_s: float) -> float:
        return self.steps.throughput(self.cell, size, prefill_s)

    def is_satisfied(self, size: int, prefill_s: float) -> bool:
        found = self.throughput(size, prefill_s)
        return found + min(_MOST_SLACK, _SLACK * found) >= self.rate

    def settled(self, prefill_s: float) -> int:
        """The size up to which this batch grows within its profiled one."""
        enough = max(self.rate / (1 + _SLACK), self.rate - _MOST_SLACK)
        guess = self.steps.batch_of(self.cell, enough, prefill_s)
        return _first_size(self.size, min(self.top, self.limit), guess, lambda size: self.is_satisfied(size, prefill_s))

    def grown(self, stop: int, level: float, prefill_s: float, *, is_first: bool) -> int:
        """The size, at most ``stop``, at which this batch meets the part ``level`` of its rate.

        ``is_first``: of equal levels that of this batch is raised first, so it has to be past ``level``.
        """
        guess = self.steps.batch_of(self.cell, level * self.rate, prefill_s)

        def is_past(size: int) -> bool:
            own = self.throughput(size, prefill_s) / self.rate
            return own > level or (own == level and not is_first)

        return _first_size(self.size, stop, guess, is_past)


def _first_size(low: int, high: int, guess: float, holds: Callable[[int], bool]) -> int:
    """The least size from ``low`` to ``high`` for which ``holds``, which stays so above it; ``high`` if there is none.

    ``guess`` is its value but for rounding errors.
    """
    size = max(low, int(min(high, guess)))
    while size > low and holds(size - 1):
        size -= 1
    while size < high and not holds(size):
        size += 1
    return size


def _best_throughputs(batches: Sequence[_Batch]) -> list[float]:
    """Raises batches by one at a time, and returns the throughputs of the best state.

    It goes from one change of a profiled batch to the next. In between throughputs only rise, so the last state is the
    best, and a batch is at each level of throughput / rate before any other is raised past that level.
    """
    best, most = [0.0] * len(batches), 0.0
    while not all(one.is_at_limit for one in batches):
        prefill_s = sum(one.prefill_s for one in batches)
        crossing = _grow(batches, prefill_s)
        found = [one.throughput(one.size, prefill_s) for one in batches]
        value = sum(one.rate * throughput for one, throughput in zip(batches, found, strict=True))
        if value > most:
            best, most = found, value
        if crossing is None:
            break
        crossing.size += 1
        crossing.cell += 1
    return best


def _grow(batches: Sequence[_Batch], prefill_s: float) -> _Batch | None:
    """Raises batches to the last state that counts before one leaves its profiled batch. Returns that; None: none does.

    At least one batch is below its limit.
    """
    before = [one.size for one in batches]
    stops = [one.settled(prefill_s) for one in batches]
    levels = [one.throughput(stop, prefill_s) / one.rate for one, stop in zip(batches, stops, strict=True)]
    crossing = [
        index
        for index, (one, stop) in enumerate(zip(batches, stops, strict=True))
        if stop == one.top and stop < one.limit and not one.is_satisfied(stop, prefill_s)
    ]
    if crossing:
        next_one = min(crossing, key=levels.__getitem__)
        for index, (one, stop) in enumerate(zip(batches, stops, strict=True)):
            one.size = one.grown(stop, levels[next_one], prefill_s, is_first=index < next_one)
        return batches[next_one]
    for one, stop in zip(batches, stops, strict=True):
        one.size = stop
    if all(one.is_at_limit for one in batches):  # this state does not count, but the one before the last raise does
        raised = [one for one, size in zip(batches, before, strict=True) if one.size > size]
        last = max(reversed(raised), key=lambda one: one.throughput(one.size - 1, prefill_s) / one.rate)
        last.size -= 1
    return None
