"""The expected work of requests, and the order that follows from it."""

import pytest

from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.step_cost import ModelCosts, StepCost
from muxmesh.types import UNPREDICTED, LengthPrediction, SchedulingState, Stopping
from router.expected_work import ExpectedOutput, ExpectedWork, ModelService, fixed_length

NOW_S = 1000.0
LEAD = 100.0


def service(step_s: float, model: str = "m") -> ModelService:
    return ModelService(
        model, ModelCosts(StepCost(step_s, 0.001, 0.0, 1, 0), StepCost(step_s, 0.0, 0.0001, 4, 900)), 128, 16
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
            ExpectedWork(LEAD)
            .expect(SchedulingState(0, NOW_S), expected_output(p50), prompt, service(0.05), 0)
            .scheduling.remaining_s
        )

    assert remaining_s(10, 10) < remaining_s(100, 10) < remaining_s(100, 1000)


@pytest.mark.parametrize("policy", ["sjf", "srtf", "srtf-aged", "hrrn", "mlfq"])
@pytest.mark.parametrize("source", sorted(UNPREDICTED))
def test_unpredicted_requests_are_ordered_by_arrival(source: str, policy: PolicyName) -> None:
    """Whatever their prompts, their limits and the step costs at their arrival are."""
    order, work = SchedulingPolicy(policy, 60.0, 1e9, 0.5), ExpectedWork(LEAD)
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
    work = ExpectedWork(LEAD)

    def remaining_s(step_s: float, num_queued: int, model: str = "m") -> float:
        return work.expect(
            SchedulingState(0, 0.0), expected_output(100, "floor"), 10, service(step_s, model), num_queued
        ).scheduling.remaining_s  # fmt: skip

    first_s = remaining_s(0.05, 0)
    assert remaining_s(0.10, 3) == first_s < remaining_s(0.10, 3, "other")
    assert remaining_s(0.10, 0) == remaining_s(0.05, 1) > first_s


def test_the_equal_work_before_the_first_step_is_replaced_by_a_measured_one() -> None:
    work = ExpectedWork(LEAD)
    unmeasured = ModelService("m", None, 128, 16)
    assert (
        work.expect(SchedulingState(0, 0.0), expected_output(100, "floor"), 10, unmeasured, 0).scheduling.remaining_s
        > 0
    )
    measured_s = work.expect(
        SchedulingState(0, 0.0), expected_output(100, "floor"), 10, service(0.5), 1
    ).scheduling.remaining_s
    assert (
        measured_s
        == ExpectedWork(LEAD)
        .expect(SchedulingState(0, 0.0), expected_output(100, "floor"), 10, service(0.5), 0)
        .scheduling.remaining_s
    )


def test_the_mean_work_is_that_of_the_recent_requests() -> None:
    work = ExpectedWork(LEAD)

    def state(tokens: float) -> SchedulingState:
        return work.expect(SchedulingState(0, 0.0), expected_output(tokens), 0, service(0.05), 0).scheduling

    states = [state(tokens) for tokens in (100, 300, 200)]
    assert states[-1].mean_work_s == pytest.approx(sum(one.remaining_s for one in states) / 3, rel=0.01)
    for _ in range(1000):
        later = state(500)
    assert later.mean_work_s == pytest.approx(later.remaining_s, rel=0.01)


def test_the_mean_work_follows_step_costs_at_once() -> None:
    """Steps become 4 times as long when the batch fills up: the work of a request relative to the mean stays."""
    work, lengths = ExpectedWork(LEAD), (50, 100, 200, 400)

    def relative_work(tokens: float, step_s: float) -> float:
        state = work.expect(SchedulingState(0, 0.0), expected_output(tokens), 10, service(step_s), 0).scheduling
        return state.remaining_s / state.mean_work_s

    for index in range(400):
        relative_work(lengths[index % 4], 0.05)
    before = [relative_work(tokens, 0.05) for tokens in lengths]
    after = [relative_work(tokens, 0.20) for tokens in lengths]
    assert after == pytest.approx(before, rel=0.25)
    assert before[0] < after[1] < 0.8 < 1.2 < before[3]


@pytest.mark.parametrize("source", sorted(UNPREDICTED))
def test_unpredicted_requests_do_not_change_the_mean_work(source: str) -> None:
    """Before the first fit all have the median of a few outputs, which may be far from what is predicted later."""
    work = ExpectedWork(LEAD)

    def state(tokens: float, source: str, num_queued: int) -> SchedulingState:
        return work.expect(
            SchedulingState(0, 0.0), expected_output(tokens, source), 10, service(0.05), num_queued
        ).scheduling

    for num_queued in range(100):
        unpredicted = state(16, source, num_queued)
        assert unpredicted.mean_work_s == unpredicted.remaining_s
    for tokens in (50, 100, 200):
        predicted = state(tokens, "regressed", 100)
    assert predicted.mean_work_s == pytest.approx(state(117, "regressed", 100).remaining_s, rel=0.3)
    for num_queued in range(100):
        state(16, source, num_queued)
    assert state(117, "regressed", 0).mean_work_s == pytest.approx(predicted.mean_work_s, rel=0.01)


