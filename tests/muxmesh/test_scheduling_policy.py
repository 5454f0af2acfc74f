import math
import random
from statistics import NormalDist
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.scheduling_policy import FCFS, PolicyName, SchedulingPolicy
from muxmesh.types import LengthPrediction, SchedulingState

NOW_S = 1000.0


def order(policy: PolicyName, longest_lead: float = 1e9, longest_lead_s: float = 50.0) -> SchedulingPolicy:
    return SchedulingPolicy(policy, longest_lead, longest_lead_s, quantum_s=1.0)


def sooner(of: SchedulingPolicy, *schedulings: SchedulingState, now_s: float = NOW_S) -> list[int]:
    return sorted(range(len(schedulings)), key=lambda place: of.sort_key(schedulings[place], now_s))


OLD_LONG = SchedulingState(0, 990.0, prefill_s=1.0, decode_s=30.0, mean_work_s=10.0)
NEW_SHORT = SchedulingState(0, 999.0, prefill_s=0.5, decode_s=1.0, mean_work_s=10.0)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_priority_goes_before_everything(policy: PolicyName) -> None:
    worse = SchedulingState(1, 0.0)
    assert sooner(order(policy), worse, OLD_LONG, NEW_SHORT)[-1] == 0


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_equal_work_goes_by_arrival(policy: PolicyName) -> None:
    arrivals = [5.0, 3.0, 4.0, 1.0, 2.0]
    schedulings = [SchedulingState(0, at_s, 0.1, 7.0) for at_s in arrivals]
    assert sooner(order(policy), *schedulings) == [3, 4, 1, 2, 0]


def test_fcfs_ignores_work() -> None:
    assert sooner(FCFS, NEW_SHORT, OLD_LONG) == [1, 0]


@pytest.mark.parametrize("policy", ["sjf", "srtf", "srtf-aged", "hrrn"])
def test_little_work_goes_before_much(policy: PolicyName) -> None:
    assert sooner(order(policy), OLD_LONG, NEW_SHORT) == [1, 0]


def test_sjf_looks_at_all_work_and_srtf_at_what_is_left() -> None:
    nearly_done, fresh = SchedulingState(0, 1.0, 0.0, 1.0, served_s=20.0), SchedulingState(0, 2.0, 0.0, 5.0)
    assert sooner(order("sjf"), nearly_done, fresh) == [1, 0]
    assert sooner(order("srtf"), nearly_done, fresh) == [0, 1]


def test_whoever_waits_grows_older_until_nobody_new_overtakes_it() -> None:
    aged = order("srtf-aged", longest_lead=20.0, longest_lead_s=1e9)
    long = SchedulingState(0, 0.0, 1.0, 30.0, mean_work_s=10.0)
    later, much_later = (SchedulingState(0, at_s, 0.0, 0.5, mean_work_s=10.0) for at_s in (199.0, 201.0))
    assert sooner(aged, long, later) == [1, 0]
    assert sooner(aged, long, much_later) == [0, 1]


WORKS_S = st.floats(0, 1e6)


@given(WORKS_S, WORKS_S, WORKS_S, WORKS_S, st.floats(0, 1e5), st.floats(0, 1e3), st.floats(0, 1e4))
def test_nobody_is_overtaken_by_who_came_much_later(
    work_s: float, mean_work_s: float, other_s: float, now_typical_s: float, at_s: float, later_s: float, lead: float
) -> None:
    aged = order("srtf-aged", lead, longest_lead_s=50.0)
    first = SchedulingState(0, at_s, 0.0, work_s, 0.0, mean_work_s)
    second = SchedulingState(0, at_s + 50.001 + later_s, 0.0, other_s, 0.0, now_typical_s)
    assert sooner(aged, first, second) == [0, 1]


def test_the_handicap_is_of_ratios_and_has_its_limits_at_little_and_at_much_work() -> None:
    aged = order("srtf-aged", longest_lead=100.0, longest_lead_s=math.inf)

    def handicap_s(work_s: float, mean_work_s: float) -> float:
        return aged.handicap_s(SchedulingState(0, 0.0, work_s / 2, work_s / 2, 0.0, mean_work_s))

    parts = [handicap_s(work_s, 2.0) / 200 for work_s in (0.0, 0.01, 0.2, math.sqrt(0.2 * 3.0), 3.0, 1e6)]
    assert parts == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert handicap_s(30.0, 20.0) == 10 * handicap_s(3.0, 2.0)  # the same on a machine that is ten times slower
    assert handicap_s(7.0, 0.0) == handicap_s(7.0, 7.0) > handicap_s(0.0, 0.0) == 0  # nothing is known of others


