import math
from dataclasses import fields, replace
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.types import (
    EngineRequest,
    Finish,
    FinishReason,
    LengthPrediction,
    Role,
    Sampling,
    SchedulingState,
    SloTargets,
    Stopping,
    blocks_for,
)

EOS, STOP, OTHER = 2, 7, 11
STOPPING = Stopping(
    max_new_tokens=5, min_new_tokens=3, stop_token_ids=frozenset({STOP}), eos_token_ids=frozenset({EOS})
)


@pytest.mark.parametrize(
    ("token_id", "num_output_tokens", "finish"),
    [
        (OTHER, 4, None),
        (OTHER, 5, Finish(FinishReason.LENGTH)),
        (OTHER, 6, Finish(FinishReason.LENGTH)),
        (EOS, 2, None),
        (EOS, 3, Finish(FinishReason.EOS, EOS)),
        (STOP, 2, None),
        (STOP, 3, Finish(FinishReason.STOP_TOKEN, STOP)),
        (EOS, 5, Finish(FinishReason.EOS, EOS)),
    ],
)
def test_a_sequence_finishes_by_eos_stop_token_or_length(
    token_id: int, num_output_tokens: int, finish: Finish | None
) -> None:
    assert STOPPING.finish_after(token_id, num_output_tokens) == finish


def test_a_token_that_is_both_eos_and_stop_token_finishes_as_eos() -> None:
    both = Stopping(9, stop_token_ids=frozenset({EOS}), eos_token_ids=frozenset({EOS}))
    assert both.finish_after(EOS, 1) == Finish(FinishReason.EOS, EOS)


def test_ignored_eos_does_not_finish_a_sequence() -> None:
    assert Stopping(9).finish_after(EOS, 1) is None


@pytest.mark.parametrize(("output_index", "is_banned"), [(0, True), (1, True), (2, False), (3, False)])
def test_tokens_that_finish_are_banned_before_the_minimum_length(output_index: int, is_banned: bool) -> None:
    assert STOPPING.banned_at(output_index) == (frozenset({EOS, STOP}) if is_banned else frozenset())


@given(st.integers(0, 20), st.integers(0, 20), st.sampled_from([EOS, STOP]))
def test_a_banned_token_is_one_that_would_not_finish_the_sequence(minimum: int, index: int, token_id: int) -> None:
    stopping = Stopping(100, minimum, frozenset({STOP}), frozenset({EOS}))
    assert (token_id in stopping.banned_at(index)) is (stopping.finish_after(token_id, index + 1) is None)


@pytest.mark.parametrize(
    ("sampling", "greedy", "has_penalties"),
    [
        (Sampling(), False, False),
        (Sampling(temperature=0.0), True, False),
        (Sampling(presence_penalty=0.1), False, True),
        (Sampling(frequency_penalty=-0.1), False, True),
        (Sampling(repetition_penalty=1.1), False, True),
        (Sampling(temperature=0.0, repetition_penalty=0.9), True, True),
        (Sampling(logit_bias=((1, 2.0),), top_k=3, top_p=0.5, min_p=0.1), False, False),
    ],
)
def test_greedy_sampling_and_penalties_are_recognized(sampling: Sampling, greedy: bool, has_penalties: bool) -> None:
    assert (sampling.greedy, sampling.has_penalties) == (greedy, has_penalties)


@given(st.floats(1, 1e4), st.floats(1.01, 50), st.integers(0, 100_000))
def test_remaining_tokens_are_the_median_of_the_tail(p50: float, ratio: float, num_output: int) -> None:
    prediction = LengthPrediction(p50, p50 * ratio)
    remaining = prediction.remaining_tokens(num_output)
    assert remaining >= 1 and math.isfinite(remaining)
    lengths = NormalDist(math.log(p50), math.log(ratio) / NormalDist().inv_cdf(0.9))
    tail = 1 - lengths.cdf(math.log(max(num_output, 1)))
    if num_output and tail > 1e-6 and remaining > 1:
        assert 1 - lengths.cdf(math.log(num_output + remaining)) == pytest.approx(tail / 2, rel=0.02)


@given(st.floats(1, 1e4), st.floats(1.01, 50), st.integers(0, 10_000), st.sampled_from([0.1, 0.25, 0.9]))
def test_any_fraction_of_the_tail_may_be_longer(p50: float, ratio: float, num_output: int, exceeded_by: float) -> None:
    remaining = LengthPrediction(p50, p50 * ratio).remaining_tokens(num_output, exceeded_by)
    lengths = NormalDist(math.log(p50), math.log(ratio) / NormalDist().inv_cdf(0.9))
    tail = 1 - lengths.cdf(math.log(num_output)) if num_output else 1.0
    if tail > 1e-6 and remaining > 1:
        assert 1 - lengths.cdf(math.log(num_output + remaining)) == pytest.approx(tail * exceeded_by, rel=0.02)


def test_past_the_predicted_length_an_uncertain_prediction_leaves_more_tokens() -> None:
    certain, uncertain = LengthPrediction(100, 110), LengthPrediction(100, 1000)
    assert certain.remaining_tokens(150) < 10 < 80 < uncertain.remaining_tokens(150)
    assert certain.remaining_tokens(10_000) < uncertain.remaining_tokens(10_000)


