import math
import random
from statistics import NormalDist
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.order import FCFS, Order, Policy
from muxmesh.types import LengthPrediction, Standing

NOW_S = 1000.0


def order(policy: Policy, aging: float = 0.1, longest_lead_s: float = 50.0, quantum_s: float = 1.0) -> Order:
    return Order(policy, aging, 1e9, longest_lead_s, quantum_s)


def sooner(of: Order, *standings: Standing, now_s: float = NOW_S) -> list[int]:
    return sorted(range(len(standings)), key=lambda place: of.key(standings[place], now_s))


OLD_LONG = Standing(0, 990.0, prefill_s=1.0, decode_s=30.0)
NEW_SHORT = Standing(0, 999.0, prefill_s=0.5, decode_s=1.0)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_priority_goes_before_everything(policy: Policy) -> None:
    worse = Standing(1, 0.0)
    assert sooner(order(policy), worse, OLD_LONG, NEW_SHORT)[-1] == 0


@pytest.mark.parametrize("policy", get_args(Policy))
def test_equal_work_goes_by_arrival(policy: Policy) -> None:
    arrivals = [5.0, 3.0, 4.0, 1.0, 2.0]
    standings = [Standing(0, at_s, 0.1, 7.0) for at_s in arrivals]
    assert sooner(order(policy), *standings) == [3, 4, 1, 2, 0]


def test_fcfs_ignores_work() -> None:
    assert sooner(FCFS, NEW_SHORT, OLD_LONG) == [1, 0]


@pytest.mark.parametrize("policy", ["sjf", "srtf", "srtf-aged", "hrrn"])
def test_little_work_goes_before_much(policy: Policy) -> None:
    assert sooner(order(policy), OLD_LONG, NEW_SHORT) == [1, 0]


def test_sjf_looks_at_all_work_and_srtf_at_what_is_left() -> None:
    nearly_done, fresh = Standing(0, 1.0, 0.0, 1.0, served_s=20.0), Standing(0, 2.0, 0.0, 5.0)
    assert sooner(order("sjf"), nearly_done, fresh) == [1, 0]
    assert sooner(order("srtf"), nearly_done, fresh) == [0, 1]


def test_whoever_waits_grows_older_until_nobody_new_overtakes_it() -> None:
    aged = order("srtf-aged", aging=0.1, longest_lead_s=1e9)  # 29.5 s more work is 295 s of waiting
    later = Standing(0, OLD_LONG.arrived_at_s + 290, NEW_SHORT.prefill_s, NEW_SHORT.decode_s)
    much_later = Standing(0, OLD_LONG.arrived_at_s + 300, NEW_SHORT.prefill_s, NEW_SHORT.decode_s)
    assert sooner(aged, OLD_LONG, later) == [1, 0]
    assert sooner(aged, OLD_LONG, much_later) == [0, 1]


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e5), st.floats(0, 1e3), st.floats(1e-3, 10))
def test_nobody_is_overtaken_by_who_came_much_later(
    work_s: float, other_s: float, arrived_at_s: float, later_s: float, aging: float
) -> None:
    aged = order("srtf-aged", aging, longest_lead_s=50.0)
    first, second = Standing(0, arrived_at_s, 0.0, work_s), Standing(0, arrived_at_s + 50.001 + later_s, 0.0, other_s)
    assert sooner(aged, first, second) == [0, 1]


def test_the_longest_lead_grows_with_the_typical_work() -> None:
    def handicap_s(typical_s: float) -> float:
        aged = Order("srtf-aged", 0.1, 20.0, math.inf, 1.0)
        return aged.key(Standing(0, 0.0, 0.0, 1e6, 0.0, typical_s), NOW_S)[1]

    assert [handicap_s(typical_s) for typical_s in (0.5, 5.0)] == [10, 100]
    assert handicap_s(0.0) == 1e7  # nothing is known of others


def test_the_aged_order_does_not_change_while_nothing_happens() -> None:
    rng = random.Random(1)
    standings = [Standing(0, rng.uniform(0, 100), rng.random(), rng.expovariate(0.2)) for _ in range(50)]
    aged = order("srtf-aged")
    assert sooner(aged, *standings, now_s=100) == sooner(aged, *standings, now_s=5000)
    assert not aged.moves and order("hrrn").moves


def test_hrrn_is_the_ratio_of_response_and_work() -> None:
    key = order("hrrn").key(Standing(0, NOW_S - 10, 1.0, 4.0), NOW_S)
    assert key == (0, -(10 + 5) / 5, NOW_S - 10)


def test_mlfq_begins_at_the_level_that_holds_the_prefill_and_sinks() -> None:
    fresh = [Standing(0, 0.0, prefill_s) for prefill_s in (0.5, 1.0, 1.5, 3.0)]
    assert [order("mlfq").key(one, 0.0)[1] for one in fresh] == [0, 0, 1, 2]
    served = [Standing(0, 0.0, 0.0, 9.0, served_s) for served_s in (0.9, 1.0, 2.9, 3.0, 7.0)]
    assert [order("mlfq").key(one, 0.0)[1] for one in served] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_reason_names_the_policy_and_the_priority(policy: Policy) -> None:
    assert order(policy).reason(OLD_LONG, NOW_S).startswith(f"{policy}, priority 0: ")


def test_what_is_cached_is_no_work() -> None:
    assert Standing(0, 0.0, 2.0, 1.0).prefilled(0.75).left_s == 1.5


def test_tokens_that_are_out_are_work_done() -> None:
    prediction = LengthPrediction(100, 100)
    later = Standing(0, 0.0, 2.0, 10.0).after(40, prediction)
    assert later.prefill_s == 0 and later.decode_s == pytest.approx(6.0) and later.served_s == pytest.approx(6.0)
    assert Standing(0, 0.0, 2.0, 10.0).after(40, None).left_s == 12


def test_work_is_the_same_whether_it_is_counted_in_one_go_or_in_two() -> None:
    first, prediction = Standing(0, 0.0, 2.0, 10.0), LengthPrediction(100, 300)
    twice = first.after(50, prediction).after(60, prediction, since=50)
    once = first.after(60, prediction)
    assert twice.decode_s == pytest.approx(once.decode_s) and twice.prefill_s == 0
    assert first.after(60, prediction, prefill_again=True).prefill_s == 2.0


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
