import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.latency_curve import (
    Figure,
    arrival_seed,
    expected_loads,
    next_load,
    rate_at,
    run_s,
    sustained_requests_per_s,
)
from loadtest.spec import parse_spec
from loadtest.workload import arrival_times

LEVELS = (0.2, 0.5, 1.0)
MOST = 3.0


def test_the_rate_at_a_level_is_interpolated_where_the_curve_first_exceeds_it() -> None:
    rates, latencies = [1.0, 2.0, 3.0, 4.0], [0.1, 0.3, 0.2, 0.9]
    assert rate_at(rates, latencies, 0.2).value == pytest.approx(1.5)
    assert rate_at(rates, latencies, 0.55) == Figure(3.5)


def test_a_level_outside_a_curve_gives_a_bound() -> None:
    assert rate_at([1.0, 2.0], [0.3, 0.4], 0.5) == Figure(2.0, "at least")
    assert rate_at([1.0, 2.0], [0.3, 0.4], 0.2) == Figure(1.0, "at most")


@pytest.mark.parametrize(
    ("mine", "other", "bound"),
    [
        ("", "", ""),
        ("at least", "", "at least"),
        ("", "at least", "at most"),
        ("", "at most", "at least"),
        ("at least", "at most", "at least"),
        ("at least", "at least", "unknown"),
        ("at most", "at most", "unknown"),
        ("unknown", "", "unknown"),
        ("", "unknown", "unknown"),
    ],
)
def test_a_quotient_of_bounds_is_a_bound_or_unknown(mine: Any, other: Any, bound: str) -> None:
    assert Figure(3.0, mine).over(Figure(2.0, other)) == Figure(1.5, bound)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (Figure(2.0), True),
        (Figure(1.0), False),
        (Figure(2.0, "at least"), True),
        (Figure(1.0, "at least"), None),
        (Figure(2.0, "at most"), None),
        (Figure(1.0, "at most"), False),
        (Figure(2.0, "unknown"), None),
        (Figure(1.0, "unknown"), None),
    ],
)
def test_a_bound_gives_a_verdict_only_where_it_decides(figure: Figure, verdict: bool | None) -> None:
    assert figure.reaches(1.5) is verdict


def test_loads_rise_until_the_main_level_is_exceeded() -> None:
    assert next_load({0.7: 0.1, 1.5: 0.3}, LEVELS, 0.5, MOST) == pytest.approx(2.025)
    assert next_load({0.7: 0.1, 2.8: 0.3}, LEVELS, 0.5, MOST) == MOST


def test_after_that_the_widest_interval_with_a_level_in_it_is_halved() -> None:
    assert next_load({0.7: 0.1, 1.0: 0.15, 1.2: 0.3, 1.5: 0.7}, LEVELS, 0.5, MOST) == pytest.approx(1.35)
    assert next_load({0.7: 0.1, 1.0: 0.15, 1.2: 0.6, 1.5: 2.0}, LEVELS, 0.5, MOST) == pytest.approx(1.35)
    assert next_load({0.7: 0.1, 3.0: 0.15}, LEVELS, 0.5, MOST) == pytest.approx(1.85)


@given(
    st.dictionaries(st.sampled_from([0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 3.0]), st.floats(0.01, 5.0), min_size=2),
)
def test_the_next_load_is_new_and_not_above_the_highest_allowed(curve: dict[float, float]) -> None:
    load = next_load(curve, LEVELS, 0.5, MOST)
    assert load not in curve
    assert min(curve) < load <= MOST


@given(st.floats(0.6, 2.5), st.floats(0.1, 2.0))
def test_the_loads_close_in_on_the_knee(knee: float, slope: float) -> None:
    curve: dict[float, float] = {}
    for load in (0.7, 1.0):
        curve[load] = 0.1 + max(0.0, load - knee) * slope
    for _ in range(20):
        curve[next_load(curve, (0.5,), 0.5, MOST)] = 0.0
        newest = list(curve)[-1]
        curve[newest] = 0.1 + max(0.0, newest - knee) * slope
    loads = sorted(curve)
    found = rate_at(loads, [curve[load] for load in loads], 0.5)
    exact = knee + 0.4 / slope
    assert found.value == (MOST if exact > MOST else pytest.approx(exact, abs=0.01))
    assert found.bound == ("at least" if exact > MOST else "")


def report(tokens: list[float], running: list[int], waiting: list[int], mean_tokens: float) -> dict[str, Any]:
    completed = round(sum(tokens) / mean_tokens)
    return {
        "series": {"output_tokens_per_s": tokens, "running": running, "waiting": waiting},
        "completed": completed,
        "total_output_tokens": completed * mean_tokens,
        "request_throughput": completed / len(tokens),
    }


def test_the_capacity_counts_only_the_seconds_in_which_the_batch_is_full_and_requests_wait() -> None:
    tokens = [5.0, 40.0] + [100.0] * 20 + [60.0, 30.0, 10.0]
    running = [2, 16] + [16] * 20 + [9, 4, 0]
    waiting = [40, 20] + [10] * 19 + [1] + [0, 0, 0]
    assert sustained_requests_per_s(report(tokens, running, waiting, 50.0), 16) == pytest.approx(2.0)


def test_a_run_that_never_fills_the_batch_has_the_throughput_of_the_whole_run() -> None:
    one = report([50.0] * 10, [4] * 10, [0] * 10, 50.0)
    assert sustained_requests_per_s(one, 16) == one["request_throughput"]


def test_with_the_chosen_seed_every_number_of_requests_arrives_at_its_nominal_rate() -> None:
    def times_of(seed: int, count: int) -> list[float]:
        spec = parse_spec(f"rate=1 lengths=D(1,1) requests={count} seed={seed}")
        return list(itertools.islice(arrival_times(spec), count))

    counts = (24, 61, 97)
    seed = arrival_seed(counts, 1000, times_of)
    assert seed >= 1000
    for count in counts:
        assert times_of(seed, count)[-1] == pytest.approx(count - 1, rel=0.03)
    assert seed == arrival_seed(counts, 1000, times_of)


def test_a_run_lasts_as_long_as_its_arrivals_its_backlog_and_its_last_outputs() -> None:
    # One request of 100 tokens per second with 16 at a time: a step takes 0.16 s.
    idle_s = run_s(0.5, 60, 1.0, 100, 256, 16)
    assert idle_s == pytest.approx(60 + 0.6 * 256 * 0.16)
    assert run_s(2.0, 60, 1.0, 100, 256, 16) == pytest.approx(idle_s + 60)


@given(st.integers(1, 9))
def test_the_longest_case_has_as_many_loads_as_points(num_points: int) -> None:
    loads = expected_loads((0.7, 1.0, 1.5), num_points, MOST)
    assert len(loads) == num_points
    assert loads == sorted(loads)
    assert loads[-1] <= MOST


def test_the_longest_case_is_what_a_flat_curve_leads_to() -> None:
    curve = dict.fromkeys((0.7, 1.0, 1.5), 0.1)
    for _ in range(3):
        curve[next_load(curve, LEVELS, 0.5, MOST)] = 0.1
    assert list(curve) == pytest.approx(expected_loads((0.7, 1.0, 1.5), 6, MOST), abs=0.002)


def test_seeds_are_tried_in_order() -> None:
    tried: list[int] = []

    def times_of(seed: int, count: int) -> list[float]:
        tried.append(seed)
        return [0.0] * (count - 1) + [(count - 1) * (1.0 if seed == 12 else random.Random(seed).uniform(2, 3))]

    assert arrival_seed((5,), 10, times_of) == 12
    assert tried == [10, 11, 12]
