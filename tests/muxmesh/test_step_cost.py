import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.step import Chunk, Step
from muxmesh.step_cost import CostFit, StepCost, StepShape, at_share, context_of, least_squares_cost, share_factor

TRUE = StepCost(0.012, 0.0004, 2e-7)


def fitted(num_steps: int = 400, noise: float = 0.05, seed: int = 0) -> CostFit:
    """A fit to random steps of `TRUE`, with relative noise."""
    rng, fit = random.Random(seed), CostFit()
    for _ in range(num_steps):
        shape = StepShape(rng.randint(1, 128), rng.randint(0, 60_000), rng.randint(1, 16))
        fit.observe(shape, TRUE.step_s(shape.num_tokens, shape.num_context) * rng.uniform(1 - noise, 1 + noise))
    return fit


def cost_of(fit: CostFit) -> StepCost:
    assert fit.cost is not None
    return fit.cost


def test_the_fit_finds_base_token_and_context_costs() -> None:
    cost = cost_of(fitted())
    assert cost.base_s == pytest.approx(TRUE.base_s, rel=0.1)
    assert cost.per_token_s == pytest.approx(TRUE.per_token_s, rel=0.1)
    assert cost.per_context_s == pytest.approx(TRUE.per_context_s, rel=0.2)


def test_without_noise_the_fit_is_exact() -> None:
    cost = cost_of(fitted(64, noise=0.0))
    assert (cost.base_s, cost.per_token_s, cost.per_context_s) == pytest.approx(
        (TRUE.base_s, TRUE.per_token_s, TRUE.per_context_s), rel=1e-6
    )


def test_a_rare_stall_changes_the_fit_little() -> None:
    rng, fit = random.Random(2), CostFit()
    for number in range(800):
        shape = StepShape(rng.randint(1, 64), rng.randint(0, 20_000), 4)
        stall_s = 1.5 if number % 40 == 20 else 0.0
        fit.observe(shape, TRUE.step_s(shape.num_tokens, shape.num_context) * rng.uniform(0.95, 1.05) + stall_s)
    assert cost_of(fit).step_s(16, 5000) == pytest.approx(TRUE.step_s(16, 5000), rel=0.1)


@pytest.mark.parametrize(("period", "factor"), [(8, 2.5), (10, 3.0), (10, 10.0), (20, 3.0)])
def test_regular_slow_steps_are_down_weighted(period: int, factor: float) -> None:
    """Without Huber weights, the cost is 0.6 to 3 % too high."""
    rng, fit = random.Random(2), CostFit()
    for number in range(800):
        shape = StepShape(rng.randint(1, 64), rng.randint(0, 20_000), 4)
        slowdown = factor if number % period == period // 2 else 1.0
        fit.observe(shape, TRUE.step_s(shape.num_tokens, shape.num_context) * rng.uniform(0.95, 1.05) * slowdown)
    assert cost_of(fit).step_s(16, 5000) == pytest.approx(TRUE.step_s(16, 5000), rel=0.004)


def test_the_fit_follows_a_machine_that_slows_down() -> None:
    fit, rng = fitted(), random.Random(3)
    for _ in range(1500):
        shape = StepShape(rng.randint(1, 128), rng.randint(0, 60_000), 4)
        fit.observe(shape, 2 * TRUE.step_s(shape.num_tokens, shape.num_context))
    assert cost_of(fit).step_s(32, 10_000) == pytest.approx(2 * TRUE.step_s(32, 10_000), rel=0.15)


def test_steps_that_do_not_determine_every_coefficient_give_a_cost() -> None:
    fit = CostFit()
    for context in range(100, 140):
        fit.observe(StepShape(1, context, 1), 0.05)
    cost = cost_of(fit)
    assert min(cost.base_s, cost.per_token_s, cost.per_context_s) >= 0
    assert cost.step_s(1, 120) == pytest.approx(0.05, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 5000), st.floats(1e-4, 1)), min_size=1, max_size=30))
def test_no_coefficient_is_ever_negative(steps: list[tuple[int, int, float]]) -> None:
    fit = CostFit()
    for num_tokens, num_context, seconds in steps:
        fit.observe(StepShape(num_tokens, num_context, 1), seconds)
        cost = cost_of(fit)
        assert min(cost.base_s, cost.per_token_s, cost.per_context_s) >= 0


def test_the_first_step_already_gives_a_cost() -> None:
    fit = CostFit()
    fit.observe(StepShape(4, 0, 1), 0.02)
    assert cost_of(fit).step_s(4, 0) == pytest.approx(0.02)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_time_is_ignored(seconds: float) -> None:
    fit = CostFit()
    fit.observe(StepShape(1, 1, 1), seconds)
    assert fit.cost is None and fit.num_steps == 0


