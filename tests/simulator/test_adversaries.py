"""Predictors that are of no use, and tenants that lie, in virtual time: what they cost and what they gain."""

import math
import random
from collections.abc import Callable, Sequence
from statistics import fmean

import pytest

from loadtest.record import Record
from loadtest.workload import Body, Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import Fitted, Guess, Refit
from muxmesh.predictor.prompt_features import Reader
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import LengthPrediction
from simulator.forecasts import Asked, Forecasts, Learned
from simulator.run import simulate

NUM_REQUESTS, NUM_UNTIL_TRIPPED = 2500, 700
READING = Reader().read("x")


class Says:
    """A predictor whose guess is a function of the true length, which the prompt tells."""

    def __init__(self, guess: Callable[[int], float]) -> None:
        self._guess = guess

    def predict(self, text: str, model: str) -> Guess:
        tokens = self._guess(int(text))
        return Guess(tokens, 2 * tokens, "regressed", READING, 0, 1.0, 1.6)

    def observe(self, guess: Guess, model: str, num_tokens: int, censored: bool) -> None:
        """Learns nothing."""

    def refit(self) -> Refit | None:
        """Never."""
        return None

    def publish(self, fitted: Fitted | None) -> bool:
        """Never called."""
        return True


class Constant:
    """All answers are expected to be equally long."""

    def ask(self, asked: Asked) -> tuple[LengthPrediction, str, object]:
        """See `Forecasts`."""
        return LengthPrediction(60, 120), "constant", None

    def observe(self, memory: object, num_output: int, censored: bool) -> None:
        """See `Forecasts`."""


def sketches(seed: int = 0, rate: float = 11.0) -> list[Sketch]:
    rng, at_s, found = random.Random(seed), 0.0, []
    for index in range(NUM_REQUESTS):
        at_s += rng.expovariate(rate)
        length = min(600, max(1, round(rng.lognormvariate(4, 0.9))))
        body = Body(str(length), 20, length)
        found.append(Sketch(index, at_s, body, 600, False, 0, None, "ab"[index % 2], 0))
    return found


def run(forecasts: Forecasts, policy: PolicyName) -> Sequence[Record]:
    model = {"name": "m", "engine": "sim", "max_num_seqs": 16, "sim": {"base_s": 0.012, "per_token_s": 0.0005}}
    config = MeshConfig.model_validate({"units": [{"kv_pool": "256MiB", "models": [model]}]})
    records = simulate(config, {"m": SIM_SPEC}, sketches(), forecasts, policy).run.records
    assert all(record.is_ok for record in records), "nobody is refused or lost"
    return records


def late_mean_s(records: Sequence[Record]) -> float:
    return fmean(record.e2el_s for record in records[NUM_UNTIL_TRIPPED:])


def crash(length: int) -> float:
    raise RuntimeError("no guess today")


RNG = random.Random(3)
USELESS: dict[str, Callable[[int], float]] = {
    "always 1": lambda length: 1.0,
    "huge": lambda length: 1e300,
    "random": lambda length: RNG.lognormvariate(4, 2),
    "NaN": lambda length: math.nan,
    "crashing": crash,
}


@pytest.mark.parametrize("kind", USELESS)
def test_behind_the_floor_a_useless_predictor_is_as_good_as_hrrn(kind: str) -> None:
    reference = late_mean_s(run(Constant(), "hrrn"))
    assert late_mean_s(run(Learned(CheckedPredictor(Says(USELESS[kind]))), "srtf-aged")) == pytest.approx(
        reference, rel=0.05
    )


def test_a_good_predictor_is_better_than_hrrn() -> None:
    """So that the comparison above can tell the difference."""
    reference = late_mean_s(run(Constant(), "hrrn"))
    assert late_mean_s(run(Learned(CheckedPredictor(Says(float))), "srtf-aged")) < 0.8 * reference


def imprecise() -> CheckedPredictor:
    rng = random.Random(5)
    return CheckedPredictor(Says(lambda length: length**0.7 * 4 * rng.lognormvariate(0, 0.7)))


class Hinting(Learned):
    """Tenant b sends hints."""

    def __init__(self, hint: Callable[[int], int]) -> None:
        super().__init__(imprecise())
        self._hint = hint

    def ask(self, asked: Asked) -> tuple[LengthPrediction, str, object]:
        """See `Forecasts`."""
        hint = self._hint(asked.num_output) if asked.tenant == "b" else None
        hinted = Asked(asked.text, asked.model, asked.tenant, asked.num_output, hint)
        return super().ask(hinted)


def share_of_b(records: Sequence[Record]) -> float:
    """Tenant b's mean latency over tenant a's."""
    late = records[NUM_UNTIL_TRIPPED:]
    return fmean(r.e2el_s for r in late if r.tenant == "b") / fmean(r.e2el_s for r in late if r.tenant == "a")


def test_a_tenant_that_lies_gains_nothing_over_time() -> None:
    without = share_of_b(run(Learned(imprecise()), "srtf-aged"))
    assert share_of_b(run(Hinting(lambda length: 1), "srtf-aged")) == pytest.approx(without, rel=0.03)


def test_a_tenant_that_tells_the_truth_is_believed() -> None:
    lying = late_mean_s(run(Hinting(lambda length: 1), "srtf-aged"))
    assert late_mean_s(run(Hinting(lambda length: length), "srtf-aged")) < 0.98 * lying
