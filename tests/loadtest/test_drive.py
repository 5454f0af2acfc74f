"""The driver against a server with known latencies, in virtual time."""

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
import pytest

from loadtest.drive import MAX_UNREACHABLE_IN_A_ROW, Driver
from loadtest.record import INTERRUPTED, OK, Run
from loadtest.report import About, build_report
from loadtest.spec import parse_spec
from loadtest.target import Piece, StreamEnd, TargetError
from loadtest.workload import PlannedRequest, plan
from tests.support.loadtest_target import VOCABULARY, WORKLOAD, StubTarget, drive
from tests.support.virtual_time import VirtualClock, run_virtually

ABOUT = About("stub", "a stub", ["m"], "", "today")


def stopped_after(seconds: float, line: str, target: StubTarget) -> Run:
    async def work() -> Run:
        driver = Driver(target, plan(parse_spec(line), VOCABULARY), VirtualClock())
        asyncio.get_running_loop().call_later(seconds, driver.stop, "enough")
        return await driver.run()

    return run_virtually(work())


def test_requests_are_sent_when_they_are_due_however_slow_the_server_is() -> None:
    run = drive(StubTarget(stall_at_s=10.0, stall_s=30.0), "rate=20 lengths=U(10,50)/(2,40) requests=500")
    assert max(record.sent_s - record.scheduled_s for record in run.records if record.sent_s is not None) < 1e-6


def test_a_stall_of_a_second_raises_the_high_percentiles_and_not_the_median() -> None:
    """Of 1,000 requests in 50 s, two in a hundred are due during the stall."""
    line = "rate=20 burstiness=inf lengths=D(5,5) requests=1000"
    calm = build_report(ABOUT, drive(StubTarget(spread=0.1), line))
    stalled = build_report(ABOUT, drive(StubTarget(spread=0.1, stall_at_s=25.0, stall_s=1.0), line))
    assert calm["p99_ttft_ms"] < 200
    assert stalled["p99_ttft_ms"] > 500
    assert stalled["p99_e2el_ms"] > calm["p99_e2el_ms"] + 300
    assert max(stalled["requests"]["ttft_ms"]) > 1000
    assert stalled["median_ttft_ms"] == pytest.approx(calm["median_ttft_ms"], rel=0.03)


def test_the_duration_of_a_stopped_run_includes_the_time_in_which_the_server_hung() -> None:
    target = StubTarget(stall_at_s=5.0, stall_s=1e6)
    report = build_report(ABOUT, stopped_after(60.0, "rate=20 lengths=D(5,5) duration=200", target))
    assert report["duration"] == pytest.approx(60.0)
    assert report["request_throughput"] == report["completed"] / report["duration"] < 2


def test_a_bound_on_concurrency_keeps_the_waiting_time_in_the_latency() -> None:
    """One request at a time at twice the capacity: most of the latency is the wait before sending."""
    line = "rate=10 burstiness=inf lengths=D(5,1) requests=200"
    free, bounded = (drive(StubTarget(), line, max_concurrency=bound) for bound in (None, 1))
    sent = sorted(record.sent_s for record in bounded.records if record.sent_s is not None)
    ended = sorted(record.ended_s for record in bounded.records if record.ended_s is not None)
    assert all(later >= sooner - 1e-9 for sooner, later in zip(ended, sent[1:], strict=False)), "two at a time"
    waited = np.mean([record.ttft_s for record in bounded.records])
    served = np.mean([record.ttft_s for record in free.records])
    assert waited > 10 * served
    assert build_report(ABOUT, bounded)["mean_ttft_ms"] == pytest.approx(1000 * waited)


@pytest.mark.parametrize("bound", [1, 2, 7])
def test_the_bound_on_concurrency_is_reached_and_not_exceeded(bound: int) -> None:
    run = drive(StubTarget(), "rate=inf lengths=D(5,3) requests=50", max_concurrency=bound)
    assert build_report(ABOUT, run)["max_concurrent_requests"] == bound


def test_a_failed_request_frees_its_slot() -> None:
    target = StubTarget(failure=lambda request: TargetError("X", "x") if request.index < 5 else None)
    run = drive(target, "rate=inf lengths=D(5,1) requests=8", max_concurrency=1)
    assert [record.status for record in run.records] == ["X"] * 5 + [OK] * 3


def test_a_failed_request_fails_no_other() -> None:
    def failure(request: PlannedRequest) -> TargetError | None:
        return TargetError("RESOURCE_EXHAUSTED", "full") if request.index % 4 == 0 else None

    run = drive(StubTarget(failure=failure), "rate=20 lengths=D(5,5) requests=200")
    assert [record.status for record in run.records] == ["RESOURCE_EXHAUSTED", OK, OK, OK] * 50
    assert (run.records[0].error, run.records[0].num_output, run.partial) == ("full", 0, "")
    assert run.records[0].ended_s == pytest.approx(run.records[0].scheduled_s + 0.01)


def test_a_dead_server_ends_the_run_and_the_records_stay() -> None:
    def failure(request: PlannedRequest) -> TargetError | None:
        return TargetError("UNAVAILABLE", "gone", is_unreachable=True) if request.at_s > 30 else None

    run = drive(StubTarget(failure=failure))
    report = build_report(ABOUT, run)
    assert report["partial"] == (
        f"the server is gone: {MAX_UNREACHABLE_IN_A_ROW} requests in a row could not reach it (gone)"
    )
    assert report["completed"] > 400
    num_unreachable = report["errors"]["UNAVAILABLE"]["count"]
    assert MAX_UNREACHABLE_IN_A_ROW <= num_unreachable < 200, "outputs that still end reset the count"
    assert report["completed"] + report["failed"] + report["interrupted"] == 2000
    assert run.duration_s < 40