@pytest.mark.parametrize("source", ["regressed", "floor"])
def test_requests_of_the_same_relative_work_are_ordered_by_arrival_however_the_mean_changes(source: str) -> None:
    """Steps become shorter: the longest lead of later requests does not decrease faster than time passes."""
    work, order = ExpectedWork(LEAD), SchedulingPolicy("srtf-aged", LEAD, 1e9, 0.5)
    keys = []
    for index in range(300):
        step_s = 0.20 if index < 100 else 0.10 if index < 200 else 0.05
        for tokens in (50, 100, 400):
            arrival = SchedulingState(0, NOW_S + index / 10)
            state = work.expect(arrival, expected_output(tokens, source), 0, service(step_s), 3).scheduling
        keys.append(order.sort_key(state, NOW_S + 100))
    assert keys == sorted(keys)


def test_the_longest_lead_becomes_that_of_a_shorter_mean_with_time() -> None:
    work = ExpectedWork(LEAD)

    def lead_s(at_s: float, tokens: float) -> SchedulingState:
        return work.expect(SchedulingState(0, at_s), expected_output(tokens), 0, service(0.05), 0).scheduling

    first = lead_s(NOW_S, 1001)
    assert first.longest_lead_s == LEAD * first.mean_work_s
    for _ in range(1000):
        shorter = lead_s(NOW_S + 10, 11)
    assert shorter.longest_lead_s == pytest.approx(first.longest_lead_s - 5)
    much_later = lead_s(NOW_S + 1e6, 11)
    assert much_later.longest_lead_s == pytest.approx(LEAD * much_later.mean_work_s)
    assert lead_s(NOW_S + 10, 11).longest_lead_s == pytest.approx(much_later.longest_lead_s, rel=0.01), "a late one"


def test_the_mean_work_is_that_of_all_models_of_the_unit() -> None:
    work = ExpectedWork(LEAD)

    def state(model: str, step_s: float, tokens: float) -> SchedulingState:
        return work.expect(SchedulingState(0, 0.0), expected_output(tokens), 0, service(step_s, model), 0).scheduling

    works_s = [
        state(model, step_s, 1 + tokens).remaining_s
        for _ in range(50)
        for model, step_s, tokens in (("small", 0.01, 100), ("large", 0.09, 100), ("small", 0.01, 100))
    ]
    assert state("large", 0.09, 101).mean_work_s == pytest.approx(sum(works_s) / len(works_s), rel=0.25)


def test_the_work_is_that_of_the_prompt_in_chunks_and_of_the_output_after_its_first_token() -> None:
    state = (
        ExpectedWork(LEAD)
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
        known = ExpectedWork(LEAD).expect(SchedulingState(0, 0.0), prediction, 10, service(0.05), 0)
        assert known.scheduling.decode_s == 0.0


def test_the_client_s_limit_shortens_the_expected_work() -> None:
    def decode_s(most: int) -> float:
        return (
            ExpectedWork(LEAD)
            .expect(SchedulingState(0, 0.0), expected_output(500, most=most), 10, service(0.05), 0)
            .scheduling.decode_s
        )

    assert decode_s(100) < decode_s(400) < decode_s(500) == decode_s(4000)


def test_unmeasured_costs_still_order_requests() -> None:
    def remaining_s(tokens: float) -> float:
        unmeasured = ModelService("m", None, 128, 16)
        return (
            ExpectedWork(LEAD)
            .expect(SchedulingState(0, 0.0), expected_output(tokens), 10, unmeasured, 0)
            .scheduling.remaining_s
        )

    assert 0 < remaining_s(10) < remaining_s(100)


def test_a_predicted_request_is_expected_to_stay_within_its_limits() -> None:
    known = ExpectedWork(LEAD).expect(SchedulingState(0, 0.0), expected_output(500, most=100), 10, service(0.05), 0)
    assert known.prediction == LengthPrediction(100, 100)


@pytest.mark.parametrize("source", sorted(UNPREDICTED))
def test_the_prediction_of_an_unpredicted_request_is_the_one_that_its_work_was_computed_from(source: str) -> None:
    work, costs = ExpectedWork(LEAD), service(0.05).costs
    assert costs is not None
    for tokens, num_queued, expected in ((100, 0, 100), (300, 1, 100), (300, 0, 300)):
        output = expected_output(tokens, source, most=16)
        known = work.expect(SchedulingState(0, 0.0), output, 10, service(0.05), num_queued)
        assert known.prediction == LengthPrediction(expected, 2 * expected)
        assert known.scheduling.remaining_s == costs.decode.decode_s(expected - 1, 0)


def test_the_state_knows_how_many_requests_wait_for_each_slot() -> None:
    work = ExpectedWork(LEAD)
    states = [
        work.expect(SchedulingState(0, NOW_S), expected_output(9, source), 10, service(0.05), num_queued).scheduling
        for source, num_queued in (("regressed", 0), ("regressed", 24), ("floor", 24))
    ]
    assert [state.queued_per_slot for state in states] == [0.0, 1.5, 0.0]
