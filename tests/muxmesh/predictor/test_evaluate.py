import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.clock import ManualClock
from muxmesh.predictor.checked_predictor import CheckedPrediction
from muxmesh.predictor.evaluate import Item, Outcome, replay, report, tau
from muxmesh.predictor.length_predictor import COLD_TOKENS, LengthPredictor, RawPrediction
from muxmesh.types import LengthPrediction
from tests.support.predictors import prompts_with_lengths


def outcome(num_tokens: int, censored: bool = False, p50_tokens: float = 50.0, **fields: Any) -> Outcome:
    item = Item("a", fields.get("model", "m"), num_tokens, fields.get("task", ""), censored)
    prediction, source = LengthPrediction(p50_tokens, 100.0), fields.get("source", "regressed")
    return Outcome(
        item, CheckedPrediction(prediction, source, item.model, "", None, None), fields.get("seconds", 0.001)
    )


def late_report(*late: Outcome) -> dict[str, Any]:
    """The report of which these outcomes are the last half."""
    return report([outcome(7)] * len(late) + list(late))


class SlowPredictor(LengthPredictor):
    """Each prediction takes a quarter of a second."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    def predict(self, text: str, model: str, tenant: str = "") -> RawPrediction:
        self._clock.advance(0.25)
        return super().predict(text, model, tenant)


# Replay


def test_consecutive_outputs_of_a_prompt_are_predicted_before_one_is_learned() -> None:
    items = [Item("p", model, 500) for model in "abc"] + [Item("q", "a", 500), Item("p", "d", 500)]
    outcomes = replay(items, ManualClock())
    assert [one.item for one in outcomes] == items
    assert [one.checked.source for one in outcomes] == ["cold", "cold", "cold", "median", "retrieved"]
    assert outcomes[0].checked.prediction.p50_tokens == COLD_TOKENS


def test_predictions_are_timed() -> None:
    clock = ManualClock()
    outcomes = replay([Item("p", "a", 5), Item("q", "a", 5)], clock, SlowPredictor(clock))
    assert [one.seconds for one in outcomes] == [0.25, 0.25]
    assert report(outcomes)["predict_ms"] == {"p50": 250.0, "p99": 250.0}


def test_fits_are_run_during_the_replay() -> None:
    predictor = LengthPredictor()
    items = [Item(prompt, "m", length) for prompt, length in prompts_with_lengths(100)]
    outcomes = replay(items, ManualClock(), predictor)
    assert predictor.num_published >= 1
    assert outcomes[-1].checked.source in {"regressed", "retrieved"}


def test_a_censored_output_is_learned_as_censored() -> None:
    medians = []
    for censored in (False, True):
        items = [Item("p", "m", 200, censored=censored), Item("q", "m", 200), Item("p", "m", 200)]
        medians.append(replay(items, ManualClock())[-1].checked.prediction.p50_tokens)
    assert medians[0] == pytest.approx(200) and medians[1] > 250


# Figures


def test_figures_are_those_of_the_last_half() -> None:
    found = late_report(outcome(40), outcome(60, p50_tokens=80), outcome(100, p50_tokens=80, source="retrieved"))
    assert (found["num_answers"], found["num_evaluated"], found["num_censored"]) == (6, 3, 0)
    assert found["pooled"] == pytest.approx({
        "num": 3,
        "tau": 2 / math.sqrt(2 * 3),  # one of three pairs is tied in the predictions
        "mae": (10 + 20 + 20) / 3,
        "mae_median": (20 + 0 + 40) / 3,
        "mae_constant": (20 + 0 + 40) / 3,
        "p90_coverage": 1.0,
        "hit_rate": 1 / 3,
        "log_error": (math.log(50 / 40) + math.log(80 / 60) + math.log(100 / 80)) / 3,
    })  # fmt: skip


def test_models_and_tasks_have_their_own_figures() -> None:
    found = late_report(
        outcome(10, model="b", task="code"), outcome(30, model="a", task="code"), outcome(50, model="b", task="chat"),
        outcome(90, model="a"),
    )  # fmt: skip
    assert {name: one["num"] for name, one in found["models"].items()} == {"a": 2, "b": 2}
    assert {name: one["num"] for name, one in found["tasks"].items()} == {"chat": 1, "code": 2}
    assert found["tasks"]["chat"]["mae_constant"] == 10 and found["tasks"]["chat"]["mae_median"] == 0


def test_a_model_of_which_all_outputs_are_censored_has_no_figures() -> None:
    found = report([outcome(10), outcome(5, True, model="cut")] * 2)
    assert set(found["models"]) == {"m"} and found["num_censored"] == 2


def test_a_report_of_censored_outputs_only_has_no_figures() -> None:
    found = report([outcome(10, True)] * 4)
    assert (found["num_evaluated"], found["pooled"], found["models"]) == (0, {}, {})


def test_a_report_is_json() -> None:
    found = report([outcome(1 + index % 90, index % 7 == 0, task="t") for index in range(1200)])
    assert json.loads(json.dumps(found)) == found


def test_tau_of_many_values_is_that_of_an_even_selection() -> None:
    actual = np.arange(300.0)
    predicted = np.where(actual % 3 == 0, actual, -actual)
    assert tau(predicted, actual, max_pairs=100) == 1.0
    assert tau(predicted, actual, max_pairs=300) < 0.5


# Coverage


def test_coverage_of_whole_outputs_is_their_share() -> None:
    late = [outcome(10)] * 400 + [outcome(100)] * 30 + [outcome(101)] * 70
    found = report(late * 2)
    assert found["pooled"]["p90_coverage"] == 0.86
    assert found["p90_windows"] == {"num": 1, "within_band": 1.0, "lowest": 0.86, "highest": 0.86}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_coverage_without_censored_outputs_is_the_share_within_p90(lengths: list[int]) -> None:
    found = late_report(*map(outcome, lengths))
    assert found["pooled"]["p90_coverage"] == pytest.approx(sum(one <= 100 for one in lengths) / len(lengths), abs=1e-9)


def test_a_censored_output_counts_as_those_that_got_as_far() -> None:
    # Of 8 that got to 20 tokens, 4 are cut off there; of the 4 others one in four is longer than its p90.
    late = [outcome(10)] * 2 + [outcome(20, True)] * 4 + [outcome(30)] * 3 + [outcome(101)]
    assert report(late * 2)["pooled"]["p90_coverage"] == pytest.approx(1 - 0.8 * 0.25)


def test_a_censored_output_is_longer_than_a_whole_one_that_got_as_far() -> None:
    late = [outcome(20)] * 2 + [outcome(20, True)] * 2 + [outcome(101)]
    assert report(late * 2)["pooled"]["p90_coverage"] == 0.4


def test_an_output_censored_beyond_its_p90_was_longer_than_that() -> None:
    late = [outcome(10)] * 6 + [outcome(5, True)] * 3 + [outcome(9000, True)]
    found = report(late * 2)
    assert found["num_evaluated"] == found["pooled"]["num"] == 6
    assert found["pooled"]["p90_coverage"] == pytest.approx(6 / 7)


def test_random_censoring_does_not_bias_the_coverage() -> None:
    rng = random.Random(4)
    late = []
    for _ in range(1500):
        length, cap = rng.expovariate(1 / 60), rng.expovariate(1 / 120)
        late.append(outcome(max(1, round(min(length, cap))), censored=cap < length))
    assert report(late * 2)["pooled"]["p90_coverage"] == pytest.approx(1 - math.exp(-100 / 60), abs=0.03)


def test_coverage_windows_are_all_whole_ones_but_the_first() -> None:
    windows = [
        [outcome(10)] * 450 + [outcome(101)] * 50,
        [outcome(10)] * 500,
        [outcome(10)] * 460 + [outcome(101)] * 40,
    ]
    outcomes = [one for window in windows for one in window] + [outcome(101)] * 499
    assert report(outcomes)["p90_windows"] == {"num": 2, "within_band": 0.5, "lowest": 0.92, "highest": 1.0}


def test_fewer_outcomes_than_two_windows_have_no_coverage_windows() -> None:
    assert report([outcome(10)] * 999)["p90_windows"] == {"num": 0}
