"""The expected work of requests, and the order that follows from it."""

import pytest

from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.step_cost import ModelCosts, StepCost
from muxmesh.types import UNPREDICTED, LengthPrediction, SchedulingState, Stopping
from router.expected_work import ExpectedOutput, ExpectedWork, ModelService, fixed_length

NOW_S = 1000.0


def service(step_s: float, model: str = "m") -> ModelService:
    return ModelService(
        model, ModelCosts(StepCost(step_s, 0.001, 0.0, 1, 0), StepCost(step_s, 0.0, 0.0001, 4, 900)), 128
    )


def expected_output(tokens: float, source: str = "regressed", most: int = 4000) -> ExpectedOutput:
    return ExpectedOutput(LengthPrediction(tokens, 2 * tokens), source, Stopping(most, eos_token_ids=frozenset({2})))


@pytest.mark.parametrize(
    ("stopping", "stop_strings", "fixed"),
    [
        (Stopping(50, eos_token_ids=frozenset({2})), False, None),
        (Stopping(50), False, 50),
        (Stopping(50), True, None),
        (Stopping(50, min_new_tokens=50, eos_token_ids=frozenset({2})), False, 50),
        (Stopping(50, stop_token_ids=frozenset({7})), False, None),
    ],
)
def test_a_request_that_fixes_its_length_needs_no_prediction(
    stopping: Stopping, stop_strings: bool, fixed: int | None
) -> None:
    assert fixed_length(stopping, stop_strings) == fixed


def test_a_prediction_stays_within_the_request_s_own_limits() -> None:
    assert ExpectedOutput(LengthPrediction(100, 900), "", Stopping(300)).prediction == LengthPrediction(100, 300)
    assert ExpectedOutput(LengthPrediction(5, 9), "", Stopping(300, min_new_tokens=50)).prediction == LengthPrediction(
        50, 50
    )


def test_more_tokens_are_more_work() -> None:
    def remaining_s(p50: float, prompt: int) -> float:
        return (
            ExpectedWork()
            .expect(SchedulingState(0, NOW_S), expected_output(p50), prompt, service(0.05), 0)
            .scheduling.remaining_s
        )

    assert remaining_s(10, 10) < remaining_s(100, 10) < remaining_s(100, 1000)


@pytest.mark.parametrize("policy", ["sjf", "srtf", "srtf-aged", "hrrn", "mlfq"])
@pytest.mark.parametrize("source", sorted(UNPREDICTED))
def test_unpredicted_requests_are_ordered_by_arrival(source: str, policy: PolicyName) -> None:
    """Whatever their prompts, their limits and the step costs at their arrival are."""
    order, work = SchedulingPolicy(policy, 60.0, 1e9, 0.5), ExpectedWork()
    for earlier in (4.0, 900.0):  # predicted requests move the mean work
        work.expect(SchedulingState(0, 0.0), expected_output(earlier), 100, service(0.05), 0)
    schedulings = [
        work.expect(
            SchedulingState(0, NOW_S + index), expected_output(tokens, source, most), prompt, service(step_s), index
        ).scheduling
        for index, (tokens, most, prompt, step_s) in enumerate(
            [(200, 4000, 3000, 0.05), (100, 30, 10, 0.04), (128, 4000, 10, 0.01), (200, 5, 1, 0.06), (3, 9, 1, 0.001)]
        )
    ]
    keys = [order.sort_key(scheduling, NOW_S + 50) for scheduling in schedulings]
    assert keys == sorted(keys) and len({scheduling.remaining_s for scheduling in schedulings}) == 1


def test_the_equal_work_is_computed_again_when_no_request_is_queued() -> None:
    work = ExpectedWork()

    def remaining_s(step_s: float, num_queued: int, model: str = "m") -> float:
        return work.expect(
            SchedulingState(0, 0.0), expected_output(100, "floor"), 10, service(step_s, model), num_queued
        ).scheduling.remaining_s  # fmt: skip

    first_s = remaining_s(0.05, 0)
    assert remaining_s(0.10, 3) == first_s < remaining_s(0.10, 3, "other")
    assert remaining_s(0.10, 0) == remaining_s(0.05, 1) > first_s