@given(st.floats(1e-3, 1e6), st.floats(1, 100), st.floats(1e-3, 1e6))
def test_more_work_is_never_sooner(work_s: float, times: float, mean_work_s: float) -> None:
    less, more = (SchedulingState(0, 0.0, 0.0, each_s, 0.0, mean_work_s) for each_s in (work_s, work_s * times))
    aged = order("srtf-aged", 100.0, math.inf)
    assert aged.handicap_s(less) <= aged.handicap_s(more)


@given(st.floats(0, 1e3), st.floats(1e-2, 1e2), st.floats(1, 1.25))
def test_a_step_of_what_is_typical_moves_a_request_by_little(work_s: float, mean_work_s: float, step: float) -> None:
    aged = order("srtf-aged", 100.0, math.inf)
    before, after = (
        aged.handicap_s(SchedulingState(0, 0.0, 0.0, work_s, 0.0, each_s))
        for each_s in (mean_work_s, mean_work_s * step)
    )
    assert abs(after - before) <= 0.25 * 100 * mean_work_s + 1e-9


def test_without_a_lead_it_is_order_of_arrival() -> None:
    assert sooner(order("srtf-aged", longest_lead=0.0), NEW_SHORT, OLD_LONG) == [1, 0]


def test_the_aged_order_does_not_change_while_nothing_happens() -> None:
    rng = random.Random(1)
    schedulings = [SchedulingState(0, rng.uniform(0, 100), rng.random(), rng.expovariate(0.2)) for _ in range(50)]
    aged = order("srtf-aged")
    assert sooner(aged, *schedulings, now_s=100) == sooner(aged, *schedulings, now_s=5000)
    assert not aged.changes_with_time and order("hrrn").changes_with_time


def test_hrrn_is_the_ratio_of_response_and_work() -> None:
    key = order("hrrn").sort_key(SchedulingState(0, NOW_S - 10, 1.0, 4.0), NOW_S)
    assert key == (0, -(10 + 5) / 5, NOW_S - 10)


def test_mlfq_begins_at_the_level_that_holds_the_prefill_and_sinks() -> None:
    fresh = [SchedulingState(0, 0.0, prefill_s) for prefill_s in (0.5, 1.0, 1.5, 3.0)]
    assert [order("mlfq").sort_key(one, 0.0)[1] for one in fresh] == [0, 0, 1, 2]
    served = [SchedulingState(0, 0.0, 0.0, 9.0, served_s) for served_s in (0.9, 1.0, 2.9, 3.0, 7.0)]
    assert [order("mlfq").sort_key(one, 0.0)[1] for one in served] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_a_reason_names_the_policy_and_the_priority(policy: PolicyName) -> None:
    assert order(policy).reason(OLD_LONG, NOW_S).startswith(f"{policy}, priority 0: ")


def test_what_is_cached_is_no_work() -> None:
    assert SchedulingState(0, 0.0, 2.0, 1.0).with_cached_share(0.75).remaining_s == 1.5


def test_tokens_that_are_out_are_work_done() -> None:
    prediction = LengthPrediction(100, 100)
    later = SchedulingState(0, 0.0, 2.0, 10.0).after_output(40, prediction)
    assert later.prefill_s == 0 and later.decode_s == pytest.approx(6.0) and later.served_s == pytest.approx(6.0)
    assert SchedulingState(0, 0.0, 2.0, 10.0).after_output(40, None).remaining_s == 12


def test_work_is_the_same_whether_it_is_counted_in_one_go_or_in_two() -> None:
    first, prediction = SchedulingState(0, 0.0, 2.0, 10.0), LengthPrediction(100, 300)
    twice = first.after_output(50, prediction).after_output(60, prediction, since=50)
    once = first.after_output(60, prediction)
    assert twice.decode_s == pytest.approx(once.decode_s) and twice.prefill_s == 0
    assert first.after_output(60, prediction, prefill_again=True).prefill_s == 2.0


@given(st.floats(1, 1e4), st.floats(1.01, 50), st.integers(0, 100_000))
def test_remaining_tokens_are_the_median_of_the_tail(p50: float, ratio: float, out: int) -> None:
    prediction = LengthPrediction(p50, p50 * ratio)
    left = prediction.remaining_tokens(out)
    assert left >= 1 and math.isfinite(left)
    lengths = NormalDist(math.log(p50), math.log(ratio) / NormalDist().inv_cdf(0.9))
    beyond = 1 - lengths.cdf(math.log(max(out, 1)))
    if out and beyond > 1e-6 and left > 1:
        assert 1 - lengths.cdf(math.log(out + left)) == pytest.approx(beyond / 2, rel=0.02)


def test_who_outlives_an_uncertain_prediction_is_expected_to_go_on_longer() -> None:
    sure, unsure = LengthPrediction(100, 110), LengthPrediction(100, 1000)
    assert sure.remaining_tokens(150) < 10 < 80 < unsure.remaining_tokens(150)
    assert sure.remaining_tokens(10_000) < unsure.remaining_tokens(10_000)
