import math
import random
from statistics import NormalDist, fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.predictor.conformal_bound import FIRST_BOUND
from muxmesh.predictor.length_predictor import COLD_TOKENS, Fitted, LengthPredictor, Refit, fit_now
from muxmesh.predictor.rank_correlation import kendall_tau
from tests.support.predictors import prompts_with_lengths, trained_predictor


def observe(predictor: LengthPredictor, prompt: str, num_tokens: int, model: str = "m", censored: bool = False) -> None:
    predictor.observe(predictor.predict(prompt, model), model, num_tokens, censored)


def observe_different_prompts(predictor: LengthPredictor, count: int, num_tokens: int = 50, start: int = 0) -> None:
    for number in range(start, start + count):
        observe(predictor, f"{number} {number * 7} {number * 13}", num_tokens)


def due_fit(predictor: LengthPredictor, seed: int = 1) -> Refit:
    """Observes outputs of random lengths until a fit is due."""
    rng = random.Random(seed)
    while (refit := predictor.refit()) is None:
        observe(predictor, f"Note {rng.random()}", rng.randint(1, 500))
    return refit


def expected_full_length(log_median: float, deviation: float, log_length: float) -> float:
    """Mean of a normal log length above ``log_length``, by numeric integration."""
    normal = NormalDist(log_median, deviation)
    points = np.linspace(log_length, log_median + 12 * deviation, 20_001)
    density = np.array([normal.pdf(point) for point in points])
    return float((density * points).sum() / density.sum())


# Predictions


def test_before_the_first_output_the_prediction_is_cold() -> None:
    raw = LengthPredictor().predict("Hello", "m")
    assert (raw.source, raw.p50_tokens, raw.bound) == ("cold", COLD_TOKENS, FIRST_BOUND)
    assert raw.p90_tokens == pytest.approx(COLD_TOKENS * math.exp(FIRST_BOUND))


def test_before_the_first_fit_a_new_prompt_is_predicted_at_the_geometric_mean() -> None:
    predictor = LengthPredictor()
    for prompt, length in (("one apple", 10), ("two rivers", 1000)):
        observe(predictor, prompt, length)
    raw = predictor.predict("zebra crossing", "m")
    assert raw.source == "median" and raw.p50_tokens == pytest.approx(100)


def test_a_similar_prompt_is_predicted_near_its_outputs() -> None:
    predictor = LengthPredictor()
    observe_different_prompts(predictor, 10)
    for _ in range(6):
        observe(predictor, "Recite the saga", 2000)
    raw = predictor.predict("recite a SAGA", "m")
    assert raw.source == "retrieved" and 400 < raw.p50_tokens < 2000
    assert raw.log_spread < predictor.predict("zebra crossing", "m").log_spread


def test_prompts_that_were_not_observed_are_ranked() -> None:
    predictor = trained_predictor()
    fresh = prompts_with_lengths(500, seed=9)[300:]
    raws = [predictor.predict(prompt, "m") for prompt, _ in fresh]
    assert {raw.source for raw in raws} <= {"regressed", "retrieved"}
    predicted, actual = [raw.p50_tokens for raw in raws], [length for _, length in fresh]
    assert kendall_tau(np.array(predicted), np.array(actual, float)) > 0.5


@pytest.mark.parametrize("num_equal", [4, 32, 64])
def test_a_burst_after_short_outputs_of_equal_length_leaves_later_predictions_usable(num_equal: int) -> None:
    """The burst is predicted before any of it ends, so its errors are large compared with the spread of the past."""
    predictor = LengthPredictor()
    for number in range(num_equal):
        observe(predictor, f"Name colour {number} {number * 7}", 6)
        fit_now(predictor)
    lengths = prompts_with_lengths(250, seed=6)
    burst = [(predictor.predict(prompt, "m"), length) for prompt, length in lengths[:100]]
    for raw, length in burst:
        predictor.observe(raw, "m", length, False)
        fit_now(predictor)
    predicted, actual = [], [length for _, length in lengths[100:]]
    for prompt, length in lengths[100:]:
        raw = predictor.predict(prompt, "m")
        predicted.append(raw.p50_tokens)
        predictor.observe(raw, "m", length, False)
        fit_now(predictor)
    assert max(predicted) <= 10 * max(actual)
    if num_equal < 32:  # errors of predictions before the first fit say nothing about the regression's median
        assert abs(np.median(np.log(np.array(predicted) / np.array(actual)))) < 0.4
    assert kendall_tau(np.array(predicted), np.array(actual, float)) > 0.3


