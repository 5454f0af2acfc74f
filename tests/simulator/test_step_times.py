import pytest

from muxmesh.config.model_config import SimProfile
from muxmesh.step_cost import StepCost, StepShape
from simulator.step_times import LinearStepTimes, linear_slowdown, no_slowdown, unloaded_latency

COST = StepCost(0.01, 0.001, 0.0001)


def test_the_whole_device_takes_the_time_of_the_linear_cost() -> None:
    times = LinearStepTimes(COST)
    assert times.prefill_s(StepShape(100, 50, 3), 1.0) == pytest.approx(0.01 + 0.1 + 0.005)
    assert times.decode_cost(8, 1.0) == pytest.approx((0.018, 0.0001))


def test_each_role_scales_with_its_share_by_its_own_part() -> None:
    profile = SimProfile(base_s=0.01, per_token_s=0.001, per_context_s=0.0001, prefill_scaling=1.0, decode_scaling=0.5)
    times = LinearStepTimes.of(profile)
    assert times.prefill_s(StepShape(10, 0, 1), 0.25) == pytest.approx(4 * 0.02)
    assert times.decode_cost(10, 0.25) == pytest.approx((2.5 * 0.02, 2.5 * 0.0001))


def test_steps_are_slower_the_more_others_compute() -> None:
    slowdown = linear_slowdown(0.5, overhead=1.1)
    assert [slowdown(others) for others in (0.0, 1.0)] == pytest.approx([1.1, 1.65])
    assert no_slowdown(1.0) == 1.0


@pytest.mark.parametrize(("contention", "overhead"), [(-0.1, 1.0), (0.0, 0.9)])
def test_a_slowdown_that_speeds_up_is_refused(contention: float, overhead: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and 1"):
        linear_slowdown(contention, overhead)


def test_the_unloaded_latency_of_a_linear_cost_is_that_of_its_steps() -> None:
    found = unloaded_latency(LinearStepTimes(COST, 0.5, 0.5), chunk=64)
    assert found.ttft_s(300) == pytest.approx(COST.prefill_s(300, chunk=64))
    assert found.tpot_s(300, 11) == pytest.approx(COST.step_s(1, 305))
