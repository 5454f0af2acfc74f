"""Whole load tests against servers with known latencies, in virtual time."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.drive import Driver
from loadtest.session import Options, Session
from loadtest.slo import Unloaded
from loadtest.spec import parse_spec
from loadtest.target import Piece, ServedModel, StreamEnd, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.slo import Slo
from tests.support.loadtest_target import VOCABULARY, LinearTarget, StubTarget
from tests.support.virtual_time import VirtualClock, run_virtually

LINE = "rate=5 lengths=D(20,5) requests=10"
TWO_MODELS = (ServedModel("a", range(500)), ServedModel("b", range(100, 300)))


def session_of(target: StubTarget, **options: Any) -> Session:
    return Session(target, Options(name="stub", date="today", **options), VirtualClock())


def report_of(target: StubTarget, line: str = LINE, **options: Any) -> dict[str, Any]:
    return run_virtually(session_of(target, **options).run(parse_spec(line)))


def test_calibration_fits_the_unloaded_latency_and_the_attainment_follows() -> None:
    line = "rate=5 lengths=U(10,500)/(5,50) requests=300"
    alone = report_of(LinearTarget(), line, calibrate=20)
    unloaded = alone["slo"]["unloaded"]
    assert list(unloaded.values()) == pytest.approx([0.1, 0.001, 0.02, 0.12, 0.001, 0.02], rel=1e-6)
    assert alone["slo"]["attainment"][2] == 1.0
    crowded = report_of(LinearTarget(slowdown=0.1), line, calibrate=20)
    shares = list(crowded["slo"]["attainment"].values())
    assert shares == sorted(shares)
    assert shares[0] < 0.5 < shares[-1]
    assert crowded["slo"]["unloaded"] == pytest.approx(unloaded)


def test_calibration_sends_one_request_at_a_time_with_prompts_of_its_own() -> None:
    target = LinearTarget(slowdown=0.5)
    report = report_of(target, calibrate=4)
    calibration, run = target.received[:4], target.received[4:]
    assert (len(calibration), len(run)) == (4, 10)
    assert not {request.prompt for request in calibration} & {request.prompt for request in run}
    unloaded_s = Unloaded(**report["slo"]["unloaded"]).e2el_s(20, 5)
    assert unloaded_s == pytest.approx(0.1 + 20 * 0.001 + 5 * 0.02), "two requests at a time take longer"


def test_calibration_samples_the_whole_workload() -> None:
    target = LinearTarget()
    report_of(target, "rate=5 lengths=D(20,5) requests=100", calibrate=4)
    assert [request.index for request in target.received[:4]] == [0, 25, 50, 75]
    assert {request.at_s for request in target.received[:4]} == {0.0}


def test_calibration_of_a_short_workload_sends_each_request_once() -> None:
    target = LinearTarget()
    report_of(target, "rate=5 lengths=D(20,5) requests=2", calibrate=5)
    assert [request.index for request in target.received] == [0, 1, 0, 1]


def test_a_known_unloaded_latency_replaces_the_calibration() -> None:
    target, unloaded = LinearTarget(), Unloaded(0.5, 0.0, 0.0)
    report = report_of(target, unloaded=unloaded)
    assert len(target.received) == 10
    assert Unloaded(**report["slo"]["unloaded"]) == unloaded


def test_without_calibration_there_is_no_slo() -> None:
    target = LinearTarget()
    assert "slo" not in report_of(target, calibrate=0)
    assert len(target.received) == 10


def test_calibration_without_a_success_is_an_error() -> None:
    target = StubTarget(failure=lambda request: TargetError("INVALID_ARGUMENT", "bad field"))
    with pytest.raises(ConfigError, match="calibration: no request succeeded: INVALID_ARGUMENT: bad field"):
        report_of(target)


def test_one_success_is_enough_to_calibrate() -> None:
    target = StubTarget()
    target.failure = lambda request: TargetError("X", "x") if 1 < len(target.received) <= 5 else None
    assert report_of(target)["completed"] == 10


def test_a_driver_that_is_stopped_during_calibration_ends_the_test() -> None:
    def stop(description: str, driver: Driver) -> None:
        driver.stop("interrupted by the user")

    session = Session(StubTarget(), Options(name="stub", date="today"), VirtualClock(), stop)
    with pytest.raises(Unavailable, match="calibration: interrupted by the user"):
        run_virtually(session.run(parse_spec(LINE)))


@pytest.mark.parametrize(
    ("line", "description"),
    [(LINE, "rate 5"), ("rate=2.5 lengths=D(1,1) requests=2", "rate 2.5"), ("trace=TRACE", "running")],
)
def test_each_driver_is_announced_before_it_runs(tmp_path: Path, line: str, description: str) -> None:
    (tmp_path / "trace.jsonl").write_text('{"t": 0, "n_in": 5, "n_out": 2}\n')
    announced: list[tuple[str, int]] = []
    session = Session(
        StubTarget(), Options(name="stub", date="today", calibrate=1), VirtualClock(),
        lambda description, driver: announced.append((description, driver.num_sent)),
    )  # fmt: skip
    run_virtually(session.run(parse_spec(line.replace("TRACE", str(tmp_path / "trace.jsonl")))))
    assert announced == [("calibrating", 0), (description, 0)]


def test_a_report_has_the_facts_of_its_test() -> None:
    report = report_of(StubTarget(), max_concurrency=3)
    assert (report["name"], report["target"], report["date"]) == ("stub", "stub", "today")
    assert (report["workload"], report["rate"], report["max_concurrency"]) == (LINE, 5.0, 3)
    assert report["models"] == ["m"]
    assert report["max_concurrent_requests"] <= 3


def test_a_model_that_is_not_served_is_an_error() -> None:
    with pytest.raises(ConfigError, match="models=other: not served; served models: m"):
        report_of(StubTarget(), f"{LINE} models=m,other")


def test_several_served_models_need_a_choice() -> None:
    with pytest.raises(ConfigError, match=r"several models are served; models=\.\.\. has to name one or more of: a, b"):
        report_of(StubTarget(served_models=TWO_MODELS))


@pytest.mark.parametrize(("models", "vocabulary"), [("a", range(500)), ("a,b", range(100, 300))])
def test_random_prompts_fit_every_model_of_the_workload(models: str, vocabulary: range) -> None:
    target = StubTarget(served_models=TWO_MODELS)
    report = report_of(target, f"{LINE} models={models}")
    assert report["models"] == models.split(",")
    tokens = {token for request in target.received for token in request.prompt}
    assert tokens <= set(vocabulary)
    assert len(tokens) > 50


def test_a_server_that_does_not_respond_is_an_error() -> None:
    class Absent(StubTarget):
        async def models(self) -> list[ServedModel]:
            raise Unavailable("no server")

    with pytest.raises(Unavailable, match="no server"):
        report_of(Absent())


def sweep_of(target: StubTarget, line: str, rates: list[float], scale: int = 2, **options: Any) -> dict[str, Any]:
    return run_virtually(session_of(target, **options).sweep(parse_spec(line), rates, scale, 0.9))


def test_a_sweep_finds_the_highest_rate_within_the_slo() -> None:
    line = "rate=1 lengths=D(100,20) requests=200"
    sweep = sweep_of(LinearTarget(slowdown=0.2), line, [16.0, 0.5, 4.0, 8.0], calibrate=3)
    assert [report["rate"] for report in sweep["reports"]] == [0.5, 4.0, 8.0, 16.0]
    shares = [report["slo"]["attainment"][2] for report in sweep["reports"]]
    assert shares == sorted(shares, reverse=True)
    best = max(rate for rate, share in zip([0.5, 4.0, 8.0, 16.0], shares, strict=True) if share >= 0.9)
    assert sweep["highest_rate_within_slo"] == best < 16
    assert sweep["reports"][1]["workload"] == "rate=4 lengths=D(100,20) requests=200 seed=1"


def test_a_sweep_calibrates_once_and_repeats_no_prompt() -> None:
    target = LinearTarget()
    sweep_of(target, LINE, [1.0, 2.0], calibrate=3)
    assert len(target.received) == 3 + 2 * 10
    assert len({request.prompt for request in target.received}) == len(target.received)


@pytest.mark.parametrize(
    ("line", "workload"),
    [
        ("rate=9 lengths=D(20,5) requests=2 seed=7", "rate=2 lengths=D(20,5) requests=2 seed=7"),
        ("lengths=D(20,5) seed=7 requests=2 rate=9", "rate=2 lengths=D(20,5) requests=2 seed=7"),
        ("lengths=D(20,5) rate=9 requests=2 burstiness=2", "rate=2 lengths=D(20,5) requests=2 burstiness=2 seed=0"),
    ],
)
def test_the_workload_of_a_sweep_s_run_is_a_line_that_repeats_it(line: str, workload: str) -> None:
    (report,) = sweep_of(LinearTarget(), line, [2.0])["reports"]
    assert report["workload"] == workload
    repeated = report_of(LinearTarget(), workload)
    assert repeated["requests"] == report["requests"]


def test_a_sweep_stops_after_a_partial_run() -> None:
    target = StubTarget(spread=0.1)
    target.failure = lambda request: (
        TargetError("UNAVAILABLE", "gone", is_unreachable=True) if len(target.received) > 40 else None
    )
    sweep = sweep_of(target, "rate=1 lengths=D(20,5) requests=40", [1.0, 2.0, 4.0], 16, unloaded=Unloaded(1, 0, 0))
    assert [report["rate"] for report in sweep["reports"]] == [1.0, 2.0]
    assert sweep["partial"].startswith("the server is gone")
    assert sweep["highest_rate_within_slo"] == 1.0


def test_a_sweep_of_a_trace_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--sweep: needs a workload with a rate; a trace has its own"):
        sweep_of(StubTarget(), "trace=a.csv", [1.0])


def test_a_sweep_without_the_unloaded_latency_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--sweep: needs the unloaded latency"):
        sweep_of(StubTarget(), LINE, [1.0], calibrate=0)
    sweep = sweep_of(StubTarget(), LINE, [1.0], calibrate=0, unloaded=Unloaded(1.0, 0.0, 0.0))
    assert sweep["reports"][0]["slo"]["unloaded"]["base_s"] == 1.0


def test_the_default_vocabulary_is_that_of_the_only_model() -> None:
    target = StubTarget()
    report_of(target)
    assert {token for request in target.received for token in request.prompt} <= set(VOCABULARY)


class CachingTarget(LinearTarget):
    """Reports ``num_cached`` cached tokens of each prompt."""

    def __init__(self, num_cached: int | None, takes_salt: bool) -> None:
        super().__init__()
        self.num_cached, self.takes_salt = num_cached, takes_salt

    async def models(self) -> list[ServedModel]:
        return [replace(model, takes_cache_salt=self.takes_salt) for model in await super().models()]

    async def stream(self, request: PlannedRequest) -> AsyncGenerator[Piece | StreamEnd, None]:
        async for event in super().stream(request):
            yield replace(event, num_cached=self.num_cached) if isinstance(event, StreamEnd) else event


def test_no_run_and_no_calibration_has_the_salt_of_another() -> None:
    target = LinearTarget()
    line = "rate=1 lengths=D(20,5) requests=4 tenants=x,y seed=3"
    sweep_of(target, line, [1.0, 2.0], calibrate=2, cache_salt="s")
    salts = [request.cache_salt for request in target.received]
    assert {salt.partition("/")[0] for salt in salts[:2]} == {"s-1"}
    assert {salt.partition("/")[0] for salt in salts[2:6]} == {"s-2"}
    assert {salt.partition("/")[0] for salt in salts[6:]} == {"s-3"}
    assert all(request.cache_salt.endswith(f"/{request.tenant}") for request in target.received)


@pytest.mark.parametrize("takes_salt", [True, False])
def test_without_a_salt_or_for_a_server_that_takes_none_the_tenant_is_left_to_be_the_salt(takes_salt: bool) -> None:
    target = CachingTarget(0, takes_salt)
    report_of(target, cache_salt="" if takes_salt else "s")
    assert {request.cache_salt for request in target.received} == {""}


@pytest.mark.parametrize(
    ("num_cached", "takes_salt", "options", "warning"),
    [
        (10, True, {"cache_salt": "s", "is_new_salt": True}, None),
        (
            10,
            True,
            {"cache_salt": "s"},
            "50% of the input tokens were cached, perhaps by an earlier run: use a new --c",
        ),
        (10, True, {}, "50% of the input tokens were cached"),
        (0, True, {}, None),
        (10, False, {"cache_salt": "s", "is_new_salt": True}, "perhaps by an earlier run: use another seed="),
        (None, False, {}, "cached tokens are not reported; an earlier run of these prompts may have left some: use an"),
    ],
)
def test_a_report_warns_of_prompts_that_an_earlier_run_may_have_cached(
    num_cached: int | None, takes_salt: bool, options: dict[str, Any], warning: str | None
) -> None:
    warnings = report_of(CachingTarget(num_cached, takes_salt), **options)["warnings"]
    assert len(warnings) == (warning is not None)
    assert all((warning or "") in one for one in warnings)


def test_each_model_is_calibrated_by_requests_of_its_own() -> None:
    target = LinearTarget(served_models=TWO_MODELS)
    report = report_of(target, "rate=5 lengths=D(20,5) requests=60 models=a:9,b:1", calibrate=3)
    assert [request.model for request in target.received[:6]] == ["a"] * 3 + ["b"] * 3
    assert report["slo"]["by_model"].keys() == {"a", "b"}


def test_a_model_without_a_request_in_the_calibration_is_calibrated_by_those_of_others() -> None:
    target = LinearTarget(served_models=TWO_MODELS)
    report_of(target, "rate=5 lengths=D(20,5) requests=1 models=a,b", calibrate=3)
    assert {request.model for request in target.received[:2]} == {"a", "b"}


def test_requests_are_judged_by_the_slo_that_the_server_has() -> None:
    served = (ServedModel("a", VOCABULARY, slo=Slo(ttft_s=100.0)), ServedModel("b", VOCABULARY))
    report = report_of(LinearTarget(served_models=served), f"{LINE} models=a,b")
    assert report["configured_slo"] == {"a": {"ttft_s": 100.0}}
    assert report["slo_attainment"] == report["by_model"]["a"]["slo_attainment"] == 1.0
    assert report["by_model"]["b"]["slo_attainment"] is None


def test_an_slo_that_is_a_multiple_of_a_latency_which_was_not_measured_has_a_warning() -> None:
    served = (ServedModel("a", VOCABULARY, slo=Slo(scale=8.0)), ServedModel("b", VOCABULARY, slo=Slo(ttft_s=1.0)))
    target, line = LinearTarget(served_models=served), f"{LINE} models=a,b"
    measured, unknown = report_of(target, line), report_of(target, line, calibrate=0)
    assert not any("SLO" in one for one in measured["warnings"]) and measured["by_model"]["a"]["slo_attainment"] == 1.0
    assert [one for one in unknown["warnings"] if "SLO" in one] == [
        "the SLO of a is a multiple of its unloaded latency, which is unknown: use --calibrate or --unloaded"
    ]
    assert unknown["by_model"]["a"]["slo_attainment"] is None


def test_a_known_latency_of_each_model_has_to_name_those_in_use() -> None:
    known = {"a": Unloaded(0.5, 0.0, 0.0), "c": Unloaded(1.0, 0.0, 0.0)}
    target = LinearTarget(served_models=TWO_MODELS)
    report = report_of(target, f"{LINE} models=a", unloaded=known)
    assert report["slo"]["unloaded"]["base_s"] == 0.5
    with pytest.raises(ConfigError, match="--unloaded: has no latency of b; it has: a, c"):
        report_of(target, f"{LINE} models=a,b", unloaded=known)
