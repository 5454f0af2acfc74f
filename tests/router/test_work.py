"""What requests are taken to be in seconds of work, and what follows for their order."""

import pytest

from muxmesh.cost import ModelCosts, StepCost
from muxmesh.order import Order, Policy
from muxmesh.types import LengthPrediction, Standing, Stopping
from router.work import EQUAL_FOR_ALL, Outlook, Served, UnitWork, fixed_length

NOW_S = 1000.0


def served(step_s: float, model: str = "m") -> Served:
    return Served(model, ModelCosts(StepCost(step_s, 0.001, 0.0, 1, 0), StepCost(step_s, 0.0, 0.0001, 4, 900)), 128)


def outlook(tokens: float, source: str = "regressed", most: int = 4000) -> Outlook:
    return Outlook(LengthPrediction(tokens, 2 * tokens), source, Stopping(most, eos_token_ids=frozenset({2})))


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
def test_a_request_that_fixes_its_length_needs_no_guess(
    stopping: Stopping, stop_strings: bool, fixed: int | None
) -> None:
    assert fixed_length(stopping, stop_strings) == fixed


def test_a_prediction_stays_within_the_request_s_own_limits() -> None:
    assert Outlook(LengthPrediction(100, 900), "", Stopping(300)).prediction == LengthPrediction(100, 300)
    assert Outlook(LengthPrediction(5, 9), "", Stopping(300, min_new_tokens=50)).prediction == LengthPrediction(50, 50)


def test_more_tokens_are_more_work() -> None:
    def left_s(p50: float, prompt: int) -> float:
        return UnitWork().expect(Standing(0, NOW_S), outlook(p50), prompt, served(0.05), 0).left_s

    assert left_s(10, 10) < left_s(100, 10) < left_s(100, 1000)


@pytest.mark.parametrize("policy", ["sjf", "srtf", "srtf-aged", "hrrn", "mlfq"])
@pytest.mark.parametrize("source", sorted(EQUAL_FOR_ALL))
def test_of_requests_of_which_nothing_is_guessed_who_came_first_goes_first(source: str, policy: Policy) -> None:
    """Whatever their prompts and limits are, and steps cost when they come."""
    order, work = Order(policy, 60.0, 1e9, 0.5), UnitWork()
    for earlier in (4.0, 900.0):  # guessed ones: what is typical moves
        work.expect(Standing(0, 0.0), outlook(earlier), 100, served(0.05), 0)
    standings = [
        work.expect(Standing(0, NOW_S + place), outlook(tokens, source, most), prompt, served(step_s), place)
        for place, (tokens, most, prompt, step_s) in enumerate(
            [(200, 4000, 3000, 0.05), (100, 30, 10, 0.04), (128, 4000, 10, 0.01), (200, 5, 1, 0.06), (3, 9, 1, 0.001)]
        )
    ]
    keys = [order.key(standing, NOW_S + 50) for standing in standings]
    assert keys == sorted(keys) and len({standing.left_s for standing in standings}) == 1


def test_what_they_cost_is_looked_at_again_when_nobody_waits() -> None:
    work = UnitWork()

    def left_s(step_s: float, num_waiting: int, model: str = "m") -> float:
        return work.expect(
            Standing(0, 0.0), outlook(100, "floor"), 10, served(step_s, model), num_waiting
        ).left_s  # fmt: skip

    first_s = left_s(0.05, 0)
    assert left_s(0.10, 3) == first_s < left_s(0.10, 3, "other")
    assert left_s(0.10, 0) == left_s(0.05, 1) > first_s


def test_a_cost_that_is_not_measured_yet_is_not_kept() -> None:
    work = UnitWork()
    unmeasured = Served("m", None, 128)
    assert work.expect(Standing(0, 0.0), outlook(100, "floor"), 10, unmeasured, 0).left_s > 0
    measured_s = work.expect(Standing(0, 0.0), outlook(100, "floor"), 10, served(0.5), 1).left_s
    assert measured_s == UnitWork().expect(Standing(0, 0.0), outlook(100, "floor"), 10, served(0.5), 0).left_s


def test_what_is_typical_moves_in_steps_and_keeps_up() -> None:
    work = UnitWork()

    def typical_s(tokens: float) -> float:
        return work.expect(Standing(0, 0.0), outlook(tokens), 0, served(0.05), 0).typical_s

    first_s = typical_s(100)
    assert typical_s(130) == typical_s(80) == first_s
    for _ in range(2000):
        later_s = typical_s(500)
    assert later_s == pytest.approx(5 * first_s, rel=0.25)
