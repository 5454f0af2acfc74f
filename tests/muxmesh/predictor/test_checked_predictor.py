import copy
import json
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.conformal_bound import FIRST_BOUND
from muxmesh.predictor.length_predictor import Fitted, LengthPredictor, RawPrediction, Refit
from muxmesh.types import LengthPrediction
from tests.support.predictors import FEATURES, ScriptedPredictor, crash

DEFAULT_FACTOR = math.exp(FIRST_BOUND * math.sqrt(0.7))
"""p90 over p50 of a forecast at the mean length."""
RNG = random.Random(5)
USELESS: dict[str, Callable[[float], float]] = {
    "one": lambda truth: 1.0,
    "huge": lambda truth: 1e300,
    "random": lambda truth: RNG.lognormvariate(4, 1),
    "reversed": lambda truth: 1e6 / truth,
}


class FixedPredictor(ScriptedPredictor):
    """Always returns the same prediction."""

    def __init__(self, p50_tokens: float, p90_tokens: float, source: str = "regressed") -> None:
        super().__init__(float)
        self.raw = RawPrediction(p50_tokens, p90_tokens, source, FEATURES, 0, 1.0, 1.6)

    def predict(self, text: str, model: str, tenant: str = "") -> RawPrediction:
        return self.raw


class BrokenLearner(ScriptedPredictor):
    """Predicts well, and raises whenever it should learn."""

    def __init__(self) -> None:
        super().__init__(float)

    def observe(self, raw: RawPrediction, model: str, num_tokens: int, censored: bool) -> None:
        raise ValueError("observe")

    def refit(self) -> Refit | None:
        raise MemoryError

    def publish(self, fitted: Fitted | None) -> bool:
        raise ZeroDivisionError


def run(
    checked: CheckedPredictor, count: int, tenant: str = "", hint: Callable[[int], int] | None = None, model: str = "m"
) -> list[str]:
    """Predicts and observes outputs whose prompts are their lengths; returns the sources of the predictions."""
    rng, sources = random.Random(0), []
    for _ in range(count):
        truth = max(1, round(math.exp(rng.gauss(4, 1))))
        found = checked.predict(str(truth), model, tenant, hint(truth) if hint else None)
        assert math.isfinite(found.prediction.p50_tokens)
        assert 0 < found.prediction.p50_tokens <= found.prediction.p90_tokens
        checked.observe(found, truth, False)
        sources.append(found.source)
    return sources


def observe(checked: CheckedPredictor, length: int, times: int = 1, model: str = "m", censored: bool = False) -> None:
    for _ in range(times):
        checked.observe(checked.predict(str(length), model), length, censored)


def imprecise() -> CheckedPredictor:
    rng = random.Random(8)
    return CheckedPredictor(ScriptedPredictor(lambda truth: truth**0.5 * 8 * rng.lognormvariate(0, 1)))


def exact() -> CheckedPredictor:
    return CheckedPredictor(ScriptedPredictor(float))


# Values


def test_a_usable_prediction_is_passed_on() -> None:
    checked = exact()
    found = checked.predict("70", "m", "tenant", None)
    assert found.prediction == LengthPrediction(70, 140)
    assert (found.source, found.model, found.tenant, found.hint_tokens) == ("regressed", "m", "tenant", None)
    assert found.raw is not None and checked.num_failures == 0


@pytest.mark.parametrize(
    ("raw", "expected"),
    [((50.0, 20.0), (50, 50)), ((2e6, 3e6), (1e6, 1e6)), ((10.0, 1e300), (10, 1e6)), ((1e-9, 1.0), (1e-9, 1.0))],
)
def test_a_prediction_is_limited_to_a_million_tokens_and_its_p90_to_at_least_its_p50(
    raw: tuple[float, float], expected: tuple[float, float]
) -> None:
    assert CheckedPredictor(FixedPredictor(*raw)).predict("x", "m").prediction == LengthPrediction(*expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -5.0])
def test_a_prediction_that_is_no_length_is_replaced_by_the_mean_length(bad: float) -> None:
    predictor = ScriptedPredictor(float)
    checked = CheckedPredictor(predictor)
    run(checked, 100)
    predictor.median = lambda truth: bad
    assert set(run(checked, 100)) == {"failed"}
    assert checked.num_failures == 100
    assert checked.predict("7", "m").prediction.p50_tokens == pytest.approx(math.exp(4), rel=0.3)


