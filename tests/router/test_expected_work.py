"""What requests are taken to be in seconds of work, and what follows for their order."""

import pytest

from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.step_cost import ModelCosts, StepCost
from muxmesh.types import LengthPrediction, SchedulingState, Stopping
from router.expected_work import UNPREDICTED, ExpectedOutput, ExpectedWork, ModelService, fixed_length

NOW_S = 1000.0


def served(step_s: float, model: str = "m") -> ModelService:
    return ModelService(
        model, ModelCosts(StepCost(step_s, 0.001, 0.0, 1, 0), StepCost(step_s, 0.0, 0.0001, 4, 900)), 128
    )


def outlook(tokens: float, source: str = "regressed", most: int = 4000) -> ExpectedOutput:
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
        return ExpectedWork().expect(SchedulingState(0, NOW_S), outlook(p50), prompt, served(0.05), 0).remaining_s

    assert remaining_s(10, 10) < remaining_s(100, 10) < remaining_s(100, 1000)


@pytest.mark.parametrize("policy", ["sjf", "srtf", "srtf-aged", "hrrn", "mlfq"])
@pytest.mark.parametrize("source", sorted(UNPREDICTED))
def test_unpredicted_requests_go_by_arrival(source: str, policy: PolicyName) -> None:
    """Whatever their prompts and limits are, and steps cost when they come."""
    order, work = SchedulingPolicy(policy, 60.0, 1e9, 0.5), ExpectedWork()
    for earlier in (4.0, 900.0):  # guessed ones: what is typical moves
        work.expect(SchedulingState(0, 0.0), outlook(earlier), 100, served(0.05), 0)
    schedulings = [
        work.expect(SchedulingState(0, NOW_S + place), outlook(tokens, source, most), prompt, served(step_s), place)
        for place, (tokens, most, prompt, step_s) in enumerate(
            [(200, 4000, 3000, 0.05), (100, 30, 10, 0.04), (128, 4000, 10, 0.01), (200, 5, 1, 0.06), (3, 9, 1, 0.001)]
        )
    ]
    keys = [order.sort_key(scheduling, NOW_S + 50) for scheduling in schedulings]
    assert keys == sorted(keys) and len({scheduling.remaining_s for scheduling in schedulings}) == 1


def test_the_equal_work_is_computed_anew_when_nobody_waits() -> None:
    work = ExpectedWork()

    def remaining_s(step_s: float, num_waiting: int, model: str = "m") -> float:
        return work.expect(
            SchedulingState(0, 0.0), outlook(100, "floor"), 10, served(step_s, model), num_waiting
        ).remaining_s  # fmt: skip

    first_s = remaining_s(0.05, 0)
    assert remaining_s(0.10, 3) == first_s < remaining_s(0.10, 3, "other")
    assert remaining_s(0.10, 0) == remaining_s(0.05, 1) > first_s


def test_a_cost_that_is_not_measured_yet_is_not_kept() -> None:
    work = ExpectedWork()
    unmeasured = ModelService("m", None, 128)
    assert work.expect(SchedulingState(0, 0.0), outlook(100, "floor"), 10, unmeasured, 0).remaining_s > 0
    measured_s = work.expect(SchedulingState(0, 0.0), outlook(100, "floor"), 10, served(0.5), 1).remaining_s
    assert (
        measured_s
        == ExpectedWork().expect(SchedulingState(0, 0.0), outlook(100, "floor"), 10, served(0.5), 0).remaining_s
    )


def test_the_mean_work_moves_in_steps_and_keeps_up() -> None:
    work = ExpectedWork()

    def mean_work_s(tokens: float) -> float:
        return work.expect(SchedulingState(0, 0.0), outlook(tokens), 0, served(0.05), 0).mean_work_s

    first_s = mean_work_s(100)
    assert mean_work_s(130) == mean_work_s(80) == first_s
    for _ in range(2000):
        later_s = mean_work_s(500)
    assert later_s == pytest.approx(5 * first_s, rel=0.25)