def test_nine_in_ten_outputs_are_no_longer_than_their_p90() -> None:
    predictor, rng, within = trained_predictor(), random.Random(3), []
    for index, (prompt, length) in enumerate(prompts_with_lengths(1500, seed=4)):
        raw = predictor.predict(f"{prompt} {rng.random()}", "m")
        within += [length <= raw.p90_tokens] if index > 300 else []
        predictor.observe(raw, "m", length, False)
    assert np.mean(within) == pytest.approx(0.9, abs=0.03)


def test_outputs_of_one_model_are_evidence_for_another_with_longer_outputs() -> None:
    predictor = trained_predictor()
    for prompt, length in prompts_with_lengths(60, seed=5):
        observe(predictor, prompt, 4 * length, "chatty")
    known, unknown = "Tell me of the zebra crossing", "Tell me of the zebra finch colony on the western moors"
    for _ in range(4):
        observe(predictor, known, 3000, "m")
    raw = predictor.predict(known, "chatty")
    assert raw.source == "retrieved"
    assert raw.p50_tokens > 2 * predictor.predict(unknown, "chatty").p50_tokens


@pytest.mark.parametrize("num_tokens", [0, 1, 10**12])
def test_extreme_lengths_keep_predictions_finite_and_bounded(num_tokens: int) -> None:
    predictor = LengthPredictor()
    observe_different_prompts(predictor, 20, num_tokens)
    raw = predictor.predict("zebra crossing", "m")
    assert 0 < raw.p50_tokens <= raw.p90_tokens <= 1e6


@pytest.mark.parametrize("text", ["", "\ud800", "x" * 100_000])
def test_any_prompt_can_be_predicted_and_observed(text: str) -> None:
    predictor = LengthPredictor()
    observe(predictor, text, 7)
    assert predictor.predict(text, "m").prompt_hash == predictor.predict(text, "m").prompt_hash
    assert predictor.history.num_rows == 1


# Censored outputs


@pytest.mark.parametrize("num_tokens", [128, 300, 5_000, 100_000])
def test_a_censored_length_counts_as_its_expected_full_length(num_tokens: int) -> None:
    predictor = LengthPredictor()
    observe(predictor, "cold", num_tokens, censored=True)
    ((_, _, ((_, log_length),)),) = predictor.history.dump()[2]["outputs"]
    deviation = math.sqrt(math.pi / 2)  # of a normal variable whose mean absolute error is 1, the cold spread
    assert log_length == pytest.approx(expected_full_length(math.log(128), deviation, math.log(num_tokens)), abs=2e-3)


def test_the_expected_full_length_of_an_extreme_censored_length_is_a_little_longer() -> None:
    predictor = LengthPredictor()
    observe(predictor, "cold", 10**9, censored=True)
    ((_, _, ((_, log_length),)),) = predictor.history.dump()[2]["outputs"]
    assert math.log(10**9) < log_length < math.log(10**9) + 0.3


def test_a_censored_output_counts_as_longer_than_a_whole_one_of_that_length() -> None:
    medians = []
    for censored in (False, True):
        predictor = trained_predictor(100)
        for number in range(40):
            observe(predictor, f"Recite chapter {number} of the saga", 64, censored=censored)
        medians.append(predictor.predict("Recite chapter 99 of the saga", "m").p50_tokens)
    assert medians[1] > medians[0]


def test_an_output_that_was_censored_early_is_not_learned() -> None:
    predictor = trained_predictor(50)
    before = predictor.history.dump()[2], predictor.dump()
    for number in range(50):
        observe(predictor, f"another {number}", 1, censored=True)
    assert (predictor.history.dump()[2], predictor.dump()) == before


@pytest.mark.parametrize(
    ("num_tokens", "censored", "num_p90_scores", "num_p50_scores"),
    [(100, False, 1, 1), (100_000, False, 1, 1), (100, True, 0, 0), (200, True, 0, 1), (100_000, True, 1, 1)],
    ids=["whole", "whole, long", "under the median", "over the median", "over p90"],
)
def test_a_censored_length_is_a_score_only_of_the_bounds_that_it_exceeds(
    num_tokens: int, censored: bool, num_p90_scores: int, num_p50_scores: int
) -> None:
    predictor = LengthPredictor()
    observe(predictor, "cold", num_tokens, censored=censored)
    median_shift = predictor.dump()["median_shifts"].get("m", {"scores": []})
    assert (len(predictor.conformal.scores), len(median_shift["scores"])) == (num_p90_scores, num_p50_scores)


