"""Fairness between tenants in virtual time: the unit, the router's queue and the choice of batches are the mesh's own.

Steps take 10 ms, whatever they compute, so a second of the device is 100 steps of a full batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from muxmesh.fairness import Fairness
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from simulator.simulated_request import SimulatedRequest
from tests.support.simulations import STEP_S, make_sketch, run_simulation, sim_mesh, sim_model
from tests.support.unit_bench import TOKENS_PER_MIB, Bench

SLOTS = 16
AGED = SchedulingPolicy("srtf-aged", 100.0, 1e9, 0.5)
POLICIES = [FCFS, AGED]
TOKENS_PER_DEVICE_S = SLOTS / STEP_S


class Tenants:
    """A bench with the output tokens of each tenant every half second."""

    def __init__(
        self,
        policy: SchedulingPolicy = AGED,
        fairness: Fairness | None = Fairness(),  # noqa: B008
        slots: int = SLOTS,
        **unit: Any,
    ) -> None:
        config = sim_mesh(sim_model(slots=slots, max_paused_seqs=slots), **({"pool": "2GiB"} | unit))
        self.bench = Bench(config, policy, fairness=fairness)
        self.tokens: list[Mapping[str, int]] = []

    def send(
        self, tenant: str, number: int, num_output: int, at_s: float = 0.0, **fields: Any
    ) -> list[SimulatedRequest]:
        """Queues requests at once, in the order of their numbers."""
        work_s = (num_output - 1) * STEP_S
        given: dict[str, Any] = {"num_prompt": 20, "tenant": tenant, "work_s": work_s, **fields}
        times = (at_s + index * 1e-6 for index in range(number))
        return [self.bench.request_at(one, num_output=num_output, **given) for one in times]

    def run_until(self, end_s: float) -> Mapping[str, int]:
        """Runs to ``end_s``, and returns the output tokens of each tenant by then."""
        timeline = self.bench.timeline

        def sample() -> None:
            self.tokens.append(self.bench.unit.count_tokens())
            if timeline.now_s < end_s - 1e-9:
                timeline.at(timeline.now_s + 0.5, sample)

        timeline.at(0.5, sample)
        timeline.run(end_s)
        return self.bench.unit.count_tokens()

    @property
    def largest_distance_s(self) -> float:
        """Seconds of the device by which the services of two tenants were apart at most, by their output tokens."""
        return max(max(one.values()) - min(one.values()) for one in self.tokens) / TOKENS_PER_DEVICE_S


def jain(values: Mapping[str, float]) -> float:
    """Jain's index: 1 if all values are equal."""
    return sum(values.values()) ** 2 / (len(values) * sum(value**2 for value in values.values()))


def start_delay_steps(request: SimulatedRequest) -> float:
    return request.record.ttft_s / STEP_S


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_two_backlogged_tenants_get_equal_service_though_one_sends_ten_times_as_much(policy: SchedulingPolicy) -> None:
    tenants = Tenants(policy)
    tenants.send("flood", 1500, 50)
    tenants.send("b", 150, 150)
    assert jain(tenants.run_until(20.0)) > 0.998
    longest_s = 150 * STEP_S
    assert tenants.largest_distance_s < Fairness().band_s + longest_s, "the band and one full batch"


def test_without_fairness_the_flood_gets_what_it_sends() -> None:
    tenants = Tenants(FCFS, fairness=None)
    tenants.send("flood", 1000, 50)
    tenants.send("b", 100, 150, at_s=0.5)
    assert set(tenants.run_until(5.0)) == {"flood"}


def test_a_tenant_of_weight_2_gets_twice_the_service() -> None:
    tenants = Tenants()
    tenants.send("a", 800, 50, tenant_weight=2.0)
    tenants.send("b", 600, 50)
    tokens = tenants.run_until(25.0)
    assert tokens["a"] / tokens["b"] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize(("num_output", "num_prompt", "priority"), [(100, 20, -1), (20, 128, 0), (100, 1280, -5)])
def test_a_flood_delays_a_small_request_of_another_tenant_by_two_steps(
    policy: SchedulingPolicy, num_output: int, num_prompt: int, priority: int
) -> None:
    """The flood may be of the best class, of long prompts or of the 64 outputs of many requests."""
    tenants = Tenants(policy)
    tenants.send("flood", 640, num_output, num_prompt=num_prompt, priority=priority)
    small = [tenants.send("b", 1, 20, at_s, priority=3)[0] for at_s in (0.005, 1.005, 3.3337)]
    tenants.run_until(5.0)
    assert max(start_delay_steps(one) for one in small) <= 2 + 1, "two steps and its own prefill"


