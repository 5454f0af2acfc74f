"""Figures of reports: from records with known times, and from runs against a server with known latencies."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.record import INTERRUPTED, Record, Run
from loadtest.report import METRICS, PERCENTILES, About, Goodput, bottleneck, build_report, figures
from loadtest.slo import Objectives, Unloaded
from loadtest.target import TargetError
from loadtest.workload import PlannedRequest
from muxmesh.slo import Slo
from tests.support.loadtest_reports import make_record
from tests.support.loadtest_target import StubTarget, drive

ABOUT = About("stub", "a stub", ["m"], "", "today")


def report_of(*records: Record, duration_s: float = 10.0, **run: Any) -> dict[str, Any]:
    return build_report(ABOUT, Run(list(records), duration_s, **run))


def test_every_figure_is_that_of_the_server() -> None:
    target = StubTarget()
    report = build_report(ABOUT, drive(target))
    served = [target.served[index] for index in range(2000)]
    e2els_s = [one.times_s[-1] - one.start_s for one in served]
    expected_s = {
        "ttft": [one.times_s[0] - one.start_s for one in served],
        "tpot": [(t[-1] - t[0]) / (len(t) - 1) for t in (one.times_s for one in served) if len(t) > 1],
        "itl": [gap for one in served for gap in np.diff(one.times_s)],
        "e2el": e2els_s,
    }
    for name in METRICS:
        values_ms = 1000 * np.array(expected_s[name])
        for percentile in PERCENTILES:
            expected_ms = np.percentile(values_ms, percentile)
            assert report[f"p{percentile}_{name}_ms"] == pytest.approx(expected_ms, rel=0.02, abs=1)
        assert report[f"mean_{name}_ms"] == pytest.approx(values_ms.mean(), rel=0.001)
        assert report[f"std_{name}_ms"] == pytest.approx(values_ms.std(), rel=0.001)
    assert report["completed"] == 2000
    assert report["total_output_tokens"] == sum(len(one.times_s) for one in served)
    assert report["duration"] == pytest.approx(max(one.times_s[-1] for one in served))
    assert report["output_throughput"] == pytest.approx(report["total_output_tokens"] / report["duration"])
    assert sum(report["series"]["output_tokens_per_s"]) == pytest.approx(report["total_output_tokens"])
    normalized = [e2el_s / len(one.times_s) for e2el_s, one in zip(e2els_s, served, strict=True)]
    assert report["mean_normalized_latency_s_per_token"] == pytest.approx(np.mean(normalized))


def test_waiting_and_running_requests_over_time() -> None:
    target = StubTarget(stall_at_s=20.0, stall_s=5.0)
    report = build_report(ABOUT, drive(target, "rate=20 lengths=U(10,50)/(2,40) requests=800 seed=3"))
    series = report["series"]
    assert len(series["waiting"]) == len(series["running"]) == len(series["output_tokens_per_s"])
    assert series["waiting"][23] > 60, "20 requests a second arrive during the stall"
    assert max(series["waiting"][:19]) < 15
    assert sum(series["output_tokens_per_s"][20:24]) < series["output_tokens_per_s"][18]
    totals = [waiting + running for waiting, running in zip(series["waiting"], series["running"], strict=True)]
    assert report["max_concurrent_requests"] >= max(totals)


def test_errors_are_counted_by_status() -> None:
    def failure(request: PlannedRequest) -> TargetError | None:
        return TargetError("RESOURCE_EXHAUSTED", "full") if request.index % 4 == 0 else None

    run = drive(StubTarget(failure=failure), "rate=20 lengths=D(5,5) requests=200")
    report = build_report(ABOUT, run, Goodput(ttft_ms=1e9))
    assert report["errors"] == {"RESOURCE_EXHAUSTED": {"count": 50, "messages": ["full"]}}
    assert (report["completed"], report["failed"], report["partial"]) == (150, 50, None)
    assert report["request_goodput"] == report["request_throughput"]
    assert report["requests"]["ttft_ms"][0] is None


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    run = drive(StubTarget(), "rate=20 lengths=U(10,50)/(2,40) requests=400")
    limits = Goodput(ttft_ms=150, tpot_ms=60, e2el_ms=1500)
    good = [
        r for r in run.records
        if r.ttft_s <= 0.15 and r.e2el_s <= 1.5 and (r.tpot_s is None or r.tpot_s <= 0.06)
    ]  # fmt: skip
    assert 20 < len(good) < 380
    report = build_report(ABOUT, run, limits)
    assert report["request_goodput"] == pytest.approx(len(good) / run.duration_s)
    assert report["goodput_slo"] == {"ttft_ms": 150, "tpot_ms": 60, "e2el_ms": 1500}


@pytest.mark.parametrize(
    ("limits", "is_met"),
    [
        (Goodput(), True),
        (Goodput(ttft_ms=1000), True),
        (Goodput(ttft_ms=999), False),
        (Goodput(tpot_ms=500), True),
        (Goodput(tpot_ms=499), False),
        (Goodput(e2el_ms=2000), True),
        (Goodput(e2el_ms=1999), False),
        (Goodput(ttft_ms=1000, e2el_ms=1), False),
    ],
)
def test_a_limit_of_goodput_includes_its_bound(limits: Goodput, is_met: bool) -> None:
    assert limits.is_met(make_record(0, 0.0, (1.0, 1.5, 2.0))) == is_met


def test_a_failed_request_is_not_good_and_an_output_of_one_token_meets_every_tpot() -> None:
    assert not Goodput().is_met(make_record(0, 0.0, (1.0,), status="UNAVAILABLE"))
    assert Goodput(tpot_ms=0.001).is_met(make_record(0, 0.0, (1.0,)))


def test_the_limits_that_are_not_set_are_not_in_the_report() -> None:
    report = build_report(ABOUT, Run([make_record(0, 0.0, (1.0,))], 2.0), Goodput(tpot_ms=50))
    assert report["goodput_slo"] == {"tpot_ms": 50}
    assert "goodput_slo" not in report_of()


@pytest.mark.parametrize(
    ("cpu_s", "lag_s", "reason"),
    [(0.0, 0.001, None), (95.0, 0.0, "of a core"), (0.0, 0.5, "ms late")],
)
def test_a_slow_driver_is_a_bottleneck(cpu_s: float, lag_s: float, reason: str | None) -> None:
    run = drive(StubTarget(), "rate=20 lengths=U(10,50)/(2,40) requests=200")
    run.cpu_s, run.loop_lags_s = cpu_s * run.duration_s / 100, [lag_s] * 100
    found = bottleneck(build_report(ABOUT, run))
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    ("times_s", "lags_s", "reason"),
    [
        ((0.02,), [0.0021], "the driver was 2.1 ms late (p99), more than 2.0 ms (10% of the p99 TTFT)"),
        ((0.02,), [0.0019], None),
        ((0.001,), [0.0009], None),  # what a timer cannot resolve
        ((1.0,), [0.0999], None),
        ((1.0,), [0.101], "the driver was 101.0 ms late (p99), more than 100.0 ms (10% of the p99 TTFT)"),
        ((1.0, 1.02, 1.04), [0.0021], "the driver was 2.1 ms late (mean), more than 2.0 ms (10% of the median ITL)"),
        ((1.0, 1.02, 1.04), [0.09, *[0.001] * 99], None),  # a single stall
    ],
)
def test_the_accepted_lag_is_a_share_of_what_is_measured(
    times_s: tuple[float, ...], lags_s: list[float], reason: str | None
) -> None:
    assert bottleneck(report_of(make_record(0, 0.0, times_s), loop_lags_s=lags_s)) == reason


def test_a_report_without_a_success_shows_its_errors_however_late_the_driver_was() -> None:
    report = report_of(make_record(0, 0.0, (), 1.0, "UNAVAILABLE"), loop_lags_s=[0.5])
    assert bottleneck(report) is None


def test_throughputs_are_over_the_duration() -> None:
    records = [make_record(index, 0.0, (1.0, 2.0), num_input=30, num_cached=10) for index in range(4)]
    found = figures([*records, make_record(4, 0.0, (1.0,), status="UNAVAILABLE")], 8.0)
    assert (found["completed"], found["failed"], found["interrupted"]) == (4, 1, 0)
    assert (found["total_input_tokens"], found["total_cached_tokens"], found["total_output_tokens"]) == (120, 40, 8)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 1, 16)
    assert found["request_goodput"] is None


def test_cached_tokens_are_unknown_if_one_request_does_not_report_them() -> None:
    known, unknown = make_record(0, 0.0, (1.0,), num_cached=5), make_record(1, 0.0, (1.0,))
    assert figures([known], 1.0)["total_cached_tokens"] == 5
    assert figures([known, unknown], 1.0)["total_cached_tokens"] is None


def test_a_run_without_requests_has_no_metric() -> None:
    report = report_of(duration_s=0.0)
    assert (report["completed"], report["request_throughput"], report["max_concurrent_requests"]) == (0, 0, 0)
    assert report["mean_normalized_latency_s_per_token"] is None
    assert all(report[f"{kind}_{name}_ms"] is None for name in METRICS for kind in ("mean", "median", "std", "p99"))


def test_the_time_inside_the_router_is_reported_only_by_a_mesh() -> None:
    assert report_of(make_record(0, 0.0, (1.0,), router_s=0.002))["median_router_ms"] == 2.0
    assert "median_router_ms" not in report_of(make_record(0, 0.0, (1.0,)))


def test_without_token_times_there_is_no_inter_token_latency() -> None:
    report = report_of(make_record(0, 0.0, (1.0, 2.0, 3.0)), token_times=False)
    assert (report["median_itl_ms"], report["max_output_tokens_per_s"]) == (None, None)
    assert report["median_tpot_ms"] == 1000


@pytest.mark.parametrize(
    ("spans", "peak"),
    [
        ([], 0),
        ([(0, 1), (1, 2), (2, 3)], 1),
        ([(0, 2), (1, 3), (1.5, 1.6), (5, 6)], 3),
        ([(0, None), (5, None)], 2),
        ([(0, None), (None, None)], 1),
    ],
)
def test_the_peak_concurrency_counts_sent_requests_that_have_not_ended(
    spans: list[tuple[float | None, float | None]], peak: int
) -> None:
    records = [
        make_record(index, 0.0, (), end_s, INTERRUPTED, sent_s=sent_s) for index, (sent_s, end_s) in enumerate(spans)
    ]
    assert figures(records, 10.0)["max_concurrent_requests"] == peak


def test_the_series_has_the_levels_at_the_end_of_each_second() -> None:
    series = report_of(
        make_record(0, 0.0, (1.5, 2.5)), make_record(1, 0.5, (3.5,)), duration_s=3.5
    )["series"]  # fmt: skip
    assert series == {
        "output_tokens_per_s": [0, 1, 1, 1],
        "waiting": [2, 1, 1, 0],
        "running": [0, 1, 0, 0],
    }


def test_interrupted_requests_wait_or_run_until_the_end_of_the_series() -> None:
    waiting = make_record(0, 0.0, status=INTERRUPTED)
    running = make_record(1, 0.0, (0.5,), status=INTERRUPTED)
    running.ended_s = None
    never_sent = make_record(2, 0.0, status=INTERRUPTED, sent_s=None)
    series = report_of(waiting, running, never_sent, duration_s=2.5)["series"]
    assert (series["waiting"], series["running"]) == ([1, 1, 1], [1, 1, 1])


def test_tokens_that_a_server_counts_at_the_end_are_spread_over_its_pieces() -> None:
    report = report_of(make_record(0, 0.0, (0.5, 1.5), num_output=10), duration_s=1.5)
    assert report["series"]["output_tokens_per_s"] == [5, 5]
    assert report["max_output_tokens_per_s"] == 5


def test_tokens_of_requests_that_failed_later_are_in_the_series() -> None:
    failed = make_record(0, 0.0, (0.5, 1.5), 1.6, "UNAVAILABLE", num_output=0)
    report = report_of(failed, make_record(1, 0.0, (0.5,)), duration_s=2.0)
    assert report["series"]["output_tokens_per_s"] == [2, 1, 0]
    assert report["total_output_tokens"] == report["max_output_tokens_per_s"] == 1


def test_tokens_after_the_duration_are_in_the_last_second() -> None:
    assert report_of(make_record(0, 0.0, (5.0,)), duration_s=1.0)["series"]["output_tokens_per_s"] == [0, 1]


@given(st.lists(st.lists(st.floats(0.01, 3), min_size=1, max_size=5), max_size=6))
def test_the_series_adds_up_to_the_output_tokens(gaps: list[list[float]]) -> None:
    records = [
        make_record(index, index / 3, tuple(index / 3 + float(time) for time in np.cumsum(gap)))
        for index, gap in enumerate(gaps)
    ]
    duration_s = max((record.ended_s or 0.0 for record in records), default=0.0)
    report = report_of(*records, duration_s=duration_s)
    assert sum(report["series"]["output_tokens_per_s"]) == pytest.approx(report["total_output_tokens"])
    assert report["series"]["waiting"][-1] == report["series"]["running"][-1] == 0


def test_messages_of_errors_are_distinct_and_few_and_the_most_frequent_status_comes_first() -> None:
    records = [make_record(0, 0.0, (), 1.0, "RARE")]
    records += [make_record(n, 0.0, (), 1.0, "OFTEN", error=f"message {n // 2}") for n in range(1, 20)]
    errors = report_of(*records)["errors"]
    assert list(errors) == ["OFTEN", "RARE"]
    assert errors["OFTEN"] == {"count": 19, "messages": [f"message {n}" for n in range(5)]}
    assert errors["RARE"] == {"count": 1, "messages": []}


def test_groups_are_reported_where_there_are_several() -> None:
    records = [
        make_record(0, 0.0, (1.0,), model="a", tenant="x"),
        make_record(1, 0.0, (2.0,), model="b", tenant="x"),
        make_record(2, 0.0, (3.0,), model="b", tenant="x", priority=-1),
    ]
    report = report_of(*records)
    assert {name: one["completed"] for name, one in report["by_model"].items()} == {"a": 1, "b": 2}
    assert report["by_model"]["b"]["median_ttft_ms"] == 2500
    assert {name: one["completed"] for name, one in report["by_priority"].items()} == {"0": 2, "-1": 1}
    assert "by_tenant" not in report


def test_requests_without_a_name_are_a_group() -> None:
    records = [make_record(0, 0.0, (1.0,)), make_record(1, 0.0, (1.0,), model="b", tenant="x")]
    report = report_of(*records)
    assert report["by_model"].keys() == {"(default)", "b"}
    assert report["by_tenant"].keys() == {"(none)", "x"}


def test_the_columns_of_the_requests_have_an_entry_for_each() -> None:
    records = [
        make_record(0, 1.0, (1.5, 2.0), num_input=7, model="m"),
        make_record(1, 2.0, (), 3.0, "UNAVAILABLE", sent_s=2.25),
        make_record(2, 4.0, status=INTERRUPTED, sent_s=None),
    ]
    assert report_of(*records)["requests"] == {
        "scheduled_ms": [1000, 2000, 4000],
        "sent_ms": [1000, 2250, None],
        "ttft_ms": [500, None, None],
        "tpot_ms": [500, None, None],
        "e2el_ms": [1000, None, None],
        "num_input": [7, 0, 0],
        "num_output": [2, 0, 0],
        "model": ["m", None, None],
        "status": ["OK", "UNAVAILABLE", INTERRUPTED],
    }


def test_finish_reasons_are_counted_for_outputs_that_ended() -> None:
    finishes = ("stop", "length", "stop")
    records = [make_record(n, 0.0, (1.0,), finish=finish) for n, finish in enumerate(finishes)]
    report = report_of(*records, make_record(3, 0.0, (), 1.0, "UNAVAILABLE"))
    assert report["finish_reasons"] == {"stop": 2, "length": 1}


def test_the_load_of_the_driver_is_reported() -> None:
    lags_s = [0.001] * 98 + [0.003, 0.1]
    driver = report_of(duration_s=4.0, cpu_s=1.0, loop_lags_s=lags_s)["driver"]
    assert (driver["cpu_s"], driver["cpu_share"], driver["max_lag_ms"]) == (1.0, 0.25, 100)
    assert driver["p99_lag_ms"] == pytest.approx(np.percentile(1000 * np.array(lags_s), 99))
    assert driver["mean_lag_ms"] == pytest.approx(2.01)
    assert set(report_of(duration_s=0.0)["driver"].values()) == {0}


@pytest.mark.parametrize("rate", [None, 2.5, math.inf])
def test_a_report_is_strict_json(rate: float | None) -> None:
    about = About("n", "t", ("a", "b"), "w", "d", 4, rate)
    run = Run([make_record(0, 0.0, (1.0, 2.0), finish="stop"), make_record(1, 0.0, status=INTERRUPTED)], 2.0)
    report = build_report(about, run, Goodput(ttft_ms=1.0), Objectives({"a": Unloaded(0.1, 0.2, 0.3)}, default="a"))
    read = json.loads(json.dumps(report, allow_nan=False))
    assert (read["name"], read["target"], read["models"], read["max_concurrency"]) == ("n", "t", ["a", "b"], 4)
    assert read["rate"] == (None if rate == math.inf else rate)
    assert Unloaded(**read["slo"]["unloaded"]) == Unloaded(0.1, 0.2, 0.3)
    assert read["slo"]["attainment"].keys() == {str(scale) for scale in range(1, 17)}


def test_the_rate_weighted_throughput_is_that_of_muxserve() -> None:
    # In 10 s: 6 requests for a, of which 3 succeed, and 2 for b, of which both do.
    records = [make_record(i, 0.0, (1.0,), status="OK" if i < 3 else "UNAVAILABLE", model="a") for i in range(6)]
    records += [make_record(6 + i, 0.0, (1.0,), model="b") for i in range(2)]
    found = report_of(*records, duration_s=10.0)["rate_weighted_throughput"]
    assert found == pytest.approx((0.6 * 0.3 + 0.2 * 0.2) / (0.6 + 0.2))


def test_one_model_has_no_rate_weighted_throughput() -> None:
    assert report_of(make_record(0, 0.0, (1.0,)), duration_s=10.0)["rate_weighted_throughput"] is None


def test_the_attainment_of_the_configured_slo_is_a_figure_of_all_and_of_each_model() -> None:
    records = [make_record(i, 0.0, (1.0 + i,), model="ab"[i % 2]) for i in range(4)]
    objectives = Objectives(slos={"a": Slo(ttft_s=2.0), "b": Slo(ttft_s=9.0)})
    report = build_report(ABOUT, Run(records, 10.0), objectives=objectives)
    assert report["slo_attainment"] == 0.75
    assert [report["by_model"][name]["slo_attainment"] for name in "ab"] == [0.5, 1.0]
    assert report["configured_slo"] == {"a": {"ttft_s": 2.0}, "b": {"ttft_s": 9.0}}
    assert "slo" not in report, "without a latency of the idle server there are no multiples of it"


@pytest.mark.parametrize(("partial", "reported"), [("", None), ("interrupted", "interrupted")])
def test_a_partial_run_has_its_reason(partial: str, reported: str | None) -> None:
    assert report_of(partial=partial)["partial"] == reported