def test_the_median_of_a_model_whose_long_outputs_are_censored_is_not_underestimated() -> None:
    """Half of the outputs reach the cap, which is their median."""
    predictor, rng, medians = LengthPredictor(), random.Random(2), []
    for number in range(600):
        raw = predictor.predict(f"prompt {number}", "m")
        medians.append(raw.p50_tokens)
        length = math.exp(rng.gauss(4, 1))
        predictor.observe(raw, "m", round(min(length, math.exp(4))), length > math.exp(4))
    assert np.median(medians[300:]) == pytest.approx(math.exp(4), rel=0.15)


# Bounds


def test_p50_of_skewed_lengths_is_their_median_and_not_their_geometric_mean() -> None:
    predictor, rng = LengthPredictor(), random.Random(6)
    for number in range(800):
        length = 10 if rng.random() < 0.7 else 1000
        observe(predictor, f"{number} {number * 7} {number * 13}", round(length * rng.lognormvariate(0, 0.3)))
    raw = predictor.predict("zebra crossing", "m")
    assert raw.median_shift < 0 and raw.p50_tokens == pytest.approx(12, rel=0.3)
    assert math.exp(predictor.history.scale("m")[0]) == pytest.approx(40, rel=0.2)


def test_a_fit_that_runs_while_the_state_is_dumped_is_due_again_when_it_is_loaded() -> None:
    predictor, other = LengthPredictor(), LengthPredictor()
    observe_different_prompts(predictor, 40)
    assert predictor.refit() is not None
    other.history.load(*predictor.history.dump())
    other.load(predictor.dump(), predictor.fit)
    assert other.refit() is not None


# Tenants


def test_outputs_of_similar_prompts_are_those_of_the_same_tenant() -> None:
    predictor = trained_predictor(100)
    for _ in range(3):
        raw = predictor.predict("recite a saga", "m", "a")
        predictor.observe(raw, "m", 5000, False)
    own, other, nobody = (predictor.predict("recite a saga", "m", tenant) for tenant in ("a", "b", ""))
    assert (own.source, other.source, nobody.source) == ("retrieved", "regressed", "regressed")
    assert own.p50_tokens > 2 * other.p50_tokens == 2 * nobody.p50_tokens


def test_the_regression_does_not_reproduce_the_length_of_a_prompt_that_only_another_tenant_asked() -> None:
    predictor = trained_predictor(200)
    for number in range(40):
        observe(predictor, f"Yes or no: is {number} even?", 4)
    for _ in range(40):
        predictor.observe(predictor.predict("Yes or no: is 7777 even?", "m", "a"), "m", 5000, False)
        fit_now(predictor)
    own, other = (predictor.predict("Yes or no: is 7777 even?", "m", tenant) for tenant in ("a", "b"))
    assert own.p50_tokens > 1000 and other.p50_tokens < 100


def test_a_few_outputs_of_another_tenant_are_shown_to_nobody_else() -> None:
    predictor = LengthPredictor()
    for number in range(8):
        own, other, nobody = (predictor.predict("zebra crossing", "m", tenant) for tenant in ("a", "b", ""))
        assert other.p50_tokens == nobody.p50_tokens == COLD_TOKENS and other.source == nobody.source == "cold"
        assert own.source == ("cold" if number == 0 else "median")
        predictor.observe(predictor.predict(f"{number} {number * 7}", "m", "a"), "m", 3, False)
    assert predictor.predict("zebra crossing", "m", "b").source == "median"


def test_the_same_prompt_of_two_tenants_has_two_rows() -> None:
    predictor = LengthPredictor()
    for tenant in ("a", "b", "a", ""):
        predictor.observe(predictor.predict("recite", "m", tenant), "m", 50, False)
    assert predictor.history.num_rows == 3


# Fits


def test_the_first_fit_is_due_after_32_outputs() -> None:
    predictor = LengthPredictor()
    observe_different_prompts(predictor, 31)
    assert predictor.refit() is None
    observe_different_prompts(predictor, 1, start=31)
    assert predictor.refit() is not None


