import math
import random

import numpy as np
import pytest

from muxmesh.errors import ConfigError
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from muxmesh.predictor.rank_correlation import kendall_tau
from muxmesh.types import LengthPrediction
from simulator.forecasts import ForecastInput, Forecasts, LearnedLengths, NoisyLengths, TrueLengths
from tests.support.predictors import ScriptedPredictor, prompts_with_lengths


def lengths(count: int = 1500) -> list[int]:
    rng = random.Random(1)
    return [max(1, round(rng.lognormvariate(5, 1))) for _ in range(count)]


def predict(forecasts: Forecasts, length: int, text: str | None = None) -> LengthPrediction:
    return forecasts.forecast(ForecastInput(text, "m", "", length))[0]


def test_true_lengths_are_certain() -> None:
    prediction, source, _ = TrueLengths().forecast(ForecastInput("x", "m", "t", 37))
    assert (prediction, source) == (LengthPrediction(37, 37), "fixed")


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 1.0])
def test_noisy_lengths_rank_with_the_given_tau(tau: float) -> None:
    truth = lengths()
    forecasts = NoisyLengths(tau, truth, seed=2)
    medians = [predict(forecasts, length).p50_tokens for length in truth]
    assert kendall_tau(np.array(medians), np.array(truth, float)) == pytest.approx(tau, abs=0.04)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6])
def test_half_of_noisy_lengths_are_within_their_p50_and_nine_in_ten_within_their_p90(tau: float) -> None:
    truth = lengths(4000)
    forecasts = NoisyLengths(tau, truth, seed=3)
    predictions = [predict(forecasts, length) for length in truth]
    pairs = list(zip(truth, predictions, strict=True))
    assert np.mean([length <= one.p50_tokens for length, one in pairs]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([length <= one.p90_tokens for length, one in pairs]) == pytest.approx(0.9, abs=0.02)


def test_noisy_lengths_with_tau_1_are_the_true_lengths() -> None:
    truth = lengths(50)
    forecasts = NoisyLengths(1.0, truth, seed=2)
    for length in truth:
        prediction = predict(forecasts, length)
        assert prediction.p50_tokens == pytest.approx(length) and prediction.p90_tokens == pytest.approx(length)


def test_noisy_lengths_with_tau_0_are_all_the_geometric_mean() -> None:
    forecasts = NoisyLengths(0.0, [10, 1000], seed=2)
    assert [predict(forecasts, length).p50_tokens for length in (10, 1000)] == pytest.approx([100, 100])


def test_noisy_lengths_of_one_length_are_that_length() -> None:
    prediction = predict(NoisyLengths(0.5, [40, 40, 40], seed=1), 40)
    assert prediction.p50_tokens == pytest.approx(40) and prediction.p90_tokens == pytest.approx(40)


def test_noisy_lengths_depend_on_the_seed_only() -> None:
    def medians(seed: int) -> list[float]:
        forecasts = NoisyLengths(0.5, lengths(20), seed)
        return [predict(forecasts, length).p50_tokens for length in lengths(20)]

    assert medians(1) == medians(1) != medians(2)


@pytest.mark.parametrize("tau", [-0.1, 1.5, math.nan])
def test_a_tau_outside_0_and_1_is_rejected(tau: float) -> None:
    with pytest.raises(ConfigError, match=f"--tau: is {tau}"):
        NoisyLengths(tau, [1, 2], seed=0)


def test_learned_lengths_learn_each_output_and_are_refitted() -> None:
    predictor = LengthPredictor()
    forecasts = LearnedLengths(CheckedPredictor(predictor))
    sources = []
    for prompt, length in prompts_with_lengths(60):
        _, source, forecast = forecasts.forecast(ForecastInput(prompt, "m", "", length))
        forecasts.observe(forecast, length, False)
        sources.append(source)
    assert sources[0] == "cold" and sources[-1] in {"regressed", "retrieved"}
    assert predictor.history.num_observed == 60 and predictor.num_published == 1


def test_learned_lengths_do_not_know_the_true_length() -> None:
    forecasts = LearnedLengths(CheckedPredictor(LengthPredictor()))
    assert predict(forecasts, 5, "x") == predict(forecasts, 5000, "x") == predict(forecasts, 5000, None)


def test_learned_lengths_use_the_hints_of_a_tenant() -> None:
    forecasts = LearnedLengths(CheckedPredictor(ScriptedPredictor(lambda truth: 50.0)))
    for length in range(100, 130):
        _, source, forecast = forecasts.forecast(ForecastInput("1", "m", "t", length, hint_tokens=length))
        forecasts.observe(forecast, length, False)
    assert source == "hint"


def test_learned_lengths_pass_on_that_an_output_was_censored() -> None:
    checked = CheckedPredictor(ScriptedPredictor(float))
    forecasts = LearnedLengths(checked)
    forecasts.observe(forecasts.forecast(ForecastInput("9", "m", "", 9))[2], 9, True)
    assert checked.mean_prediction("m").p50_tokens == 128
    forecasts.observe(forecasts.forecast(ForecastInput("9", "m", "", 9))[2], 9, False)
    assert checked.mean_prediction("m").p50_tokens == pytest.approx(9)


def test_a_forecast_of_another_source_is_ignored() -> None:
    predictor = ScriptedPredictor(float)
    LearnedLengths(CheckedPredictor(predictor)).observe(None, 9, False)
    assert predictor.num_observed == 0
