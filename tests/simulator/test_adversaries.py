"""Useless predictors and tenants with false hints in virtual time: what they cost the others, and what they gain."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from statistics import fmean

import pytest

from loadtest.record import Record
from loadtest.workload import Body, Sketch
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import LengthPrediction
from simulator.forecasts import ForecastInput, Forecasts, LearnedLengths, TrueLengths
from tests.support.predictors import ScriptedPredictor, crash
from tests.support.simulations import make_sketch, run_simulation, sim_mesh, sim_model

NUM_REQUESTS, NUM_UNTIL_CHECKED = 2500, 700
"""The rank of a predictor's first outputs is not known yet: means are over the requests after them."""
RNG = random.Random(3)
USELESS: dict[str, Callable[[float], float]] = {
    "always 1": lambda length: 1.0,
    "huge": lambda length: 1e300,
    "random": lambda length: RNG.lognormvariate(4, 2),
    "NaN": lambda length: math.nan,
    "crashing": crash,
}


class ConstantLengths(TrueLengths):
    """Forecasts the same length for every output."""

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        return LengthPrediction(60, 120), "constant", None


class HintingTenant(LearnedLengths):
    """Forecasts of an imprecise predictor. Tenant b sends hints."""

    def __init__(self, hint: Callable[[int], int]) -> None:
        super().__init__(imprecise())
        self._hint = hint

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        hint_tokens = self._hint(request.num_output) if request.tenant == "b" else None
        hinted = ForecastInput(request.text, request.model, request.tenant, request.num_output, hint_tokens)
        return super().forecast(hinted)


def imprecise() -> CheckedPredictor:
    rng = random.Random(5)
    return CheckedPredictor(ScriptedPredictor(lambda length: length**0.7 * 4 * rng.lognormvariate(0, 0.7)))


@functools.cache
def sketches() -> Sequence[Sketch]:
    """Poisson arrivals near capacity. The prompt of each request is the length of its output."""
    rng, at_s, found = random.Random(0), 0.0, []
    for index in range(NUM_REQUESTS):
        at_s += rng.expovariate(11.0)
        length = min(600, max(1, round(rng.lognormvariate(4, 0.9))))
        body = Body(str(length), 20, length)
        found.append(make_sketch(index, at_s, body=body, max_new_tokens=600, is_forced=False, tenant="ab"[index % 2]))
    return found


def late_records(forecasts: Forecasts, policy: PolicyName = "srtf-aged") -> Sequence[Record]:
    config = sim_mesh(sim_model(slots=16, sim={"base_s": 0.012, "per_token_s": 0.0005}), pool="256MiB")
    records = run_simulation(sketches(), config, forecasts, policy=policy).run.records
    assert all(record.is_ok for record in records), "a request is refused or lost"
    return records[NUM_UNTIL_CHECKED:]


def mean_s(records: Sequence[Record]) -> float:
    return fmean(record.e2el_s for record in records)


@functools.cache
def hrrn_mean_s() -> float:
    """Mean latency of HRRN with equal work, which is order of arrival."""
    return mean_s(late_records(ConstantLengths(), "hrrn"))


@functools.cache
def false_hints() -> Sequence[Record]:
    return late_records(HintingTenant(lambda length: 1))


def advantage_of_b(records: Sequence[Record]) -> float:
    """Tenant b's mean latency over tenant a's."""
    of_a, of_b = ([one for one in records if one.tenant == tenant] for tenant in "ab")
    return mean_s(of_b) / mean_s(of_a)


@pytest.mark.parametrize("kind", USELESS)
def test_a_useless_predictor_costs_no_more_than_hrrn(kind: str) -> None:
    records = late_records(LearnedLengths(CheckedPredictor(ScriptedPredictor(USELESS[kind]))))
    assert mean_s(records) <= 1.05 * hrrn_mean_s()


def test_a_good_predictor_is_better_than_hrrn() -> None:
    records = late_records(LearnedLengths(CheckedPredictor(ScriptedPredictor(float))))
    assert mean_s(records) < 0.8 * hrrn_mean_s()


def test_a_tenant_with_false_hints_gains_nothing() -> None:
    without = advantage_of_b(late_records(LearnedLengths(imprecise())))
    assert advantage_of_b(false_hints()) == pytest.approx(without, rel=0.03)


def test_true_hints_shorten_the_mean_latency() -> None:
    assert mean_s(late_records(HintingTenant(lambda length: length))) < 0.98 * mean_s(false_hints())
