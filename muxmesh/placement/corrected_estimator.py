"""Throughput, latency and SLO attainment of models that share devices, without the faults of the prototype. Pure.

For a unit of n devices, with model m at rate r, mean prompt p, mean output o, shares and batch cap c (docs/plan.md has
the derivation):

    P_m  prefill seconds of one prompt, in the batch of at most 8 prompts that costs least per prompt
    D_m(b)  seconds of a decode step of b sequences with p + o / 2 tokens of context, times 1 + contention * (shares of
            the other models' decodes, at most 1)
    u    part of the time in which the unit computes prefills: the one u with u = sum of x_m(u) * P_m
    x_m(u) = min(r_m, (1 - u) * max over b <= c_m of b / (D_m(b) * (o_m - 1)))

Times are interpolated in smoothed tables, so a larger share or a smaller batch is never slower. Memory is the rule of
the launcher: n-th parts of all weights, what workers need, and KV of c_m sequences of mean length fit on each device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muxmesh.placement.plan import Cluster, ModelLoad, PlacedUnit, Plan, weighted_mean
from muxmesh.placement.profile import Profile
from muxmesh.types import Role

MAX_BATCH = 1024
"""Largest `max_num_seqs` of a model in mesh.yaml."""
HEADROOM = 1.25
"""Batch caps are this much above the mean number of sequences, since arrivals are random."""
_PREFILL_BATCHES = (1, 2, 4, 8)
_ROUNDS = 40
"""Bisections for the part of prefills: exact to 1e-12."""

_MEMORY_ROUNDS = 12
"""Bisections for the part of the rates that the KV memory allows."""

Curve = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModelEstimate:
    """What one model of a unit gets."""

    throughput: float
    """Requests per second, at most its rate."""
    mean_batch: float
    """Sequences in decode."""
    ttft_s: float
    """Mean time to first token; infinite if the rate is not met."""
    tpot_s: float
    """Mean time per output token after the first."""
    attainment: float
    """Part of its requests within the SLO, those that are not served counted as missed."""


@dataclass(frozen=True, slots=True)
class UnitEstimate:
    """What all models of a unit get."""

    models: tuple[ModelEstimate, ...]
    prefill_part: float
    """Part of the time in which the unit computes prefills: u above."""
    kv_bytes: int
    """KV of all devices of the unit: what weights and workers leave."""
    max_num_seqs: tuple[int, ...]
    """Batch cap of each model: the given one, or what its rate needs, with headroom, within the KV memory."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model at a place: what `estimate_unit` needs of it."""

    load: ModelLoad
    prefill_share: int
    decode_share: int
    max_num_seqs: int | None = None
    """None: as many as the rate needs and the memory holds."""


@dataclass(frozen=True, slots=True)
class _Steps:
    """Seconds of one model on one number of devices at its shares."""

    prefill_s: float
    decode_s: Curve
    """Of a decode step by batch, from 1 to `MAX_BATCH`."""
    best_rate: Curve
    """Requests per second that batches up to this one reach on a device without prefills: ascending."""
    first_token_s: float
    """Prefill of one prompt alone."""


