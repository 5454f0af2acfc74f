"""The latency of a request that has the device for itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.config.model_config import ModelConfig, SimProfile
from muxmesh.step_cost import ModelCosts, StepCost
from muxmesh.unloaded_latency import Unloaded, UnloadedCost, UnloadedCosts, unloaded

# A step of n tokens over c earlier ones takes 10 + 1 * n + 0.01 * c ms.
COST = StepCost(0.010, 0.001, 0.00001, mean_seqs=5, mean_context=300)
UNLOADED = Unloaded(COST, COST, chunk=100)


def test_the_unloaded_prefill_is_that_of_the_prompt_alone_in_chunks() -> None:
    # 150 tokens: two steps, 150 tokens, and 0 + 1 + ... + 149 earlier ones.
    assert UNLOADED.ttft_s(150) == pytest.approx(2 * 0.010 + 150 * 0.001 + 149 * 150 / 2 * 0.00001)


def test_the_unloaded_decode_step_is_that_of_one_sequence_whatever_the_batches_were() -> None:
    assert UNLOADED.tpot_s(100) == pytest.approx(0.010 + 0.001 + 100 * 0.00001)
    assert UNLOADED.tpot_s(100, 21) == pytest.approx(0.010 + 0.001 + 110 * 0.00001)


def test_the_unloaded_latency_is_the_prefill_and_a_decode_step_for_each_output_token() -> None:
    assert UNLOADED.e2el_s(150, 21) == pytest.approx(UNLOADED.ttft_s(150) + 21 * UNLOADED.tpot_s(150, 21))


def test_the_sim_engine_has_the_unloaded_latency_of_its_profile_and_another_one_that_of_measured_steps() -> None:
    sim = ModelConfig(name="m", engine="sim", sim=SimProfile(base_s=0.5), prefill_token_budget=64)
    measured = ModelCosts(COST, StepCost(1.0, 0.0, 0.0))
    assert unloaded(sim, None) == unloaded(sim, measured) == Unloaded(StepCost(0.5, 0, 0), StepCost(0.5, 0, 0), 64)
    native = ModelConfig(name="m", prefill_token_budget=64)
    assert unloaded(native, None) is None
    assert unloaded(native, measured) == Unloaded(COST, StepCost(1.0, 0.0, 0.0), 64)


def _cost(base_s: float, mean_seqs: float = 1.0) -> StepCost:
    return StepCost(base_s, 0.0, 0.0, mean_seqs)


def test_the_unloaded_cost_follows_the_first_fits_and_then_stays() -> None:
    cost = UnloadedCost()
    assert cost.cost is None
    for fit in range(1, 31):
        cost.observe(_cost(fit))
        assert cost.cost == _cost(fit)
    for fit in range(31, 1000):
        cost.observe(_cost(fit))
    assert cost.cost == _cost(30)


def test_a_report_without_a_new_step_is_no_other_fit() -> None:
    cost = UnloadedCost()
    for _ in range(100):
        cost.observe(_cost(1))
    cost.observe(_cost(2))
    assert cost.cost == _cost(2)


@given(st.lists(st.tuples(st.floats(0.001, 1e6), st.floats(1, 1024)), max_size=300))
def test_a_load_that_does_not_end_changes_the_unloaded_cost_at_most_31_times(fits: list[tuple[float, float]]) -> None:
    cost = UnloadedCost()
    for fit in range(31):
        cost.observe(_cost(fit, 1024))
    changes = 0
    for base_s, mean_seqs in fits:
        before = cost.cost
        cost.observe(_cost(base_s, mean_seqs))
        changes += cost.cost != before
        assert cost.cost == before or (before is not None and mean_seqs <= 0.8 * before.mean_seqs)
    assert changes <= 31


def test_fits_of_smaller_batches_replace_a_cost_if_they_last() -> None:
    cost = UnloadedCost()
    for fit in range(30):
        cost.observe(_cost(fit, mean_seqs=10))
    for fit in range(7):  # a worker that has restarted, and has much to do soon after
        cost.observe(_cost(100 + fit, mean_seqs=1))
    cost.observe(_cost(107, mean_seqs=9))
    assert cost.cost == _cost(29, mean_seqs=10)
    for fit in range(8):
        cost.observe(_cost(200 + fit, mean_seqs=2))
    assert cost.cost == _cost(207, mean_seqs=2)


def test_the_unloaded_costs_of_a_model_are_those_of_both_workers() -> None:
    costs = UnloadedCosts()
    assert costs.costs is None
    costs.observe(ModelCosts(_cost(1), _cost(2)))
    assert costs.costs == ModelCosts(_cost(1), _cost(2))
