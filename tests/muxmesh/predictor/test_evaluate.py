import pytest

from muxmesh.predictor.checked_predictor import CheckedPrediction
from muxmesh.predictor.evaluate import Item, Outcome, report
from muxmesh.types import LengthPrediction


def outcome(num_tokens: int, censored: bool = False, model: str = "m") -> Outcome:
    judged = CheckedPrediction(LengthPrediction(50.0, 100.0), "regressed", model, "", None, None)
    return Outcome(Item("a", model, num_tokens, censored=censored), judged, 0.001)


def test_coverage_of_whole_answers_is_their_share() -> None:
    late = [outcome(10)] * 400 + [outcome(100)] * 30 + [outcome(101)] * 70
    found = report(late * 2)
    assert found["pooled"]["p90_coverage"] == 0.86
    assert found["p90_windows"] == {"num": 1, "within_band": 1.0, "lowest": 0.86, "highest": 0.86}


def test_an_answer_that_was_cut_off_counts_as_those_that_got_as_far() -> None:
    # Of 8 that got to 20 tokens, 4 are cut off there; of the 4 others one in four is longer than its p90.
    late = [outcome(10)] * 2 + [outcome(20, True)] * 4 + [outcome(30)] * 3 + [outcome(101)]
    assert report(late * 2)["pooled"]["p90_coverage"] == pytest.approx(1 - 0.8 * 0.25)


def test_an_answer_cut_off_beyond_its_upper_bound_was_longer_than_that() -> None:
    late = [outcome(10)] * 6 + [outcome(5, True)] * 3 + [outcome(9000, True)]
    found = report(late * 2)
    assert found["num_evaluated"] == found["pooled"]["num"] == 6
    assert found["pooled"]["p90_coverage"] == pytest.approx(6 / 7)


def test_a_model_of_which_all_answers_were_cut_off_has_no_figures() -> None:
    found = report([outcome(10), outcome(5, True, "cut")] * 2)
    assert set(found["models"]) == {"m"}
