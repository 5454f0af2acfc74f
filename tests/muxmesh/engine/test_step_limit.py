"""How many tokens of prompts fit into the time of a step."""

import math

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.step_limit import MIN_CHUNK_TOKENS, LimitedStep, StepLimit
from muxmesh.step_cost import StepCost

costs = st.builds(StepCost, st.floats(0, 0.1), st.floats(1e-5, 0.01), st.floats(0, 1e-4))


@given(costs, st.floats(-0.1, 2), st.integers(0, 4000), st.floats(0, 0.5))
def test_as_many_tokens_fit_as_the_cost_says(cost: StepCost, longest_s: float, start: int, used_s: float) -> None:
    limit = StepLimit(cost, longest_s)
    fits = int(limit.num_tokens(start, used_s))
    assert fits == 0 or cost.base_s + used_s + limit.chunk_s(start, fits) <= longest_s * (1 + 1e-6)
    assert cost.base_s + used_s + limit.chunk_s(start, fits + 1) >= longest_s * (1 - 1e-6)


def test_tokens_that_cost_nothing_always_fit() -> None:
    assert StepLimit(StepCost(0.1, 0.0, 0.0), 0.2).num_tokens(0, 0.0) == math.inf


def test_the_fixed_part_of_a_step_is_a_fifth_of_its_smallest_chunk_or_less() -> None:
    assert StepLimit(StepCost(0.01, 0.001, 0.0), 0.0).min_tokens(64) == 40
    assert StepLimit(StepCost(0.01, 0.001, 0.0), 0.0).min_tokens(32) == 32, "no more than a whole step"
    assert StepLimit(StepCost(0.0, 0.001, 0.0), 0.0).min_tokens(64) == MIN_CHUNK_TOKENS
    assert StepLimit(StepCost(0.0, 0.001, 0.0), 0.0).min_tokens(4096) == 512


def test_a_fit_of_equal_steps_counts_as_one_of_a_cost_for_each_token() -> None:
    limit = StepLimit(StepCost(0.256, 0.0, 0.0), 0.1).resolved(token_budget=128)
    assert limit.num_tokens(0, 0.0) == 50
    known = StepLimit(StepCost(0.1, 0.002, 0.0), 0.1)
    assert known.resolved(128) is known


def test_a_prompt_is_cut_into_no_piece_smaller_than_the_smallest_chunk() -> None:
    def step() -> LimitedStep:
        return LimitedStep(StepLimit(StepCost(0.01, 0.001, 0.0), 0.1005), token_budget=128)  # 90 tokens; at least 40

    assert step().add_prompt(0, 128, 200) == 90
    assert step().add_prompt(0, 128, 128) == 88, "40 are left"
    assert step().add_prompt(0, 79, 79) == 79
    filled = step()
    assert filled.add_prompt(0, 60, 60) == 60
    assert filled.add_prompt(0, 68, 100) == 0, "30 fit"
    filled = step()
    assert filled.add_prompt(0, 50, 50) == 50
    assert filled.add_prompt(0, 78, 100) == 40


@given(
    costs,
    st.floats(-0.1, 2),
    st.integers(8, 512),
    st.lists(st.tuples(st.integers(0, 999), st.integers(2, 999)), max_size=9),
)
def test_pieces_are_of_the_smallest_chunk_or_larger_and_the_first_prompt_progresses(
    cost: StepCost, longest_s: float, token_budget: int, prompts: list[tuple[int, int]]
) -> None:
    limit = StepLimit(cost, longest_s)
    step, least, used_s = LimitedStep(limit, token_budget), limit.min_tokens(token_budget), 0.0
    for index, (start, uncomputed) in enumerate(prompts):
        most = min(token_budget, uncomputed)
        count = step.add_prompt(start, most, uncomputed)
        assert count == most or count == 0 or (least <= count <= uncomputed - least)
        assert index > 0 or count >= min(most, least)
        used_s += limit.chunk_s(start, count)
        if (index > 0 and count) or count > 2 * least:
            assert cost.base_s + used_s <= longest_s * (1 + 1e-6)