@pytest.mark.parametrize("quantile", [-1, 0, 2, 4, 5.9, 6.1, 8, 9, 12, 20])
def test_far_in_the_tail_the_remaining_tokens_halve_its_probability(quantile: float) -> None:
    """Also where the cumulative distribution rounds to 1. The complementary error function does not."""
    prediction, spread = LengthPrediction(1000, 1500), math.log(1.5) / NormalDist().inv_cdf(0.9)

    def tail(num_output: float) -> float:
        return math.erfc(math.log(num_output / 1000) / spread / math.sqrt(2)) / 2

    num_output = round(1000 * math.exp(quantile * spread))
    remaining = prediction.remaining_tokens(num_output)
    assert tail(num_output + remaining) == pytest.approx(tail(num_output) / 2, rel=0.03)


def test_before_the_first_token_the_median_remains() -> None:
    assert LengthPrediction(80, 200).remaining_tokens(0) == 80
    assert LengthPrediction(0.25, 0.5).remaining_tokens(0) == 1


def test_a_prediction_without_spread_is_a_fixed_length() -> None:
    fixed = LengthPrediction(100, 100)
    assert fixed.remaining_tokens(40) == pytest.approx(60, rel=1e-3)
    assert fixed.remaining_tokens(100) == 1


def test_cached_prompt_tokens_need_no_prefill() -> None:
    state = SchedulingState(0, 0.0, prefill_s=2.0, decode_s=1.0)
    assert state.with_cached_fraction(0.75) == SchedulingState(0, 0.0, prefill_s=0.5, decode_s=1.0)
    assert state.with_cached_fraction(0.75).remaining_s == 1.5
    assert state.with_cached_fraction(0) is state
    assert state.with_cached_fraction(1).remaining_s == 1.0


def test_output_turns_remaining_work_into_served_work() -> None:
    later = SchedulingState(0, 0.0, prefill_s=2.0, decode_s=10.0).after_output(40, LengthPrediction(100, 100))
    assert later.prefill_s == 0
    assert later.decode_s == pytest.approx(6.0)
    assert later.served_s == pytest.approx(2.0 + 4.0)


def test_a_state_with_other_work_keeps_everything_else() -> None:
    state = SchedulingState(*range(1, len(fields(SchedulingState)) + 1))
    assert state.with_work(0.5, 0.25) == replace(state, prefill_s=0.0, decode_s=0.5, served_s=0.25)


def test_work_after_output_does_not_depend_on_the_number_of_updates() -> None:
    first, prediction = SchedulingState(0, 0.0, 2.0, 10.0), LengthPrediction(100, 300)
    twice = first.after_output(50, prediction).after_output(60, prediction, since=50)
    once = first.after_output(60, prediction)
    assert twice.decode_s == pytest.approx(once.decode_s) and twice.prefill_s == once.prefill_s == 0


def test_freed_kv_makes_the_prefill_remaining_work_again() -> None:
    first, prediction = SchedulingState(0, 0.0, 2.0, 10.0), LengthPrediction(100, 300)
    again = first.after_output(60, prediction, prefill_again=True)
    assert again.prefill_s == 2.0
    assert again.decode_s == first.after_output(60, prediction).decode_s


def test_an_output_that_exceeds_its_prediction_gets_more_remaining_work() -> None:
    prediction, state = LengthPrediction(100, 1000), SchedulingState(0, 0.0, 0.0, 10.0)
    assert state.after_output(1000, prediction).decode_s > state.decode_s


@pytest.mark.parametrize(
    ("prediction", "since"), [(None, 0), (LengthPrediction(100, 200), 40), (LengthPrediction(9, 9), 50)]
)
def test_without_a_prediction_or_new_output_the_state_is_unchanged(
    prediction: LengthPrediction | None, since: int
) -> None:
    state = SchedulingState(0, 0.0, 2.0, 10.0)
    assert state.after_output(40, prediction, since) is state


def test_priority_and_arrival_survive_every_update() -> None:
    state = SchedulingState(-3, 12.5, 2.0, 10.0, mean_work_s=4.0)
    later = state.with_cached_fraction(0.5).after_output(10, LengthPrediction(20, 30))
    assert (later.priority, later.arrived_at_s, later.mean_work_s) == (-3, 12.5, 4.0)


def test_the_length_limit_of_a_request_is_prompt_and_output() -> None:
    request = EngineRequest(
        "r", "m", (1, 2, 3), Sampling(), Stopping(10), SchedulingState(0, 0.0), resume_token_ids=(4,)
    )
    assert request.max_tokens == 13


@given(st.integers(0, 10_000), st.sampled_from([1, 8, 16, 32]))
def test_blocks_hold_all_tokens_and_none_is_empty(num_tokens: int, block_size: int) -> None:
    assert 0 <= blocks_for(num_tokens, block_size) * block_size - num_tokens < block_size


def test_the_name_of_a_role_is_its_text() -> None:
    assert [f"{role}" for role in Role] == ["prefill", "decode"]


def test_what_a_request_waits_for_adds_up_for_its_slo_and_changes_nothing_else() -> None:
    request = EngineRequest("r", "m", (1,), Sampling(), STOPPING, SchedulingState(0, 0.0), slo=SloTargets(2.0, 0.1))
    later = request.after_wait(0.5).after_wait(0.25)
    assert later.slo == SloTargets(2.0, 0.1, waited_s=0.75)
    assert later.after_wait(-0.75) == request
    without = EngineRequest("r", "m", (1,), Sampling(), STOPPING, SchedulingState(0, 0.0))
    assert without.after_wait(0.5) is without