@pytest.mark.parametrize(
    ("period", "others"),
    [(1, None), (MAX_UNREACHABLE_IN_A_ROW, "a success"), (MAX_UNREACHABLE_IN_A_ROW, "a refusal")],
)
def test_only_unreachable_requests_in_a_row_end_the_run(period: int, others: str | None) -> None:
    def failure(request: PlannedRequest) -> TargetError | None:
        if others is not None and request.index % period == period - 1:
            return None if others == "a success" else TargetError("FULL", "full")
        return TargetError("UNAVAILABLE", "gone", is_unreachable=True)

    # A request a second, and none takes longer: one ends before the next is sent.
    run = drive(StubTarget(failure=failure, spread=0.1), "rate=1 burstiness=inf lengths=D(5,1) requests=100")
    assert bool(run.partial) == (others is None)


def test_a_stopped_run_keeps_its_records() -> None:
    target = StubTarget()
    run = stopped_after(40.0, WORKLOAD, target)
    report = build_report(ABOUT, run)
    assert report["partial"] == "enough"
    assert 600 < report["completed"] < 900
    assert report["completed"] + report["interrupted"] == 2000
    assert report["errors"] == {INTERRUPTED: {"count": report["interrupted"], "messages": []}}
    num_running = sum(record.sent_s is not None and record.status == INTERRUPTED for record in run.records)
    assert target.num_aborted == num_running > 0, "running requests are aborted at the server"


def test_the_first_reason_to_stop_is_kept() -> None:
    async def work() -> Run:
        driver = Driver(StubTarget(), plan(parse_spec(WORKLOAD), VOCABULARY), VirtualClock())
        driving = asyncio.create_task(driver.run())
        await asyncio.sleep(1.0)
        driver.stop("first")
        driver.stop("second")
        return await driving

    assert run_virtually(work()).partial == "first"


def test_a_run_that_ended_is_not_partial_and_lasts_until_its_last_output() -> None:
    run = drive(StubTarget(), "rate=5 lengths=D(5,5) requests=10")
    assert run.partial == ""
    assert run.duration_s == max(record.ended_s or 0.0 for record in run.records)


def test_a_record_has_the_facts_of_its_request_and_of_its_end() -> None:
    class Detailed(StubTarget):
        async def stream(self, request: PlannedRequest) -> AsyncGenerator[Piece | StreamEnd, None]:
            await asyncio.sleep(0.25)
            yield Piece(3)
            await asyncio.sleep(0.5)
            yield StreamEnd(7, 4, "stop", 6, 0.125)

    request = PlannedRequest(5, 2.0, (1,), False, 4, True, 0, "m", "tenant", -3)

    async def work() -> Run:
        return await Driver(Detailed(), [request], VirtualClock()).run()

    (record,) = run_virtually(work()).records
    assert (record.index, record.scheduled_s, record.model, record.tenant, record.priority) == (
        5, 2.0, "m", "tenant", -3,
    )  # fmt: skip
    ((piece_s, num_tokens),) = record.pieces
    assert num_tokens == 3
    assert (record.sent_s, piece_s, record.ended_s) == pytest.approx((2.0, 2.25, 2.75))
    assert (record.num_input, record.num_output, record.finish) == (7, 4, "stop")
    assert (record.num_cached, record.router_s, record.status) == (6, 0.125, OK)


def test_the_counters_follow_the_run() -> None:
    target = StubTarget(failure=lambda request: TargetError("X", "x") if request.index == 1 else None)

    async def work() -> list[tuple[int, int, int]]:
        requests = plan(parse_spec("rate=1 burstiness=inf lengths=D(5,1) requests=3"), VOCABULARY)
        driver = Driver(target, requests, VirtualClock())
        driving = asyncio.create_task(driver.run())
        seen = []
        for pause_s in (0.001, 1.9):
            await asyncio.sleep(pause_s)
            seen.append((driver.num_sent, driver.num_done, driver.num_failed))
        await driving
        return [*seen, (driver.num_sent, driver.num_done, driver.num_failed)]

    assert run_virtually(work()) == [(1, 0, 0), (2, 1, 1), (3, 2, 1)]


def test_a_bug_in_a_target_is_raised_and_not_recorded() -> None:
    class Broken(StubTarget):
        async def stream(self, request: PlannedRequest) -> AsyncGenerator[Piece | StreamEnd, None]:
            yield Piece(1)
            raise KeyError("bug")

    with pytest.raises(ExceptionGroup) as caught:
        drive(Broken(), "rate=1 lengths=D(5,1) requests=3")
    assert caught.group_contains(KeyError, match="bug")


def test_the_lag_of_an_idle_event_loop_is_zero() -> None:
    run = drive(StubTarget(), "rate=5 lengths=D(5,5) requests=10")
    assert len(run.loop_lags_s) >= int(run.duration_s / 0.05) - 1 > 10
    assert max(run.loop_lags_s) == pytest.approx(0.0, abs=1e-9)