def test_a_step_without_tokens_is_ignored() -> None:
    fit = CostFit()
    fit.observe(StepShape(0, 0, 0), 0.01)
    assert fit.cost is None and fit.num_steps == 0


def test_after_the_warm_up_the_fit_is_solved_every_sixteenth_step() -> None:
    fit, solved_at, last = CostFit(), [], None
    for number in range(1, 50):
        fit.observe(StepShape(number % 7 + 1, number * 100, 1), 0.01 + 0.001 * number)
        if fit.cost is not last:
            solved_at.append(number)
            last = fit.cost
    assert solved_at == [*range(1, 9), 16, 32, 48]


def test_the_cost_has_the_mean_sequences_and_the_mean_context_per_token() -> None:
    fit = CostFit()
    for num_tokens, num_context, num_seqs in ((2, 200, 2), (4, 800, 4)):
        fit.observe(StepShape(num_tokens, num_context, num_seqs), 0.01)
    assert (cost_of(fit).mean_seqs, cost_of(fit).mean_context) == (3.0, 150.0)


@pytest.mark.parametrize(("num_tokens", "start"), [(1, 0), (128, 0), (129, 0), (300, 0), (200, 77)])
def test_prefill_is_the_sum_of_its_steps(num_tokens: int, start: int) -> None:
    steps = [(offset, min(128, num_tokens - offset)) for offset in range(0, num_tokens, 128)]
    total_s = sum(TRUE.step_s(count, context_of(start + offset, count)) for offset, count in steps)
    assert TRUE.prefill_s(num_tokens, start, 128) == pytest.approx(total_s)


def test_an_empty_prefill_takes_no_time() -> None:
    assert TRUE.prefill_s(0, start=500) == 0


def test_decode_is_the_sum_of_its_steps_with_growing_context() -> None:
    alone_s = sum(TRUE.step_s(1, 50 + step) for step in range(40))
    assert TRUE.decode_s(40, 50) == pytest.approx(alone_s)


def test_decode_steps_include_the_other_sequences_of_the_batch() -> None:
    batched = StepCost(TRUE.base_s, TRUE.per_token_s, TRUE.per_context_s, mean_seqs=3, mean_context=200)
    assert batched.decode_s(40, 50) == pytest.approx(sum(TRUE.step_s(3, 400 + 50 + step) for step in range(40)))


def test_a_mean_below_one_sequence_counts_as_a_batch_of_one() -> None:
    idle = StepCost(TRUE.base_s, TRUE.per_token_s, TRUE.per_context_s, mean_seqs=0.2, mean_context=9e9)
    assert idle.decode_s(5, 10) == TRUE.decode_s(5, 10)


@given(st.integers(0, 500), st.integers(0, 200))
def test_the_context_of_a_chunk_is_the_sum_over_its_positions(start: int, num_tokens: int) -> None:
    assert context_of(start, num_tokens) == sum(range(start, start + num_tokens))


def test_the_context_of_a_step_is_the_sum_over_its_chunks() -> None:
    chunks = (Chunk(1, 3, (7, 7, 7), ()), Chunk(2, 10, (7,), ()))
    shape = Step(chunks).shape
    assert (shape.num_tokens, shape.num_context, shape.num_seqs) == (4, 3 + 4 + 5 + 10, 2)


def test_a_step_takes_longer_on_a_smaller_share_as_far_as_it_scales() -> None:
    assert [share_factor(share, 1.0) for share in (1.0, 0.5, 0.25)] == [1.0, 2.0, 4.0]
    assert share_factor(0.5, 0.2) == pytest.approx(1.2)
    assert share_factor(0.1, 0.0) == 1.0


def test_the_cost_of_a_worker_at_a_share_keeps_its_mean_step() -> None:
    cost = at_share(StepCost(0.01, 0.002, 0.0003, 4.0, 50.0), 0.5, 0.6)
    assert (cost.base_s, cost.per_token_s, cost.per_context_s) == pytest.approx((0.016, 0.0032, 0.00048))
    assert (cost.mean_seqs, cost.mean_context) == (4.0, 50.0)


def test_a_cost_is_found_from_runs_of_steps() -> None:
    cost = StepCost(0.01, 0.002, 1e-6)
    runs = [(1, 100, 4950), (4, 400, 80_000), (2, 10, 3000), (1, 1, 0)]
    found = least_squares_cost([(n, t, c, n * cost.base_s + cost.step_s(t, c) - cost.base_s) for n, t, c in runs])
    assert (found.base_s, found.per_token_s, found.per_context_s) == pytest.approx((0.01, 0.002, 1e-6))
