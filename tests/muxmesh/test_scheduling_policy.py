import math
import random
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.scheduling_policy import FCFS, PolicyName, SchedulingPolicy
from muxmesh.types import SchedulingState, TenantStanding

NOW_S = 1000.0


def policy_of(name: PolicyName, longest_lead: float = 1e9, longest_lead_s: float = 50.0) -> SchedulingPolicy:
    return SchedulingPolicy(name, longest_lead, longest_lead_s, quantum_s=1.0)


def order(policy: SchedulingPolicy, *states: SchedulingState, now_s: float = NOW_S) -> list[int]:
    """Indices of the states, the first to be scheduled first."""
    return sorted(range(len(states)), key=lambda index: policy.sort_key(states[index], now_s))


OLD_LONG = SchedulingState(0, 990.0, prefill_s=1.0, decode_s=30.0, mean_work_s=10.0)
NEW_SHORT = SchedulingState(0, 999.0, prefill_s=0.5, decode_s=1.0, mean_work_s=10.0)


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_a_lower_priority_precedes_everything(name: PolicyName) -> None:
    last = SchedulingState(1, 0.0)
    first = SchedulingState(-1, NOW_S, prefill_s=100.0, decode_s=1000.0, served_s=1000.0, mean_work_s=10.0)
    assert [order(policy_of(name), last, OLD_LONG, first, NEW_SHORT)[index] for index in (0, -1)] == [2, 0]


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_equal_work_is_ordered_by_arrival(name: PolicyName) -> None:
    arrivals_s = [5.0, 3.0, 4.0, 1.0, 2.0]
    states = [SchedulingState(0, arrived_at_s, 0.1, 7.0) for arrived_at_s in arrivals_s]
    assert order(policy_of(name), *states) == [3, 4, 1, 2, 0]


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_without_predictions_every_policy_is_fcfs(name: PolicyName) -> None:
    states = [SchedulingState(0, arrived_at_s) for arrived_at_s in (5.0, 3.0, 4.0)]
    assert order(policy_of(name), *states) == order(FCFS, *states) == [1, 2, 0]


def test_fcfs_ignores_work() -> None:
    assert order(FCFS, NEW_SHORT, OLD_LONG) == [1, 0]


@pytest.mark.parametrize("name", ["sjf", "srtf", "srtf-aged", "hrrn"])
def test_less_work_precedes_more_work(name: PolicyName) -> None:
    assert order(policy_of(name), OLD_LONG, NEW_SHORT) == [1, 0]


def test_sjf_orders_by_total_work_and_srtf_by_remaining_work() -> None:
    nearly_done, fresh = SchedulingState(0, 1.0, 0.0, 1.0, served_s=20.0), SchedulingState(0, 2.0, 0.0, 5.0)
    assert order(policy_of("sjf"), nearly_done, fresh) == [1, 0]
    assert order(policy_of("srtf"), nearly_done, fresh) == [0, 1]


def test_an_aged_request_is_not_overtaken_after_its_handicap() -> None:
    aged = policy_of("srtf-aged", longest_lead=20.0, longest_lead_s=1e9)
    long = SchedulingState(0, 0.0, 1.0, 30.0, mean_work_s=10.0)
    later, much_later = (SchedulingState(0, at_s, 0.0, 0.5, mean_work_s=10.0) for at_s in (199.0, 201.0))
    assert order(aged, long, later) == [1, 0]
    assert order(aged, long, much_later) == [0, 1]


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_an_overdue_request_precedes_all_others_and_overdue_ones_are_in_order_of_arrival(name: PolicyName) -> None:
    policy = replace(policy_of(name), max_wait_s=50.0)
    fresh = SchedulingState(-9, 60.0, decode_s=1.0)
    older, newer = (SchedulingState(9, at_s, decode_s=99.0) for at_s in (10.0, 20.0))
    assert not policy.is_overdue(newer, 69.9) and policy.is_overdue(newer, 70.0)
    keys = {state.arrived_at_s: policy.sort_key(state, 70.0) for state in (fresh, newer, older)}
    assert sorted(keys, key=lambda at_s: keys[at_s]) == [10.0, 20.0, 60.0]
    assert policy.reason(newer, 70.0) == "overdue, before all others: waited 50 s of 50 s"


WORKS_S = st.floats(0, 1e6)


@given(WORKS_S, WORKS_S, WORKS_S, WORKS_S, st.floats(0, 1e5), st.floats(0, 1e3), st.floats(0, 1e4))
def test_no_request_is_overtaken_by_one_that_arrives_after_the_longest_lead(
    work_s: float, mean_work_s: float, other_s: float, later_mean_s: float, at_s: float, later_s: float, lead: float
) -> None:
    aged = policy_of("srtf-aged", lead, longest_lead_s=50.0)
    first = SchedulingState(0, at_s, 0.0, work_s, 0.0, mean_work_s)
    second = SchedulingState(0, at_s + 50.001 + later_s, 0.0, other_s, 0.0, later_mean_s)
    assert order(aged, first, second) == [0, 1]


