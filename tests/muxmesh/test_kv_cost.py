import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.kv_cost import (
    CopyRates,
    break_even_bytes_per_s,
    copy_s,
    crossover_tokens,
    recompute_s,
    swap_s,
)
from muxmesh.step_cost import StepCost

COST = StepCost(0.01, 1e-3, 1e-6)
rates = st.floats(1e6, 1e12)
sizes = st.integers(1, 1 << 40)
costs = st.builds(StepCost, st.floats(0, 0.1), st.floats(1e-7, 1e-2), st.floats(0, 1e-6))


def test_a_swap_takes_both_copies_and_the_calls() -> None:
    assert copy_s(50, 100.0) == 0.5
    assert swap_s(50, CopyRates(100.0, 25.0, fixed_s=0.25)) == 0.25 + 0.5 + 2.0


def test_what_the_prefix_cache_holds_is_neither_copied_in_nor_computed() -> None:
    assert swap_s(50, CopyRates(100.0, 25.0), in_bytes=0) == 0.5
    assert recompute_s(256, COST, num_cached_tokens=256) == 0.0
    assert recompute_s(256, COST, num_cached_tokens=300) == 0.0
    assert recompute_s(256, COST, 128) == pytest.approx(recompute_s(256, COST) - recompute_s(128, COST))


def test_nothing_is_copied_in_no_time_and_at_no_rate_never() -> None:
    assert copy_s(0, 0.0) == 0.0
    assert copy_s(1, 0.0) == math.inf


def test_recomputing_takes_what_its_steps_take() -> None:
    """Against a loop over the steps."""
    steps_s = sum(COST.step_s(1, sum(range(n, n + 1))) - COST.base_s for n in range(300)) + 3 * COST.base_s
    assert recompute_s(300, COST, chunk=128) == pytest.approx(steps_s)


@given(num_bytes=sizes, seconds=st.floats(1e-6, 1e3), fixed_s=st.floats(0, 0.01))
def test_at_the_break_even_rate_both_take_the_same(num_bytes: int, seconds: float, fixed_s: float) -> None:
    rate = break_even_bytes_per_s(num_bytes, seconds, fixed_s)
    if math.isinf(rate):
        assert seconds <= fixed_s
    else:
        assert swap_s(num_bytes, CopyRates(rate, rate, fixed_s)) == pytest.approx(seconds)


@given(token_bytes=st.integers(1, 1 << 20), rate=rates, fixed_s=st.floats(0, 0.01), cost=costs)
def test_from_the_crossover_on_a_swap_is_no_slower_and_just_before_it_is(
    token_bytes: int, rate: float, fixed_s: float, cost: StepCost
) -> None:
    def swapped(tokens: int) -> float:
        return swap_s(tokens * token_bytes, CopyRates(rate, rate, fixed_s))

    def recomputed(tokens: int) -> float:
        return recompute_s(tokens, cost)

    first = crossover_tokens(swapped, recomputed, 400)
    if first is None:
        assert swapped(400) > recomputed(400)
    else:
        assert all(swapped(tokens) <= recomputed(tokens) for tokens in range(first, 401))
        assert first == 1 or swapped(first - 1) > recomputed(first - 1)


@given(num_tokens=st.integers(1, 5000), cached=st.integers(0, 5000), cost=costs)
def test_a_cached_prefix_never_costs_more(num_tokens: int, cached: int, cost: StepCost) -> None:
    assert 0 <= recompute_s(num_tokens, cost, cached) <= recompute_s(num_tokens, cost) * (1 + 1e-9)
