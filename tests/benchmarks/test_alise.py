import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.alise_effort import CAP, Effort, Speed, expected_s
from benchmarks.alise_outcome import TAILS, Point, judged, level_inside, rate_of, table
from benchmarks.report import Report
from benchmarks.vs_vllm import BATCH_CAP

ABOUT = {"minutes_of_arrivals": 1.0}


def point(
    load: float, normalized_s: float, rate: float | None = None, tail_ms: float = 1000.0, failed: int = 0
) -> Point:
    tails_ms = dict.fromkeys(TAILS, tail_ms)
    return Point(load, load if rate is None else rate, normalized_s, tails_ms, 200.0, 100.0, 60, failed)


def curve(*latencies: float, scale: float = 1.0) -> list[Point]:
    """Points at the loads 1, 2, 3, ... of a system with the capacity ``scale``."""
    return [point(load, latency, load * scale) for load, latency in enumerate(latencies, 1)]


def bars(runs: dict[str, Sequence[Point]]) -> dict[str, dict[str, object]]:
    report = Report("alise")
    judged(report, runs, ABOUT)
    return {bar["name"]: bar for bar in report.bars}


def test_the_rate_at_a_level_does_not_depend_on_the_order_of_the_runs() -> None:
    points = curve(0.1, 0.3, 0.7)
    assert rate_of(points, 0.5).value == pytest.approx(2.5)
    assert rate_of(points[::-1], 0.5) == rate_of(points, 0.5)


def test_the_level_inside_all_curves_is_in_their_common_range() -> None:
    assert level_inside({"ours": curve(0.1, 0.4), "fcfs": curve(0.2, 0.9)}) == pytest.approx(0.28)
    assert level_inside({"ours": curve(0.1, 0.2), "fcfs": curve(0.3, 0.9)}) is None


def test_rates_at_the_main_level_are_judged() -> None:
    found = bars({"ours": curve(0.1, 0.2, 0.3, 0.7), "fcfs": curve(0.2, 0.8), "vllm": curve(0.2, 0.8, scale=0.5)})
    fcfs = found["rate at 0.5 s/token, ours / fcfs"]
    assert (fcfs["value"], fcfs["ok"], fcfs["is_reached"]) == (pytest.approx(3.5 / 1.5), True, True)
    vllm = found["rate at 0.5 s/token, ours / vllm"]
    assert (vllm["value"], vllm["ok"], vllm["is_reached"]) == (pytest.approx(3.5 / 0.75), True, True)
    assert found["rate at 0.2 s/token, ours / fcfs"]["ok"] is None


def test_a_curve_that_ends_below_the_level_gives_a_bound_which_is_judged_only_if_it_decides() -> None:
    found = bars({"ours": curve(0.1, 0.2, 0.3, 0.4), "fcfs": curve(0.2, 0.8)})
    assert found["rate at 0.5 s/token, ours / fcfs (at least)"]["ok"] is True
    found = bars({"ours": curve(0.1, 0.2), "fcfs": curve(0.2, 0.8)})
    assert found["rate at 0.5 s/token, ours / fcfs (at least)"]["ok"] is None


def test_tails_are_compared_at_the_rates_that_both_systems_had() -> None:
    ours = [point(1.0, 0.1, tail_ms=1000), point(1.5, 0.2, tail_ms=4000), point(2.0, 0.3, tail_ms=9000)]
    fcfs = [point(1.0, 0.2, tail_ms=1000), point(1.5, 0.6, tail_ms=1000), point(1.35, 0.4, tail_ms=2000)]
    found = bars({"ours": ours, "fcfs": fcfs})
    assert found["p99_e2el_ms at load 1.5, ours / fcfs"]["value"] == 4.0
    assert "p99_e2el_ms at load 2, ours / fcfs" not in found
    mean = found["p99_e2el_ms, geometric mean over equal rates, ours / fcfs"]
    assert (mean["value"], mean["ok"], mean["is_reached"]) == (pytest.approx(2.0), False, False)
    assert found["p90_e2el_ms, geometric mean over equal rates, ours / fcfs"]["ok"] is None


def test_a_failed_request_misses_a_bar() -> None:
    report = Report("alise")
    judged(report, {"ours": [point(1.0, 0.1), point(2.0, 0.2, failed=1)]}, ABOUT)
    assert not report.holds()


def test_a_later_judgement_replaces_the_earlier_one_and_is_json() -> None:
    report = Report("alise")
    for count in (1, 2):
        judged(report, {"ours": curve(0.1, 0.6)[:count], "fcfs": curve(0.2, 0.9)[:count]}, ABOUT)
    assert len({bar["name"] for bar in report.bars}) == len(report.bars)
    assert json.loads(json.dumps(report.figures))["normalized_s"] == {"ours": [0.1, 0.6], "fcfs": [0.2, 0.9]}


def test_a_point_of_several_runs_has_their_means_and_all_their_requests() -> None:
    mean = Point.mean([point(2.0, 0.1, tail_ms=1000), point(2.0, 0.3, tail_ms=3000, failed=1)])
    assert mean == replace(point(2.0, 0.2, tail_ms=2000, failed=1), num_completed=120)


def test_the_table_has_a_row_for_each_run_by_rising_load() -> None:
    rows = table({"ours": [point(1.5, 0.3), point(1.0, 0.1)], "fcfs": [point(1.0, 0.2)]}).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["ours, 1", "ours, 1.5", "fcfs, 1"]
    assert {row.count("|") for row in rows} == {9}


def test_systems_that_predict_learn_from_more_requests() -> None:
    effort = Effort((0.7, 1.0), 6, 60, 96)
    assert effort.num_at_once("ours") == 96
    assert effort.num_at_once("fcfs") == effort.num_at_once("vllm") == 48
    assert Effort((0.7, 1.0), 6, 60, 10).num_at_once("fcfs") == 2 * BATCH_CAP


def test_the_expected_time_grows_with_everything_that_is_measured() -> None:
    effort = Effort((0.7, 1.0, 1.2, 1.5), 6, 60, 96)
    base_s = expected_s(["ours", "fcfs"], effort)
    assert expected_s(["ours", "fcfs", "vllm"], effort) > base_s
    assert expected_s(["ours", "fcfs"], Effort(effort.loads, 7, 60, 96)) > base_s
    assert expected_s(["ours", "fcfs"], Effort(effort.loads, 6, 90, 96)) > base_s
    assert expected_s(["ours", "fcfs"], Effort(effort.loads, 6, 60, 160)) > base_s


def test_only_rates_that_our_systems_share_are_repeated() -> None:
    effort = Effort((0.7, 1.0), 3, 60, 96, num_repeats=2)
    assert [effort.repeats_of("ours", turn) for turn in range(3)] == [2, 2, 1]
    assert [effort.repeats_of("vllm", turn) for turn in range(3)] == [1, 1, 1]
    once = Effort((0.7, 1.0), 3, 60, 96)
    speed = Speed(1.0, 145)
    shared_s = sum(speed.run_s(load, 60) for load in effort.loads)
    assert speed.all_runs_s("fcfs", effort) - speed.all_runs_s("fcfs", once) == pytest.approx(shared_s)
    assert speed.all_runs_s("vllm", effort) == speed.all_runs_s("vllm", once)


def test_a_slower_system_needs_longer_for_its_last_outputs() -> None:
    fast_s, slow_s = (Speed(rate, 100).run_s(1.0, 60) for rate in (1.0, 0.5))
    assert slow_s - fast_s == pytest.approx(0.6 * CAP * BATCH_CAP * (1 / 50 - 1 / 100))