def test_the_handicap_grows_with_the_ratio_of_work_between_two_bounds() -> None:
    aged = policy_of("srtf-aged", longest_lead=100.0, longest_lead_s=math.inf)

    def handicap_s(work_s: float, mean_work_s: float) -> float:
        half_s = work_s / 2
        return aged.handicap_s(SchedulingState(0, 0.0, half_s, half_s, 0.0, mean_work_s, queued_per_slot=1e9))

    fractions = [handicap_s(work_s, 2.0) / 200 for work_s in (0.0, 0.01, 0.2, math.sqrt(0.2 * 3.0), 3.0, 1e6)]
    assert fractions == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert handicap_s(30.0, 20.0) == 10 * handicap_s(3.0, 2.0)  # scales with the speed of the machine
    assert handicap_s(7.0, 0.0) == handicap_s(7.0, 7.0) > handicap_s(0.0, 0.0) == 0  # the mean is unknown


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6), st.floats(0, 1e4), st.floats(0, 1e4))
def test_a_longer_queue_lowers_no_handicap_of_very_short_and_very_long_requests(
    work_s: float, mean_work_s: float, queued: float, more_queued: float
) -> None:
    state = SchedulingState(0, 0.0, 0.0, work_s, 0.0, mean_work_s, queued_per_slot=min(queued, more_queued))
    aged = policy_of("srtf-aged", 100.0, math.inf)
    before, after = (aged.handicap_s(replace(state, queued_per_slot=each)) for each in sorted((queued, more_queued)))
    assert before >= after
    if not 0.1 * mean_work_s < work_s < 1.5 * mean_work_s or max(queued, more_queued) <= 0.5:
        assert before == after


def test_requests_above_three_quarters_of_the_mean_work_are_ordered_by_arrival_unless_many_wait() -> None:
    aged = policy_of("srtf-aged", 100.0, math.inf)
    one, other = (SchedulingState(0, 0.0, 0.0, work_s, 0.0, mean_work_s=10.0) for work_s in (7.5, 14.0))
    assert aged.handicap_s(one) == aged.handicap_s(other) == 1000
    one, other = (replace(each, queued_per_slot=50.0) for each in (one, other))
    assert aged.handicap_s(one) < aged.handicap_s(other) < aged.handicap_s(replace(other, decode_s=15.0)) == 1000


def test_the_smaller_of_the_two_leads_bounds_the_handicap() -> None:
    long = SchedulingState(0, 0.0, 0.0, 1e6, 0.0, mean_work_s=2.0)
    assert policy_of("srtf-aged", longest_lead=10.0, longest_lead_s=50.0).handicap_s(long) == 20.0
    assert policy_of("srtf-aged", longest_lead=100.0, longest_lead_s=50.0).handicap_s(long) == 50.0


@given(st.floats(1e-3, 1e6), st.floats(1, 100), st.floats(1e-3, 1e6))
def test_the_handicap_does_not_decrease_with_the_work(work_s: float, times: float, mean_work_s: float) -> None:
    less, more = (SchedulingState(0, 0.0, 0.0, each_s, 0.0, mean_work_s) for each_s in (work_s, work_s * times))
    aged = policy_of("srtf-aged", 100.0, math.inf)
    assert aged.handicap_s(less) <= aged.handicap_s(more)


@given(st.floats(0, 1e3), st.floats(1e-2, 1e2), st.floats(1, 1.25))
def test_a_small_change_of_the_mean_work_changes_the_handicap_little(
    work_s: float, mean_work_s: float, factor: float
) -> None:
    aged = policy_of("srtf-aged", 100.0, math.inf)
    before, after = (
        aged.handicap_s(SchedulingState(0, 0.0, 0.0, work_s, 0.0, each_s))
        for each_s in (mean_work_s, mean_work_s * factor)
    )
    assert abs(after - before) <= 0.25 * 100 * mean_work_s + 1e-9


def test_without_a_lead_srtf_aged_is_fcfs() -> None:
    assert order(policy_of("srtf-aged", longest_lead=0.0), NEW_SHORT, OLD_LONG) == [1, 0]


@pytest.mark.parametrize("name", [name for name in get_args(PolicyName) if name != "hrrn"])
def test_only_hrrn_changes_the_order_of_waiting_requests(name: PolicyName) -> None:
    rng = random.Random(1)
    states = [SchedulingState(0, rng.uniform(0, 100), rng.random(), rng.expovariate(0.2)) for _ in range(50)]
    assert order(policy_of(name), *states, now_s=100) == order(policy_of(name), *states, now_s=5000)
    assert order(policy_of("hrrn"), *states, now_s=100) != order(policy_of("hrrn"), *states, now_s=5000)
    assert not policy_of(name).changes_with_time and policy_of("hrrn").changes_with_time