def test_a_tenant_that_returns_has_no_credit_for_its_absence() -> None:
    tenants = Tenants()
    tenants.send("a", 1000, 50)
    tenants.send("b", 50, 50)
    tenants.send("b", 500, 50, at_s=15.0)
    tokens = tenants.run_until(25.0)
    before = tenants.tokens[29]
    gained = {name: tokens[name] - before[name] for name in "ab"}
    assert jain(gained) > 0.99


def test_short_requests_go_first_within_the_band_and_get_no_more_than_their_share() -> None:
    tenants = Tenants()
    long = tenants.send("long", 100, 1000)
    short = tenants.send("short", 1200, 20)
    tokens = tenants.run_until(20.0)
    assert jain(tokens) > 0.98
    assert (
        abs(tokens["short"] - tokens["long"]) / TOKENS_PER_DEVICE_S < 2 * Fairness().band_s + 1000 * STEP_S / SLOTS * 4
    )
    assert max(one.num_preemptions for one in long) <= 8
    assert max(one.record.pieces[0][0] for one in short[:4]) < 3.5 * STEP_S, "though the long ones came first"


def test_a_tenant_alone_gets_everything() -> None:
    tenants, without = Tenants(), Tenants(fairness=None)
    for one in (tenants, without):
        one.send("a", 300, 50)
    assert tenants.run_until(5.0) == without.run_until(5.0)


def test_requests_without_a_tenant_are_those_of_one_tenant() -> None:
    decisions = []
    for fairness in (Fairness(), None):
        tenants = Tenants(fairness=fairness)
        for index in range(60):
            tenants.send("", 1, 10 + index * 7 % 90, at_s=index * 0.013, priority=index % 3 - 1)
        tenants.bench.run()
        decisions.append(tenants.bench.decisions)
    assert decisions[0] == decisions[1]


def test_overdue_requests_of_one_tenant_do_not_shut_out_another_one() -> None:
    tenants = Tenants(SchedulingPolicy("srtf-aged", 100.0, 1e9, 0.5, max_wait_s=3.0))
    tenants.send("flood", 2000, 50)
    small = tenants.send("b", 3, 20, at_s=10.0)
    tenants.run_until(12.0)
    assert max(start_delay_steps(one) for one in small) <= 3


@pytest.mark.parametrize("max_wait_s", [2.0, None])
def test_an_overdue_request_of_the_last_class_starts_though_its_tenant_has_others(max_wait_s: float | None) -> None:
    tenants = Tenants(SchedulingPolicy("fcfs", 0.0, 0.0, 1.0, max_wait_s=max_wait_s or math.inf))
    tenants.send("a", 400, 50)
    tenants.send("b", 20, 50, at_s=0.1)
    (last,) = tenants.send("b", 1, 10, at_s=0.10003, priority=5)
    tenants.send("b", 200, 50, at_s=0.1001)
    tenants.run_until(4.0)
    assert bool(last.record.pieces) == (max_wait_s is not None)
    assert not last.record.pieces or 2.0 < last.record.pieces[0][0] < 2.5


def test_tenants_are_fair_in_a_small_pool_whose_sequences_are_swapped_and_computed_again() -> None:
    assert TOKENS_PER_MIB < SLOTS * 200
    tenants = Tenants(pool="1MiB", slab="64KiB", kv_swap="512KiB")
    tenants.send("a", 150, 30)
    tenants.send("b", 25, 200)
    tokens = tenants.run_until(4.0)
    assert jain(tokens) > 0.95
    tenants.bench.run()
    use = tenants.bench.unit.use
    assert use.num_swapped + use.num_requeued > 0


def test_the_simulation_of_a_workload_has_tenants_and_weights() -> None:
    sketches = [make_sketch(index, 0.0, num_output=50, tenant="ab"[index % 2]) for index in range(400)]
    config = sim_mesh(sim_model(slots=SLOTS))
    records = run_simulation(sketches, config, tenant_weights={"a": 3.0}).run.records
    half_s = max(one.ended_s or 0.0 for one in records) / 2
    ended = Counter(one.tenant for one in records if (one.ended_s or 0.0) < half_s)
    assert ended["a"] / ended["b"] == pytest.approx(3.0, rel=0.25)


def test_the_decision_says_whether_the_tenant_is_ahead_and_that_a_class_has_no_effect_on_others() -> None:
    tenants = Tenants()
    tenants.send("flood", 40, 50, priority=-1)
    tenants.send("b", 20, 20, at_s=0.1)
    tenants.run_until(2.0)
    first_of_b = next(one for one in tenants.bench.decisions if tenants.bench.requests[one.index].tenant == "b")
    assert first_of_b.reason.endswith("its tenant is behind others, or level with them")
    assert tenants.bench.decisions[0].reason.endswith("later"), "there were no other tenants then"
    during = next(
        one.reason
        for one in tenants.bench.decisions
        if "ahead of others" in one.reason and tenants.bench.requests[one.index].tenant == "flood"
    )
    assert during.endswith("its priority has no effect on requests of other tenants")
