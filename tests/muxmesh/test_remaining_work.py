"""The remaining work of a sequence as it decodes."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.remaining_work import REFRESH_TOKENS, REPREDICT_AT, RemainingWork
from muxmesh.types import LengthPrediction, SchedulingState, TenantStanding

START = SchedulingState(0, 5.0, prefill_s=3.0, decode_s=100.0, mean_work_s=7.0)
PREDICTION = LengthPrediction(100.0, 250.0)


def decoded(num_tokens: int, prediction: LengthPrediction | None = PREDICTION) -> RemainingWork:
    """A sequence after ``num_tokens``, one at a time."""
    work = RemainingWork(START, prediction)
    for number in range(1, num_tokens + 1):
        work.update(number)
    return work


def test_work_that_has_not_begun_is_that_of_the_request() -> None:
    work = RemainingWork(START, PREDICTION)
    assert work.state == START
    assert work.expected_tokens == 100


def test_the_first_token_ends_the_prefill() -> None:
    state = decoded(1).state
    assert state.prefill_s == 0.0
    assert state.served_s == pytest.approx(3 + 1)
    assert state.decode_s == pytest.approx(99)


def test_the_length_is_predicted_again_at_fractions_of_the_median_and_whenever_it_is_reached() -> None:
    predicted_at = []
    work = RemainingWork(START, PREDICTION)
    for number in range(1, 400):
        before = work.num_repredictions
        work.update(number)
        predicted_at += [number] * (work.num_repredictions - before)
    assert predicted_at[:3] == [math.ceil(fraction * 100) for fraction in REPREDICT_AT]
    assert len(predicted_at) > 4, "an output that out-lives its prediction is predicted again"
    for at in predicted_at:
        assert decoded(at).expected_tokens == pytest.approx(at + PREDICTION.remaining_tokens(at))


def test_between_two_predictions_the_work_decreases_with_the_tokens() -> None:
    first, later = decoded(26).state, decoded(26 + REFRESH_TOKENS).state
    assert first.decode_s - later.decode_s == pytest.approx(later.served_s - first.served_s)


def test_an_output_longer_than_expected_has_more_work_left_than_it_seemed() -> None:
    assert decoded(99).state.decode_s < decoded(101).state.decode_s


def test_without_a_prediction_the_order_stays_as_it_is() -> None:
    work = decoded(500, None)
    assert work.state == START
    assert not work.is_past(0.01)
    assert work.tokens_until_prediction(500) is None


def test_a_resumed_output_continues_from_its_tokens() -> None:
    """The router has computed the state of the next attempt from them."""
    again = START.after_output(40, PREDICTION, prefill_again=True)
    work = RemainingWork(again, PREDICTION, 40)
    assert work.expected_tokens == pytest.approx(40 + PREDICTION.remaining_tokens(40))
    work.update(41)
    assert work.state.prefill_s == 0.0
    assert work.state.decode_s == pytest.approx(again.decode_s * (1 - 1 / PREDICTION.remaining_tokens(40)))


def test_how_much_of_the_expected_output_is_there() -> None:
    assert not decoded(79).is_past(0.8) or decoded(79).expected_tokens < 99
    assert decoded(99).is_past(0.8)


@given(p50=st.floats(1, 5000), spread=st.floats(1, 20), lengths=st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_work_is_never_negative_and_what_is_served_only_grows(p50: float, spread: float, lengths: list[int]) -> None:
    work, number, served_s = RemainingWork(START, LengthPrediction(p50, p50 * spread)), 0, 0.0
    for more in lengths:
        number += more
        work.update(number)
        assert work.state.decode_s > 0 and math.isfinite(work.state.decode_s)
        assert work.state.served_s >= served_s
        assert work.expected_tokens > 0
        after = work.tokens_until_prediction(number)
        assert after is not None and after >= 1
        served_s = work.state.served_s


@given(p50=st.floats(1, 500), spread=st.floats(1, 20), start=st.integers(1, 600))
def test_nothing_changes_before_the_next_change(p50: float, spread: float, start: int) -> None:
    work = RemainingWork(START, LengthPrediction(p50, p50 * spread))
    work.update(start)
    state, is_past = work.state, work.is_past(0.8)
    after = work.tokens_until_change(start, 0.8)
    assert after is not None and after >= 1
    for number in range(start + 1, start + after):
        work.update(number)
        assert work.state is state and work.is_past(0.8) is is_past
    work.update(start + after)
    assert work.state is not state or work.is_past(0.8) is not is_past


def test_without_a_prediction_nothing_changes() -> None:
    assert decoded(20, None).tokens_until_change(20, 0.8) is None


def test_the_work_done_is_that_of_any_number_of_tokens_and_a_standing_stays() -> None:
    start = SchedulingState(0, 0.0, prefill_s=2.0, decode_s=10.0, served_s=1.0)
    work = RemainingWork(start, LengthPrediction(100.0, 100.0))
    per_token_s = 10.0 / LengthPrediction(100.0, 100.0).remaining_tokens(0)
    assert work.served_s(0) == 0.0
    assert work.served_s(7) == pytest.approx(1.0 + 2.0 + 7 * per_token_s)
    standing = TenantStanding(2, 0, True, False, 1)
    work.set_standing(standing)
    assert work.state == replace(start, standing=standing)
    work.update(5)
    assert work.state.standing == standing and work.state.served_s == pytest.approx(work.served_s(5))
