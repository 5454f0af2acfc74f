"""Costs of keeping, swapping and computing again: against simple simulations, and the way that is chosen."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.preemption_costs import (
    KvCosts,
    WayCosts,
    expected_wait_s,
    free_after_s,
    keep_cost_s,
    recompute_cost_s,
    swap_cost_s,
)
from muxmesh.kv_cost import CopyRates
from muxmesh.step_cost import StepCost

SECONDS = st.integers(0, 50).map(float)
COSTS = KvCosts(CopyRates(100.0, 50.0), StepCost(0.0, 0.5, 0.0))
"""100 bytes/s out, 50 in, half a second for a token."""


@given(st.integers(1, 4), st.lists(SECONDS, max_size=4), st.lists(SECONDS, max_size=6))
def test_the_expected_wait_is_that_of_a_simulation_second_by_second(
    num_slots: int, running: list[float], before: list[float]
) -> None:
    running = running[:num_slots]
    slots, waiting, now_s = list(running), [*before, -1.0], 0.0
    while True:
        slots = [left for left in slots if left > 0]
        while waiting and len(slots) < num_slots:
            work_s = waiting.pop(0)
            if work_s < 0:  # its own turn
                assert expected_wait_s(num_slots, running, before) == now_s
                return
            if work_s > 0:
                slots.append(work_s)
        slots = [left - 1 for left in slots]
        now_s += 1


@given(st.integers(-3, 30), st.lists(st.tuples(SECONDS, st.integers(1, 9)), max_size=6))
def test_memory_is_free_once_those_that_end_first_held_enough(missing: int, running: list[tuple[float, int]]) -> None:
    after_s = free_after_s(missing, running)
    freed = sum(held for left, held in running if left <= after_s)
    assert freed >= missing or after_s == math.inf
    if 0 < after_s < math.inf:
        assert sum(held for left, held in running if left < after_s) < missing
    if after_s == math.inf:
        assert sum(held for _, held in running) < missing


def test_a_swap_that_ends_before_the_turn_of_the_sequence_costs_only_the_copy_out() -> None:
    assert swap_cost_s(200, 100.0, COSTS) == 2.0
    assert swap_cost_s(200, 5.0, COSTS) == 2.0 + 1.0, "it is a second late: 2 s out, 4 s in"
    assert swap_cost_s(200, 0.0, COSTS, queued_bytes=100) == 3.0 + 7.0


def test_to_compute_again_delays_all_that_the_device_computes() -> None:
    assert recompute_cost_s(10, 0, COSTS) == 5.0
    assert recompute_cost_s(10, 3, COSTS) == 20.0


def test_all_that_wait_for_memory_wait_if_it_is_kept() -> None:
    assert keep_cost_s(2.0, 3) == 6.0 and keep_cost_s(2.0, 0) == 2.0


@pytest.mark.parametrize(
    ("costs", "best"), [((9, 2, 3), "swap"), ((9, 3, 2), "recompute"), ((1, 2, 3), "keep"), ((1, 1, 1), "swap")]
)
def test_the_way_with_the_least_cost_is_best(costs: tuple[float, float, float], best: str) -> None:
    assert WayCosts(*costs).best == best