def test_no_fit_is_due_while_one_runs_and_one_that_failed_is_counted() -> None:
    predictor = LengthPredictor()
    observe_different_prompts(predictor, 32)
    refit = predictor.refit()
    observe_different_prompts(predictor, 100, start=32)
    assert refit is not None and predictor.refit() is None
    assert not predictor.publish(None)
    assert (predictor.num_rejected, predictor.num_published) == (1, 0)
    assert predictor.refit() is not None


def test_refits_become_rarer_as_more_is_known() -> None:
    predictor, num_fits = LengthPredictor(), []
    for round_ in range(4):
        observe_different_prompts(predictor, 400, start=400 * round_)
        before = predictor.num_published
        for start in range(0, 400, 8):
            observe_different_prompts(predictor, 8, start=start)
            if (refit := predictor.refit()) is not None:
                predictor.publish(Fitted(FIT, refit.num_rows, 1.0, 1.0, 16))
        num_fits.append(predictor.num_published - before)
    assert num_fits == sorted(num_fits, reverse=True) and num_fits[-1] < num_fits[0]


def test_fit_now_without_a_due_fit_does_nothing() -> None:
    predictor = LengthPredictor()
    fit_now(predictor)
    assert (predictor.num_published, predictor.num_rejected) == (0, 0)


def test_the_first_fit_is_published_whatever_it_ranks() -> None:
    fitted = due_fit(LengthPredictor()).run()
    assert (fitted.tau, fitted.published_tau) == (1.0, 0.0)


FIT = due_fit(LengthPredictor()).run().fit


@pytest.mark.parametrize(
    ("tau", "num_held_out", "is_published"),
    [
        (0.6, 1000, True),
        (0.49, 1000, True),
        (0.47, 1000, False),
        (-1.0, 1000, False),
        (0.35, 16, True),
        (0.3, 16, False),
    ],
)
def test_a_fit_is_published_unless_it_ranks_worse_by_more_than_the_tolerance(
    tau: float, num_held_out: int, is_published: bool
) -> None:
    predictor = LengthPredictor()
    observe_different_prompts(predictor, 5)
    fitted = Fitted(FIT, 32, tau=tau, published_tau=0.5, num_held_out=num_held_out)
    assert predictor.publish(fitted) is is_published
    assert (predictor.num_published, predictor.num_rejected) == (int(is_published), int(not is_published))
    assert predictor.predict("zebra crossing", "m").source == ("regressed" if is_published else "median")


def test_a_fit_is_compared_on_prompts_that_neither_has_seen() -> None:
    predictor = trained_predictor()
    fitted = due_fit(predictor).run()  # nothing predicts these lengths: only a fit that has seen them would rank them
    assert abs(fitted.tau) < 0.45 and abs(fitted.published_tau) < 0.45


def test_fits_are_published_where_each_prompt_has_outputs_of_many_models() -> None:
    predictor, rng = LengthPredictor(), random.Random(2)
    for prompt, length in prompts_with_lengths(200, seed=3):
        raws = [(model, predictor.predict(prompt, model)) for model in "abcdefgh"]
        for model, raw in raws:
            predictor.observe(raw, model, max(1, round(length * rng.lognormvariate(0, 0.2))), False)
        fit_now(predictor)
    assert predictor.num_published > 2 * predictor.num_rejected


def test_a_fit_learns_from_the_latest_rows_only() -> None:
    predictor = LengthPredictor(fit_rows=64)
    observe_different_prompts(predictor, 100)
    refit = predictor.refit()
    assert refit is not None and len(refit.examples) == 64 and refit.num_rows == refit.num_new == 100


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3000), st.booleans()), max_size=30))
def test_predictions_are_lengths_whatever_was_observed(outputs: list[tuple[str, int, bool]]) -> None:
    predictor = LengthPredictor(capacity=4)
    for prompt, num_tokens, censored in outputs:
        observe(predictor, prompt * 3, num_tokens, censored=censored)
    raws = [predictor.predict(prompt * 3, "m") for prompt in "abcd"]
    assert all(0 < raw.p50_tokens <= 1e6 and 0 < raw.p90_tokens <= 1e6 and raw.log_spread > 0 for raw in raws)
    assert fmean(raw.bound for raw in raws) == predictor.conformal.bound