class CorrectedEstimator:
    """Estimates units and plans on ``cluster`` over one profile; keeps what it computed of single models."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self._profile = profile
        self._cluster = cluster
        self._steps: dict[tuple[str, int, int, int, float, float], _Steps] = {}
        self._idle_s: dict[ModelLoad, float] = {}

    def score(self, plan: Plan) -> float:
        """Rate-weighted mean throughput in requests per second; 0 for models of units that do not fit the memory."""
        return weighted_mean([(load, one.throughput) for load, one in self.estimates(plan)])

    def attainment(self, plan: Plan) -> float:
        """Part of all requests within their SLO."""
        found = self.estimates(plan)
        return sum(load.rate * one.attainment for load, one in found) / sum(load.rate for load, _ in found)

    def estimates(self, plan: Plan) -> list[tuple[ModelLoad, ModelEstimate]]:
        """Every model of ``plan`` with its estimate."""
        found = []
        for unit in plan.units:
            estimate = self.estimate(unit)
            models = estimate.models if estimate else (_UNSERVED,) * len(unit.models)
            found += [(one.load, each) for one, each in zip(unit.models, models, strict=True)]
        return found

    def estimate(self, unit: PlacedUnit) -> UnitEstimate | None:
        """The estimate of ``unit`` with its batch caps. None if it does not fit the memory or was not profiled."""
        return self.estimate_unit(
            unit.num_devices,
            [Candidate(one.load, one.prefill_share, one.decode_share, one.max_num_seqs) for one in unit.models],
        )

    def estimate_unit(self, num_devices: int, models: Sequence[Candidate]) -> UnitEstimate | None:
        """Like `estimate`, of models whose caps may be left open."""
        kv_bytes = self.kv_bytes(num_devices, [one.load.kind for one in models])
        if kv_bytes <= 0 or not all(num_devices in self._profile.models[one.load.kind].tables for one in models):
            return None
        steps = [self._steps_of(one, num_devices) for one in models]
        slowdowns = self._slowdowns([one.decode_share for one in models])
        caps = self._caps(models, steps, slowdowns, kv_bytes)
        if min(caps) < 1:
            return None
        part = _prefill_part(
            [
                (one.load.rate, one_steps.prefill_s, float(one_steps.best_rate[cap - 1]) / slowdown)
                for one, one_steps, cap, slowdown in zip(models, steps, caps, slowdowns, strict=True)
            ]
        )
        estimates = tuple(
            self._model_estimate(one.load, one_steps, cap, slowdown, part)
            for one, one_steps, cap, slowdown in zip(models, steps, caps, slowdowns, strict=True)
        )
        return UnitEstimate(estimates, part, kv_bytes, tuple(caps))

    def kv_bytes(self, num_devices: int, kinds: Sequence[str]) -> int:
        """What weights and workers leave for KV on all devices of a unit. Negative: the models do not fit."""
        cluster = self._cluster
        weights = sum(self._profile.models[kind].weights_bytes for kind in kinds)
        return num_devices * (cluster.memory_bytes - 2 * len(kinds) * cluster.worker_bytes) - weights

    def sequence_bytes(self, load: ModelLoad) -> float:
        """KV of one sequence of mean length."""
        return (load.prompt_tokens + load.output_tokens) * self._profile.models[load.kind].kv_bytes_per_token

    def kv_bytes_per_token(self, kind: str) -> int:
        return self._profile.models[kind].kv_bytes_per_token

    def limits(self, load: ModelLoad, num_devices: int, prefill_share: int, decode_share: int) -> tuple[float, float]:
        """Prefill seconds of a prompt, and the requests per second of decodes limited by their share only."""
        steps = self._steps_of(Candidate(load, prefill_share, decode_share), num_devices)
        return steps.prefill_s, float(steps.best_rate[-1])

    def _slowdowns(self, decode_shares: Sequence[int]) -> list[float]:
        total = sum(decode_shares)
        return [1 + self._profile.contention * min(1.0, (total - own) / 100) for own in decode_shares]

    def _steps_of(self, one: Candidate, num_devices: int) -> _Steps:
        load = one.load
        key = (load.kind, num_devices, one.prefill_share, one.decode_share, load.prompt_tokens, load.output_tokens)
        if key not in self._steps:
            self._steps[key] = self._read_steps(*key)
        return self._steps[key]

    def _read_steps(
        self, kind: str, num_devices: int, prefill_share: int, decode_share: int, prompt: float, output: float
    ) -> _Steps:
        table = self._profile.models[kind].smoothed[num_devices]
        prefills = [table.interpolated(Role.PREFILL, prefill_share, batch, prompt) for batch in _PREFILL_BATCHES]
        context = prompt + output / 2
        anchors = sorted({*table.batches, 1, MAX_BATCH})
        known = [table.interpolated(Role.DECODE, decode_share, batch, context) for batch in anchors]
        batches = np.arange(1, MAX_BATCH + 1)
        decode_s = np.interp(batches, anchors, known)
        rates = np.maximum.accumulate(batches / (decode_s * max(1.0, output - 1)))
        cheapest = min(seconds / batch for seconds, batch in zip(prefills, _PREFILL_BATCHES, strict=True))
        return _Steps(cheapest, decode_s, rates, prefills[0])

    def _caps(
        self, models: Sequence[Candidate], steps: Sequence[_Steps], slowdowns: Sequence[float], kv_bytes: int
    ) -> list[int]:
        """Batch caps: the given ones, and for the others what the rate needs with headroom, within the KV memory.

        Where it is too small, the open caps are those that meet the same part of every rate: as large as it can be.
        """
        bytes_of = [self.sequence_bytes(one.load) for one in models]
        given = [one.max_num_seqs for one in models]
        fixed = sum(cap * size for cap, size in zip(given, bytes_of, strict=True) if cap is not None)
        if None not in given:  # they share what there is
            scale = min(1.0, kv_bytes / fixed)
            return [max(1, int(cap * scale)) for cap in given if cap is not None]
        part = min(0.95, sum(one.load.rate * each.prefill_s for one, each in zip(models, steps, strict=True)))
        rates = [one.load.rate * slowdown / (1 - part) for one, slowdown in zip(models, slowdowns, strict=True)]

        def caps(met: float) -> list[int]:
            return [
                _needed(each.best_rate, met * rate) if cap is None else cap
                for each, rate, cap in zip(steps, rates, given, strict=True)
            ]

        def holds(some: Sequence[int]) -> bool:
            return sum(cap * size for cap, size in zip(some, bytes_of, strict=True)) <= kv_bytes

        found = caps(1.0)
        if holds(found):
            return found
        low, high = 0.0, 1.0
        for _ in range(_MEMORY_ROUNDS):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(caps(middle)) else (low, middle)
        found = caps(low)
        return found if holds(found) else [0] * len(found)

    def _model_estimate(self, load: ModelLoad, steps: _Steps, cap: int, slowdown: float, part: float) -> ModelEstimate:
        possible = (1 - part) * float(steps.best_rate[cap - 1]) / slowdown
        throughput = min(load.rate, possible)
        index = int(np.searchsorted(steps.best_rate[: cap - 1], throughput * slowdown / (1 - part) * (1 - 1e-9)))
        tpot_s = float(steps.decode_s[index]) * slowdown / (1 - part)
        is_met = possible >= load.rate * (1 - 1e-9)
        wait_s = part * steps.prefill_s / (2 * (1 - part)) + tpot_s / max(1.0, load.output_tokens)
        ttft_s = wait_s + steps.first_token_s if is_met else math.inf
        attainment = self._attainment(load, steps, throughput, possible, tpot_s, wait_s)
        return ModelEstimate(throughput, float(index + 1), ttft_s, tpot_s, attainment)

    def _attainment(
        self, load: ModelLoad, steps: _Steps, throughput: float, possible: float, tpot_s: float, wait_s: float
    ) -> float:
        """Served part of the requests, times the probability that an exponential wait leaves enough time.

        With the capacity ``possible`` a request waits with the probability rho = rate / possible, on average as in an
        M/M/1 queue. If the latency without a wait is past the objective, no request is within it.
        """
        ttft_s = steps.first_token_s + wait_s
        latency_s = ttft_s + tpot_s * max(0.0, load.output_tokens - 1)
        if load.slo_ttft_s is None and load.slo_tpot_s is None:
            slack_s = load.slo_scale * self.idle_latency_s(load) - latency_s
        elif tpot_s > (load.slo_tpot_s or math.inf):
            slack_s = 0.0
        else:
            slack_s = (load.slo_ttft_s or math.inf) - ttft_s
        if slack_s <= 0:
            return 0.0
        rho = min(1.0, load.rate / possible)
        if rho >= 1.0:
            return throughput / load.rate * (slack_s / (slack_s + latency_s) if math.isfinite(slack_s) else 1.0)
        return 1 - rho * math.exp(-(possible - load.rate) * slack_s)

    def idle_latency_s(self, load: ModelLoad) -> float:
        """Latency of a request of mean lengths that is alone on the smallest unit that holds the model."""
        if load not in self._idle_s:
            tables = self._profile.models[load.kind].smoothed
            fits = [size for size in sorted(tables) if self.kv_bytes(size, [load.kind]) > 0] or [max(tables)]
            table = tables[fits[0]]
            context = load.prompt_tokens + load.output_tokens / 2
            self._idle_s[load] = table.interpolated(Role.PREFILL, 100, 1, load.prompt_tokens) + (
                load.output_tokens - 1
            ) * table.interpolated(Role.DECODE, 100, 1, context)
        return self._idle_s[load]


def _needed(best_rate: Curve, rate: float) -> int:
    """The batch cap with headroom for ``rate``, at most `MAX_BATCH`; one sequence for none."""
    if rate <= 0:
        return 1
    index = int(np.searchsorted(best_rate, rate * (1 - 1e-9)))
    return min(MAX_BATCH, math.ceil((index + 1) * HEADROOM))


_UNSERVED = ModelEstimate(0.0, 0.0, math.inf, math.inf, 0.0)


def _prefill_part(models: Sequence[tuple[float, float, float]]) -> float:
    """The part u of the time for prefills, of models with (rate, seconds of a prompt, rate without prefills).

    What they serve shrinks as u grows, so that there is one u at which prefills of what is served take u.
    """
    low, high = 0.0, 1.0
    for _ in range(_ROUNDS):
        part = (low + high) / 2
        needed = sum(min(rate, (1 - part) * possible) * prefill_s for rate, prefill_s, possible in models)
        low, high = (part, high) if needed > part else (low, part)
    return low


def by_name(estimates: Sequence[tuple[ModelLoad, ModelEstimate]]) -> Mapping[str, ModelEstimate]:
    """Estimates by the names of their models."""
    return {load.name: estimate for load, estimate in estimates}
