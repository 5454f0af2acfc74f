import random

import pytest

from muxmesh.engine.step import Chunk, Step
from muxmesh.step_cost import CostFit, StepCost, StepShape, context_of

TRUE = StepCost(0.012, 0.0004, 2e-7)


def learned(num_steps: int = 400, noise: float = 0.05, seed: int = 0) -> CostFit:
    rng, fit = random.Random(seed), CostFit()
    for _ in range(num_steps):
        shape = StepShape(rng.randint(1, 128), rng.randint(0, 60_000), rng.randint(1, 16))
        fit.observe(shape, TRUE.step_s(shape.num_tokens, shape.num_context) * rng.uniform(1 - noise, 1 + noise))
    return fit


def test_the_fit_finds_base_token_and_context_costs() -> None:
    cost = learned().cost
    assert cost is not None
    assert cost.base_s == pytest.approx(TRUE.base_s, rel=0.1)
    assert cost.per_token_s == pytest.approx(TRUE.per_token_s, rel=0.1)
    assert cost.per_context_s == pytest.approx(TRUE.per_context_s, rel=0.2)


def test_a_stall_now_and_then_changes_little() -> None:
    rng, fit = random.Random(2), CostFit()
    for number in range(800):
        shape = StepShape(rng.randint(1, 64), rng.randint(0, 20_000), 4)
        stall_s = 1.5 if number % 40 == 20 else 0.0
        fit.observe(shape, TRUE.step_s(shape.num_tokens, shape.num_context) * rng.uniform(0.95, 1.05) + stall_s)
    assert fit.cost is not None
    assert fit.cost.step_s(16, 5000) == pytest.approx(TRUE.step_s(16, 5000), rel=0.1)


def test_the_fit_follows_a_machine_that_slows_down() -> None:
    fit = learned()
    rng = random.Random(3)
    for _ in range(1500):
        shape = StepShape(rng.randint(1, 128), rng.randint(0, 60_000), 4)
        fit.observe(shape, 2 * TRUE.step_s(shape.num_tokens, shape.num_context))
    assert fit.cost is not None
    assert fit.cost.step_s(32, 10_000) == pytest.approx(2 * TRUE.step_s(32, 10_000), rel=0.15)


def test_no_cost_is_negative_and_steps_of_one_shape_are_enough_to_begin() -> None:
    fit = CostFit()
    for context in range(100, 140):
        fit.observe(StepShape(1, context, 1), 0.05)
    assert fit.cost is not None
    assert min(fit.cost.base_s, fit.cost.per_token_s, fit.cost.per_context_s) >= 0
    assert fit.cost.step_s(1, 120) == pytest.approx(0.05, rel=0.02)


def test_times_that_are_none_are_left_out() -> None:
    fit = CostFit()
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        fit.observe(StepShape(1, 1, 1), seconds)
    assert fit.cost is None and fit.num_steps == 0


def test_prefill_is_the_sum_of_its_steps() -> None:
    for num_tokens, start in ((1, 0), (128, 0), (300, 0), (200, 77)):
        steps = [(place, min(128, num_tokens - place)) for place in range(0, num_tokens, 128)]
        together = sum(TRUE.step_s(count, context_of(start + place, count)) for place, count in steps)
        assert TRUE.prefill_s(num_tokens, start, 128) == pytest.approx(together)


def test_decode_is_the_sum_of_its_steps_with_a_context_that_grows() -> None:
    alone = sum(TRUE.step_s(1, 50 + step) for step in range(40))
    assert TRUE.decode_s(40, 50) == pytest.approx(alone)
    among = StepCost(TRUE.base_s, TRUE.per_token_s, TRUE.per_context_s, mean_seqs=3, mean_context=200)
    assert among.decode_s(40, 50) == pytest.approx(sum(TRUE.step_s(3, 400 + 50 + step) for step in range(40)))


def test_the_context_of_a_step_counts_every_token_before_each() -> None:
    chunks = (Chunk(1, 3, (7, 7, 7), ()), Chunk(2, 10, (7,), ()))
    shape = Step(chunks).shape
    assert (shape.num_tokens, shape.num_context, shape.num_seqs) == (4, 3 + 4 + 5 + 10, 2)