def test_hrrn_scores_by_the_ratio_of_response_time_and_work() -> None:
    key = policy_of("hrrn").sort_key(SchedulingState(0, NOW_S - 10, 1.0, 4.0), NOW_S)
    assert key == (0, -(10 + 5) / 5, NOW_S - 10)


def test_hrrn_treats_an_arrival_in_the_future_as_no_wait() -> None:
    """Clocks of routers may differ."""
    key = policy_of("hrrn").sort_key(SchedulingState(0, NOW_S + 5, 1.0, 4.0), NOW_S)
    assert key == (0, -1.0, NOW_S + 5)


def test_mlfq_starts_at_the_level_of_the_prefill_and_sinks_with_used_quanta() -> None:
    fresh = [SchedulingState(0, 0.0, prefill_s) for prefill_s in (0.5, 1.0, 1.5, 3.0)]
    assert [policy_of("mlfq").sort_key(state, 0.0)[1] for state in fresh] == [0, 0, 1, 2]
    served = [SchedulingState(0, 0.0, 0.0, 9.0, served_s) for served_s in (0.9, 1.0, 2.9, 3.0, 7.0)]
    assert [policy_of("mlfq").sort_key(state, 0.0)[1] for state in served] == [0, 1, 1, 2, 3]


def test_mlfq_does_not_charge_the_levels_that_a_long_prefill_skips() -> None:
    states = [SchedulingState(0, 0.0, prefill_s=3.0, served_s=served_s) for served_s in (0.0, 3.9, 4.0)]
    assert [policy_of("mlfq").sort_key(state, 0.0)[1] for state in states] == [2, 2, 3]


def test_mlfq_has_a_last_level() -> None:
    assert policy_of("mlfq").sort_key(SchedulingState(0, 0.0, 0.0, 1.0, served_s=1e30), 0.0)[1] == 16


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fcfs", "waited 10 s"),
        ("sjf", "33 s of work"),
        ("srtf", "31 s of work left"),
        (
            "srtf-aged",
            "31 s of work left, waited 10 s; could be overtaken by requests that arrive up to 50 s later",
        ),
        ("hrrn", "31 s of work left, waited 10 s: ratio 1.32"),
        ("mlfq", "level 1: 1 s of prefill, 2 s served"),
    ],
)
def test_the_reason_shows_the_values_that_the_policy_uses(name: PolicyName, reason: str) -> None:
    state = SchedulingState(4, 990.0, prefill_s=1.0, decode_s=30.0, served_s=2.0, mean_work_s=10.0)
    assert policy_of(name).reason(state, NOW_S) == f"{name}, priority 4: {reason}"


def test_the_reason_shows_no_negative_wait() -> None:
    assert FCFS.reason(SchedulingState(0, NOW_S + 1), NOW_S) == "fcfs, priority 0: waited 0 s"


@pytest.mark.parametrize(
    ("standing", "text"),
    [
        (TenantStanding(0, -1, True), "its tenant is behind others, or level with them"),
        (TenantStanding(1, -1, True), "its tenant is ahead of others, by a band with its requests before this one"),
        (TenantStanding(7, -1, True), "its tenant is ahead of others, by 7 bands with its requests before this one"),
    ],
)
def test_the_reason_says_whether_the_tenant_is_ahead(standing: TenantStanding, text: str) -> None:
    best, later = (SchedulingState(priority, NOW_S, standing=standing) for priority in (-1, 0))
    assert FCFS.reason(best, NOW_S) == (
        f"fcfs, priority -1: waited 0 s; {text}; its priority has no effect on requests of other tenants"
    )
    assert FCFS.reason(later, NOW_S).endswith(f"{text}; its priority puts it after better classes of its tenant")


def test_an_unset_priority_is_not_said_to_have_no_effect() -> None:
    state = SchedulingState(0, NOW_S, standing=TenantStanding(0, 0, True))
    assert FCFS.reason(state, NOW_S).endswith("level with them")


def test_a_group_of_tenants_outweighs_every_class_and_classes_are_relative_to_the_best_of_the_tenant() -> None:
    behind = SchedulingState(2**31 - 1, 5.0, standing=TenantStanding(0, -(2**31), True))
    ahead = SchedulingState(-(2**31), 0.0, standing=TenantStanding(1, -(2**31), True))
    assert order(FCFS, ahead, behind) == [1, 0]
    flood = SchedulingState(-9, 1.0, standing=TenantStanding(0, -9, True))
    first = SchedulingState(7, 0.0, standing=TenantStanding(0, 7, True))
    assert order(FCFS, flood, first) == [1, 0]
    assert (flood.class_rank, first.class_rank, behind.class_rank) == (0, 0, 2**32 - 1)