def test_a_prediction_whose_p90_is_no_length_is_replaced() -> None:
    assert CheckedPredictor(FixedPredictor(10.0, float("nan"))).predict("x", "m").source == "failed"


@pytest.mark.parametrize("value", [None, "many", 7])
def test_a_value_that_is_no_prediction_is_replaced(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = ScriptedPredictor(float)
    monkeypatch.setattr(predictor, "predict", lambda text, model: value)
    assert set(run(CheckedPredictor(predictor), 10)) == {"failed"}


def test_while_the_predictor_fails_all_forecasts_of_a_model_are_equal() -> None:
    checked = CheckedPredictor(ScriptedPredictor(crash))
    lengths = set()
    for truth in range(1, 300):
        found = checked.predict("x", "m")
        lengths.add(found.prediction.p50_tokens)
        checked.observe(found, truth, False)
    assert len(lengths) == 1


def test_a_later_failure_is_forecast_at_the_mean_length_of_its_time() -> None:
    predictor = ScriptedPredictor(crash)
    checked = CheckedPredictor(predictor)
    assert checked.predict("x", "m").prediction.p50_tokens == 128
    predictor.median = float
    observe(checked, 1000, times=200)
    predictor.median = crash
    assert checked.predict("x", "m").prediction.p50_tokens == pytest.approx(1000)


def test_nothing_raises_when_the_predictor_does() -> None:
    checked = CheckedPredictor(BrokenLearner())
    observe(checked, 40, times=2)
    assert checked.refit() is None and checked.publish(None) is False
    assert checked.num_failures == 4 and checked.predict("40", "m").source == "regressed"


def test_failures_are_logged_at_powers_of_two(caplog: pytest.LogCaptureFixture) -> None:
    run(CheckedPredictor(ScriptedPredictor(crash)), 10)
    assert [record.getMessage() for record in caplog.records] == [
        f"the length predictor failed while predicting (failure {number})" for number in (1, 2, 4, 8)
    ]
    assert all(record.exc_info for record in caplog.records)


# Mean length


def test_the_mean_prediction_is_the_geometric_mean_length_with_the_default_spread() -> None:
    checked = exact()
    assert checked.mean_prediction("m") == LengthPrediction(128, 128 * DEFAULT_FACTOR)
    observe(checked, 10)
    observe(checked, 1000)
    found = checked.mean_prediction("m")
    assert found.p50_tokens == pytest.approx(100) and found.p90_tokens == pytest.approx(100 * DEFAULT_FACTOR)
    assert checked.mean_prediction("other").p50_tokens == 128


def test_censored_outputs_do_not_count_for_the_mean_length() -> None:
    checked = exact()
    observe(checked, 10)
    observe(checked, 1000, times=5, censored=True)
    assert checked.mean_prediction("m").p50_tokens == pytest.approx(10)


def test_the_mean_prediction_is_the_forecast_that_is_used_when_predictions_do_not_rank() -> None:
    checked = CheckedPredictor(ScriptedPredictor(USELESS["one"]))
    run(checked, 200)
    assert checked.mean_prediction("m") == checked.predict("7", "m").prediction


# Ranks


@pytest.mark.parametrize("kind", USELESS)
def test_predictions_that_do_not_rank_are_not_used(kind: str) -> None:
    checked = CheckedPredictor(ScriptedPredictor(USELESS[kind]))
    sources = run(checked, 600)
    assert set(sources[-100:]) == {"floor"} and not checked.is_ranking("m")
    constants = {checked.predict(str(truth), "m").prediction.p50_tokens for truth in (1, 50, 4000)}
    assert len(constants) == 1


def test_a_good_predictor_stays_in_use() -> None:
    rng = random.Random(8)
    checked = CheckedPredictor(ScriptedPredictor(lambda truth: truth * rng.lognormvariate(0, 1)))
    assert set(run(checked, 1000)) == {"regressed"}
    assert (checked.tau("m") or 0) > 0.3


def test_a_predictor_that_ranks_again_is_used_again() -> None:
    predictor = ScriptedPredictor(USELESS["one"])
    checked = CheckedPredictor(predictor)
    run(checked, 200)
    predictor.median = float
    assert run(checked, 400)[-1] == "regressed" and predictor.num_observed == 600


def test_both_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    predictor = ScriptedPredictor(USELESS["one"])
    checked = CheckedPredictor(predictor)
    run(checked, 300)
    predictor.median = float
    run(checked, 400)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("predictions do not rank (tau 0.00)") and second.startswith("predictions rank again")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_predictions_are_used_until_100_outputs_are_known() -> None:
    checked = CheckedPredictor(ScriptedPredictor(USELESS["one"]))
    assert set(run(checked, 99)) == {"regressed"} and checked.tau("m") is None
    run(checked, 1)
    assert checked.tau("m") == 0.0 and not checked.is_ranking("m")


def test_a_floor_below_every_tau_uses_all_predictions() -> None:
    checked = CheckedPredictor(ScriptedPredictor(USELESS["reversed"]), floor_tau=-2.0)
    assert set(run(checked, 300)) == {"regressed"} and (checked.tau("m") or 0) < -0.9


def test_censored_outputs_are_no_evidence_about_ranks() -> None:
    checked = CheckedPredictor(ScriptedPredictor(USELESS["one"]))
    observe(checked, 50, times=300, censored=True)
    assert checked.is_ranking("m") and checked.tau("m") is None


@pytest.mark.parametrize("source", ["cold", "median"])
def test_predictions_at_the_mean_length_are_no_evidence_about_ranks(source: str) -> None:
    checked = CheckedPredictor(FixedPredictor(100.0, 200.0, source))
    assert set(run(checked, 300)) == {source} and checked.tau("m") is None


def test_ranks_are_checked_for_each_model() -> None:
    checked = exact()
    run(checked, 200)
    for truth in range(1, 200):
        checked.observe(checked.predict(str(10_000 - truth), "other"), truth, False)
    assert checked.is_ranking("m") and not checked.is_ranking("other")


# Hints


def test_accurate_hints_are_used() -> None:
    checked = imprecise()
    run(checked, 30, tenant="honest", hint=lambda truth: truth)
    found = checked.predict("9", "m", "honest", 900)
    assert found.source == "hint"
    assert found.prediction.p50_tokens == pytest.approx(900, rel=0.25)


def test_a_hint_and_a_prediction_are_weighed_by_their_inverse_variances() -> None:
    checked = CheckedPredictor(FixedPredictor(100.0, 300.0), floor_tau=-2.0)
    for _ in range(400):  # errors of the logarithm: 1 of the predictions, 0.5 of the hints
        checked.observe(checked.predict("x", "m", "t", round(100 * math.exp(0.5))), round(100 * math.e), False)
    weight = 1 / (1 + 0.5**2)
    found = checked.predict("x", "m", "t", 800).prediction
    assert found.p50_tokens == pytest.approx(100 * 8**weight, rel=0.02)
    assert found.p90_tokens / found.p50_tokens == pytest.approx(3)


def test_false_hints_gain_nothing() -> None:
    checked = imprecise()
    run(checked, 30, tenant="liar", hint=lambda truth: 1)
    with_hint, without = checked.predict("90", "m", "liar", 1), checked.predict("90", "m")
    assert with_hint.source == "regressed"
    assert with_hint.prediction.p50_tokens / without.prediction.p50_tokens > 0.02  # the predictor is noisy
    assert "hint" not in run(checked, 200, tenant="liar", hint=lambda truth: 1)


def test_a_tenant_whose_hints_become_false_loses_its_weight() -> None:
    checked = imprecise()
    run(checked, 30, tenant="t", hint=lambda truth: truth)
    sources = run(checked, 60, tenant="t", hint=lambda truth: 1)
    assert sources[0] == "hint" and sources.index("regressed") <= 10
    assert "hint" not in sources[10:]


def test_a_censored_output_longer_than_its_hint_is_evidence_against_the_hint() -> None:
    checked = imprecise()
    run(checked, 30, tenant="t", hint=lambda truth: truth)
    for _ in range(10):
        checked.observe(checked.predict("800", "m", "t", 1), 800, True)
    assert checked.predict("800", "m", "t", 1).source == "regressed"


def test_a_censored_output_shorter_than_its_hint_is_no_evidence() -> None:
    checked = imprecise()
    run(checked, 30, tenant="t", hint=lambda truth: truth)
    for _ in range(10):
        checked.observe(checked.predict("800", "m", "t", 900), 1, True)
    assert checked.predict("800", "m", "t", 900).source == "hint"


def test_the_first_four_hints_of_a_tenant_are_not_used() -> None:
    sources = run(imprecise(), 5, tenant="new", hint=lambda truth: truth)
    assert sources == ["regressed"] * 4 + ["hint"]


def test_the_accuracy_of_one_tenant_gives_no_weight_to_another() -> None:
    checked = imprecise()
    run(checked, 30, tenant="honest", hint=lambda truth: truth)
    assert checked.predict("9", "m", "other", 900).source == "regressed"


@pytest.mark.parametrize(("median", "count"), [(USELESS["one"], 200), (crash, 30)], ids=["floor", "failed"])
def test_an_accurate_hint_is_used_though_predictions_are_not(median: Callable[[float], float], count: int) -> None:
    checked = CheckedPredictor(ScriptedPredictor(median))
    run(checked, count, tenant="t", hint=lambda truth: truth)
    found = checked.predict("9", "m", "t", 900)
    assert found.source == "hint" and found.prediction.p50_tokens == pytest.approx(900, rel=0.01)
    assert found.prediction.p90_tokens == pytest.approx(found.prediction.p50_tokens * DEFAULT_FACTOR)


def test_a_hint_of_zero_tokens_is_ignored() -> None:
    checked = exact()
    for _ in range(10):
        checked.observe(checked.predict("50", "m", "t", 0), 50, False)
    assert checked.dump()["hint_errors"] == {}


def test_the_tenant_without_a_hint_for_longest_is_evicted() -> None:
    checked = exact()
    found = {tenant: checked.predict("5", "m", tenant, 5) for tenant in map(str, range(10_001))}
    for tenant in map(str, range(10_000)):
        checked.observe(found[tenant], 5, False)
    checked.observe(found["0"], 5, False)
    checked.observe(found["10000"], 5, False)
    tenants = checked.dump()["hint_errors"]
    assert len(tenants) == 10_000 and "0" in tenants and "1" not in tenants


# State


def test_a_loaded_state_continues_as_the_dumped_one() -> None:
    saved = CheckedPredictor(ScriptedPredictor(USELESS["one"]))
    run(saved, 150, tenant="t", hint=lambda truth: truth)
    run(saved, 50, model="other")
    loaded = CheckedPredictor(ScriptedPredictor(USELESS["one"]))
    loaded.load(json.loads(json.dumps(saved.dump())))
    assert json.dumps(loaded.dump()) == json.dumps(saved.dump())
    assert loaded.tau("m") == saved.tau("m") and not loaded.is_ranking("m") and loaded.is_ranking("other")
    assert loaded.mean_prediction("other") == saved.mean_prediction("other")
    assert loaded.predict("9", "m", "t", 900).prediction == saved.predict("9", "m", "t", 900).prediction


BAD_STATES: dict[str, tuple[str, Any]] = {
    "no fields": ("models", {"m": None}),
    "no models": ("models", None),
    "text": ("constant_tokens", "40"),
    "nan": ("constant_tokens", math.nan),
    "zero": ("constant_tokens", 0),
    "negative": ("constant_tokens", -3.0),
    "infinite": ("variance", math.inf),
    "two statistics": ("stats", [1, 1]),
    "negative variance": ("stats", [1, 1, -1]),
    "a text among lengths": ("predicted", ["1"]),
    "no length": ("actual", [None]),
    "a tenant without count": ("hint_errors", {"t": 3}),
    "an infinite error": ("hint_errors", {"t": [math.inf, 3]}),
}


@pytest.mark.parametrize(("name", "value"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_state_that_is_not_a_dumped_one_is_rejected_and_changes_nothing(name: str, value: Any) -> None:
    checked = exact()
    run(checked, 20, tenant="t", hint=lambda truth: truth)
    before, state = checked.dump(), copy.deepcopy(checked.dump())
    into = state if name in state else state["models"]["m"]
    assert name in into
    into[name] = value
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        checked.load(state)
    assert checked.dump() == before


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "t"]), st.integers(0, 5000), st.none() | st.integers(1, 2_000_000), st.booleans()
        ),
        max_size=40,
    )
)
def test_predictions_are_lengths_whatever_was_observed(outputs: list[tuple[str, int, int | None, bool]]) -> None:
    checked = CheckedPredictor(LengthPredictor(capacity=8))
    for tenant, num_tokens, hint_tokens, censored in outputs:
        found = checked.predict("a prompt", "m", tenant, hint_tokens)
        assert 0 < found.prediction.p50_tokens <= found.prediction.p90_tokens < math.inf
        checked.observe(found, num_tokens, censored)
    assert checked.num_failures == 0
