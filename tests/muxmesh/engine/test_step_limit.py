"""How many tokens of prompts fit into the time of a step."""

import math

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.step_limit import MIN_CHUNK_TOKENS, StepLimit
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


def test_the_smallest_chunk_takes_as_long_as_the_fixed_part_of_a_step() -> None:
    assert StepLimit(StepCost(0.04, 0.001, 0.0), 0.0).min_tokens == 40
    assert StepLimit(StepCost(0.0, 0.001, 0.0), 0.0).min_tokens == MIN_CHUNK_TOKENS


def test_a_fit_of_equal_steps_counts_as_one_of_a_cost_for_each_token() -> None:
    limit = StepLimit(StepCost(0.256, 0.0, 0.0), 0.1).resolved(token_budget=128)
    assert limit.num_tokens(0, 0.0) == 50
    known = StepLimit(StepCost(0.1, 0.002, 0.0), 0.1)
    assert known.resolved(128) is known