def test_the_equal_work_before_the_first_step_is_replaced_by_a_measured_one() -> None:
    work = ExpectedWork()
    unmeasured = ModelService("m", None, 128)
    assert (
        work.expect(SchedulingState(0, 0.0), expected_output(100, "floor"), 10, unmeasured, 0).scheduling.remaining_s
        > 0
    )
    measured_s = work.expect(
        SchedulingState(0, 0.0), expected_output(100, "floor"), 10, service(0.5), 1
    ).scheduling.remaining_s
    assert (
        measured_s
        == ExpectedWork()
        .expect(SchedulingState(0, 0.0), expected_output(100, "floor"), 10, service(0.5), 0)
        .scheduling.remaining_s
    )


def test_the_mean_work_changes_in_steps_and_follows_the_running_mean() -> None:
    work = ExpectedWork()

    def mean_work_s(tokens: float) -> float:
        return work.expect(SchedulingState(0, 0.0), expected_output(tokens), 0, service(0.05), 0).scheduling.mean_work_s

    first_s = mean_work_s(100)
    assert mean_work_s(130) == mean_work_s(80) == first_s
    for _ in range(2000):
        later_s = mean_work_s(500)
    assert later_s == pytest.approx(5 * first_s, rel=0.25)


def test_the_work_is_that_of_the_prompt_in_chunks_and_of_the_output_after_its_first_token() -> None:
    state = (
        ExpectedWork()
        .expect(SchedulingState(3, NOW_S, served_s=9.0), expected_output(11), 200, service(0.05), 0)
        .scheduling
    )
    costs = service(0.05).costs
    assert costs is not None
    assert state.prefill_s == costs.prefill.prefill_s(200, chunk=128) == pytest.approx(2 * 0.05 + 200 * 0.001)
    assert state.decode_s == costs.decode.decode_s(10, 200)
    assert (state.priority, state.arrived_at_s, state.served_s) == (3, NOW_S, 9.0), "the rest of the state is kept"


@pytest.mark.parametrize("source", sorted(UNPREDICTED))
def test_an_output_of_one_token_is_no_decode_work(source: str) -> None:
    for prediction in (expected_output(1.0), expected_output(0.5, source)):
        assert (
            ExpectedWork().expect(SchedulingState(0, 0.0), prediction, 10, service(0.05), 0).scheduling.decode_s == 0.0
        )


def test_the_client_s_limit_shortens_the_expected_work() -> None:
    def decode_s(most: int) -> float:
        return (
            ExpectedWork()
            .expect(SchedulingState(0, 0.0), expected_output(500, most=most), 10, service(0.05), 0)
            .scheduling.decode_s
        )

    assert decode_s(100) < decode_s(400) < decode_s(500) == decode_s(4000)


def test_unmeasured_costs_still_order_requests() -> None:
    def remaining_s(tokens: float) -> float:
        unmeasured = ModelService("m", None, 128)
        return (
            ExpectedWork()
            .expect(SchedulingState(0, 0.0), expected_output(tokens), 10, unmeasured, 0)
            .scheduling.remaining_s
        )

    assert 0 < remaining_s(10) < remaining_s(100)


def test_a_predicted_request_is_expected_to_stay_within_its_limits() -> None:
    known = ExpectedWork().expect(SchedulingState(0, 0.0), expected_output(500, most=100), 10, service(0.05), 0)
    assert known.prediction == LengthPrediction(100, 100)


@pytest.mark.parametrize("source", sorted(UNPREDICTED))
def test_the_prediction_of_an_unpredicted_request_is_the_one_that_its_work_was_computed_from(source: str) -> None:
    work, costs = ExpectedWork(), service(0.05).costs
    assert costs is not None
    for tokens, num_queued, expected in ((100, 0, 100), (300, 1, 100), (300, 0, 300)):
        output = expected_output(tokens, source, most=16)
        known = work.expect(SchedulingState(0, 0.0), output, 10, service(0.05), num_queued)
        assert known.prediction == LengthPrediction(expected, 2 * expected)
        assert known.scheduling.remaining_s == costs.decode.decode_s(expected - 1, 0)
