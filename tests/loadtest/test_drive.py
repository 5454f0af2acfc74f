"""The harness's own truth: a server with known latencies, in virtual time, so every figure can be said in advance."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from loadtest.drive import UNREACHABLE_IN_A_ROW, Driver
from loadtest.record import INTERRUPTED, Run
from loadtest.report import METRICS, PERCENTILES, About, Goodput, bottleneck, build_report
from loadtest.session import Options, Session
from loadtest.slo import fit_unloaded
from loadtest.spec import parse_spec
from loadtest.target import Ended, Piece, ServedModel, TargetError
from loadtest.workload import PlannedRequest, plan
from muxmesh.errors import ConfigError, Unavailable
from tests.support.virtual_time import VirtualClock, run_virtually

ABOUT = About("stub", "a stub", ["m"], "", "today")
WORKLOAD = "rate=20 lengths=U(10,50)/(2,40) requests=2000 seed=3"


@dataclass
class StubTarget:
    """Answers with latencies of its own choice: the first token after ``first_s``, each further after ``gap_s``.

    Everything pauses from ``stall_at_s`` on for ``stall_s``.
    """

    seed: int = 0
    spread: float = 0.7
    stall_at_s: float = math.inf
    stall_s: float = 0.0
    name: str = "stub"
    failure: Callable[[PlannedRequest], TargetError | None] = lambda request: None
    truth: dict[int, dict[str, Any]] = field(default_factory=dict)

    async def models(self) -> list[ServedModel]:
        return [ServedModel("m", range(10, 100))]

    async def ask(self, request: PlannedRequest) -> AsyncIterator[Piece | Ended]:
        rng = random.Random(f"{self.seed}/{request.index}")
        first_s, gaps_s = (
            rng.lognormvariate(-2, self.spread),
            [rng.expovariate(20) for _ in range(request.max_new_tokens - 1)],
        )
        start_s = VirtualClock().monotonic_s()
        if (error := self.failure(request)) is not None:
            await asyncio.sleep(0.01)
            raise error
        times = [await self._sleep(first_s)]
        yield Piece(1)
        for gap_s in gaps_s:
            times.append(await self._sleep(gap_s))
            yield Piece(1)
        self.truth[request.index] = {"start_s": start_s, "times": times}
        yield Ended(len(request.prompt), request.max_new_tokens, "length")

    async def _sleep(self, seconds: float) -> float:
        clock = VirtualClock()
        await asyncio.sleep(seconds)
        if self.stall_at_s <= clock.monotonic_s() < self.stall_at_s + self.stall_s:
            await asyncio.sleep(self.stall_at_s + self.stall_s - clock.monotonic_s())
        return clock.monotonic_s()

    async def close(self) -> None:
        return


def drive(target: StubTarget, line: str = WORKLOAD, max_concurrency: int | None = None) -> Run:
    async def work() -> Run:
        requests = plan(parse_spec(line), range(10, 100))
        return await Driver(target, requests, VirtualClock(), max_concurrency).run()

    return run_virtually(work())


def test_every_percentile_is_the_servers_own() -> None:
    target = StubTarget()
    run = drive(target)
    report = build_report(ABOUT, run)
    truth = [target.truth[index] for index in range(2000)]
    expected = {
        "ttft": [one["times"][0] - one["start_s"] for one in truth],
        "tpot": [(t[-1] - t[0]) / (len(t) - 1) for t in (one["times"] for one in truth) if len(t) > 1],
        "itl": [gap for one in truth for gap in np.diff(one["times"])],
        "e2el": [one["times"][-1] - one["start_s"] for one in truth],
    }  # fmt: skip
    for name in METRICS:
        values = 1000 * np.array(expected[name])
        for percentile in PERCENTILES:
            expected_ms = np.percentile(values, percentile)
            assert report[f"p{percentile}_{name}_ms"] == pytest.approx(expected_ms, rel=0.02, abs=1)
        assert report[f"mean_{name}_ms"] == pytest.approx(values.mean(), rel=0.001)
        assert report[f"std_{name}_ms"] == pytest.approx(values.std(), rel=0.001)
    assert report["completed"] == 2000
    assert report["total_output_tokens"] == sum(len(one["times"]) for one in truth)
    assert report["duration"] == pytest.approx(max(one["times"][-1] for one in truth))
    assert report["output_throughput"] == pytest.approx(report["total_output_tokens"] / report["duration"])
    assert sum(report["series"]["output_tokens_per_s"]) == pytest.approx(report["total_output_tokens"])
    normalized = [e2el_s / len(one["times"]) for e2el_s, one in zip(expected["e2el"], truth, strict=True)]
    assert report["mean_normalized_latency_s_per_token"] == pytest.approx(np.mean(normalized))


def test_requests_are_sent_when_they_are_due_however_slow_the_server_is() -> None:
    run = drive(StubTarget(stall_at_s=10.0, stall_s=30.0))
    assert max(record.sent_s - record.scheduled_s for record in run.records if record.sent_s is not None) < 1e-6


def test_a_stall_of_a_second_shows() -> None:
    """Of 1,000 requests in 50 s, two in a hundred are due while nothing is answered."""
    line = "rate=20 burstiness=inf lengths=D(5,5) requests=1000"
    calm = build_report(ABOUT, drive(StubTarget(spread=0.1), line))
    stalled = build_report(ABOUT, drive(StubTarget(spread=0.1, stall_at_s=25.0, stall_s=1.0), line))
    assert calm["p99_ttft_ms"] < 200
    assert stalled["p99_ttft_ms"] > 500
    assert stalled["p99_e2el_ms"] > calm["p99_e2el_ms"] + 300
    assert max(stalled["requests"]["ttft_ms"]) > 1000
    assert stalled["median_ttft_ms"] == pytest.approx(calm["median_ttft_ms"], rel=0.03)


def test_a_server_that_hangs_is_not_judged_by_the_time_before() -> None:
    async def work() -> Run:
        requests = plan(parse_spec("rate=20 lengths=D(5,5) duration=200"), range(10, 100))
        driver = Driver(StubTarget(stall_at_s=5.0, stall_s=1e6), requests, VirtualClock())
        asyncio.get_running_loop().call_later(60.0, driver.stop, "enough")
        return await driver.run()

    report = build_report(ABOUT, run_virtually(work()))
    assert report["duration"] == pytest.approx(60.0)
    assert report["request_throughput"] == report["completed"] / report["duration"] < 2


def test_a_bound_on_concurrency_hides_no_waiting() -> None:
    """One at a time at twice its capacity: what a driver that waits would leave out is most of the latency."""
    line = "rate=10 burstiness=inf lengths=D(5,1) requests=200"
    free, bounded = (drive(StubTarget(), line, max_concurrency=bound) for bound in (None, 1))
    sent = sorted(record.sent_s for record in bounded.records if record.sent_s is not None)
    ended = sorted(record.ended_s for record in bounded.records if record.ended_s is not None)
    assert all(later >= sooner - 1e-9 for sooner, later in zip(ended, sent[1:], strict=False)), "two at a time"
    waited = np.mean([record.ttft_s for record in bounded.records])
    served = np.mean([record.ttft_s for record in free.records])
    assert waited > 10 * served
    assert build_report(ABOUT, bounded)["mean_ttft_ms"] == pytest.approx(1000 * waited)


def test_waiting_and_running_over_time() -> None:
    report = build_report(ABOUT, drive(StubTarget(stall_at_s=50.0, stall_s=5.0)))
    series = report["series"]
    assert len(series["waiting"]) == len(series["running"]) == len(series["output_tokens_per_s"])
    assert series["waiting"][53] > 60, "20 a second came while nothing was answered"
    assert max(series["waiting"][:49]) < 15
    assert sum(series["output_tokens_per_s"][50:54]) < series["output_tokens_per_s"][48]
    assert report["max_concurrent_requests"] >= max(
        w + r for w, r in zip(series["waiting"], series["running"], strict=True)
    )


def test_errors_are_counted_by_status_and_fail_nothing_else() -> None:
    def failure(request: PlannedRequest) -> TargetError | None:
        return TargetError("RESOURCE_EXHAUSTED", "full") if request.index % 4 == 0 else None

    report = build_report(ABOUT, drive(StubTarget(failure=failure)), Goodput(ttft_ms=1e9))
    assert report["errors"] == {"RESOURCE_EXHAUSTED": {"count": 500, "messages": ["full"]}}
    assert (report["completed"], report["failed"], report["partial"]) == (1500, 500, None)
    assert report["request_goodput"] == report["request_throughput"]
    assert report["requests"]["ttft_ms"][0] is None


def test_a_server_that_dies_ends_the_run_and_what_was_measured_stays() -> None:
    def failure(request: PlannedRequest) -> TargetError | None:
        return TargetError("UNAVAILABLE", "gone", is_unreachable=True) if request.at_s > 30 else None

    run = drive(StubTarget(failure=failure))
    report = build_report(ABOUT, run)
    assert report["partial"].startswith(f"the server is gone: {UNREACHABLE_IN_A_ROW} requests in a row")
    assert report["completed"] > 400
    assert UNREACHABLE_IN_A_ROW <= report["errors"]["UNAVAILABLE"]["count"] < 200, "answers that still came reset it"
    assert report["completed"] + report["failed"] + report["interrupted"] == 2000
    assert run.duration_s < 40


def test_a_run_that_is_stopped_keeps_what_it_has() -> None:
    async def work() -> Run:
        requests = plan(parse_spec(WORKLOAD), range(10, 100))
        driver = Driver(StubTarget(), requests, VirtualClock())
        asyncio.get_running_loop().call_later(40.0, driver.stop, "enough")
        return await driver.run()

    run = run_virtually(work())
    report = build_report(ABOUT, run)
    assert report["partial"] == "enough"
    assert 600 < report["completed"] < 900
    assert report["completed"] + report["interrupted"] == 2000
    assert report["errors"] == {INTERRUPTED: {"count": report["interrupted"], "messages": []}}


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    target = StubTarget()
    run = drive(target)
    limits = Goodput(ttft_ms=150, tpot_ms=60, e2el_ms=1500)
    good = [
        r for r in run.records
        if r.ttft_s <= 0.15 and r.e2el_s <= 1.5 and (r.tpot_s is None or r.tpot_s <= 0.06)
    ]  # fmt: skip
    assert 100 < len(good) < 1900
    report = build_report(ABOUT, run, limits)
    assert report["request_goodput"] == pytest.approx(len(good) / run.duration_s)
    assert report["goodput_slo"] == {"ttft_ms": 150, "tpot_ms": 60, "e2el_ms": 1500}


class LinearTarget(StubTarget):
    """Takes 0.1 s, 1 ms for each prompt token and 20 ms for each token of the answer; a part of a second per rival."""

    def __init__(self, slowdown: float = 0.0) -> None:
        super().__init__()
        self.running = 0
        self.slowdown = slowdown

    async def ask(self, request: PlannedRequest) -> AsyncIterator[Piece | Ended]:
        self.running += 1
        factor = 1 + self.slowdown * (self.running - 1)
        await asyncio.sleep(factor * (0.1 + 0.001 * len(request.prompt)))
        for _ in range(request.max_new_tokens):
            await asyncio.sleep(factor * 0.02)
            yield Piece(1)
        self.running -= 1
        yield Ended(len(request.prompt), request.max_new_tokens, "length")


def options(**more: Any) -> Options:
    return Options(name="stub", date="today", **more)


def session_of(target: StubTarget, **more: Any) -> Session:
    return Session(target, options(**more), VirtualClock())


def test_the_unloaded_latency_is_learnt_and_the_slo_curve_follows() -> None:
    line = "rate=5 lengths=U(10,500)/(5,50) requests=300"
    alone = run_virtually(session_of(LinearTarget(), calibrate=20).run(parse_spec(line)))
    unloaded = alone["slo"]["unloaded"]
    assert list(unloaded.values()) == pytest.approx([0.1, 0.001, 0.02], rel=1e-6)
    assert alone["slo"]["attainment"][2] == 1.0
    crowded = run_virtually(session_of(LinearTarget(slowdown=0.1), calibrate=20).run(parse_spec(line)))
    parts = list(crowded["slo"]["attainment"].values())
    assert parts == sorted(parts)
    assert parts[0] < 0.5 < parts[-1]
    assert crowded["slo"]["unloaded"] == pytest.approx(unloaded)


def test_failed_requests_are_outside_every_slo() -> None:
    target = StubTarget(failure=lambda request: TargetError("X", "x") if request.index % 2 else None)
    run = drive(target, "rate=5 lengths=D(5,5) requests=100")
    unloaded = fit_unloaded(run.records)
    report = build_report(ABOUT, run, unloaded=unloaded)
    assert report["slo"]["attainment"][16] <= 0.5


def test_a_sweep_finds_the_highest_rate_within_the_slo() -> None:
    spec = parse_spec("rate=1 lengths=D(100,20) requests=200")
    session = session_of(LinearTarget(slowdown=0.2), calibrate=3)
    sweep = run_virtually(session.sweep(spec, [16.0, 0.5, 4.0, 8.0], scale=2, wanted=0.9))
    assert [report["rate"] for report in sweep["reports"]] == [0.5, 4.0, 8.0, 16.0]
    parts = [report["slo"]["attainment"][2] for report in sweep["reports"]]
    assert parts == sorted(parts, reverse=True)
    best = max(rate for rate, part in zip([0.5, 4.0, 8.0, 16.0], parts, strict=True) if part >= 0.9)
    assert sweep["highest_rate_within_slo"] == best < 16
    assert sweep["reports"][1]["workload"] == "rate=4 lengths=D(100,20) requests=200 seed=1"


def test_a_calibration_without_one_success_is_an_error() -> None:
    target = StubTarget(failure=lambda request: TargetError("INVALID_ARGUMENT", "no such thing"))
    with pytest.raises(ConfigError, match="not one request succeeded: INVALID_ARGUMENT: no such thing"):
        run_virtually(session_of(target).run(parse_spec(WORKLOAD)))


def test_a_model_that_is_not_served_is_an_error() -> None:
    with pytest.raises(ConfigError, match="models=other: not served there; these are: m"):
        run_virtually(session_of(StubTarget()).run(parse_spec(f"{WORKLOAD} models=other")))


def test_a_server_that_is_not_there_is_an_error() -> None:
    class Nobody(StubTarget):
        async def models(self) -> list[ServedModel]:
            raise Unavailable("nobody")

    with pytest.raises(Unavailable, match="nobody"):
        run_virtually(session_of(Nobody()).run(parse_spec(WORKLOAD)))


@pytest.mark.parametrize(
    ("cpu_s", "lag_s", "says"),
    [(0.0, 0.001, None), (95.0, 0.0, "of a core"), (0.0, 0.5, "ms late"), (0.0, 0.009, None)],
)
def test_a_slow_driver_is_noticed(cpu_s: float, lag_s: float, says: str | None) -> None:
    run = drive(StubTarget())
    run.cpu_s, run.loop_lags_s = cpu_s * run.duration_s / 100, [lag_s] * 100
    found = bottleneck(build_report(ABOUT, run))
    assert found is None if says is None else says in (found or "")
