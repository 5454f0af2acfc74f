"""`muxmesh loadtest` against a fake mesh. Its times are not checked here: tests/mesh has a mesh that takes time."""

import argparse
import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from loadtest.drive import Driver
from loadtest.workload import PlannedRequest
from muxmesh.cli.loadtest import _INTERRUPTED, _finish, _Progress
from muxmesh.cli.main import main
from muxmesh.errors import Overloaded
from tests.support.fake_mesh import FakeMesh, output
from tests.support.loadtest_target import StubTarget
from tests.support.virtual_time import VirtualClock, run_virtually

WORKLOAD = "rate=inf lengths=D(4,3) requests=6 models=m"


def loadtest(*arguments: str | Path, workload: str = WORKLOAD) -> int:
    """A slow machine is no failure here: the driver may be the bottleneck."""
    return main(["loadtest", "--allow-slow-driver", "--quiet", "--workload", workload, *map(str, arguments)])


def report_of(mesh: FakeMesh, path: Path, *arguments: str) -> dict[str, Any]:
    assert loadtest("--output", path, *arguments) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- arguments ---


def test_a_test_needs_a_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest"]) == 1
    assert capsys.readouterr().err == "muxmesh: loadtest: needs --workload SPEC; see `muxmesh loadtest --help`\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--slo-scale", "3"], "--slo-scale: has no effect without --sweep"),
        (["--slo-attainment", "0.5"], "--slo-attainment: has no effect without --sweep"),
        (["--vocabulary", "300"], "--vocabulary: has no effect without --openai"),
        (["--calibrate", "3", "--unloaded", "x.json"], "--calibrate: has no effect with --unloaded"),
        (["--openai", "localhost:80"], "--openai localhost:80: is not a URL"),
        (["--openai", "http://h", "--tls"], "--tls: has no effect with --openai, where an https URL means TLS"),
        (["--openai", "http://h", "--tls-ca", "x"], "--tls-ca: has no effect with --openai"),
        (["--goodput", "speed:3"], "--goodput speed:3: must be ttft:MS, tpot:MS or e2el:MS"),
        (["--goodput", "ttft"], "--goodput ttft: must be"),
        (["--goodput", "ttft:0"], "--goodput ttft:0: must be"),
        (["--goodput", "e2el:5", "tpot:nan"], "--goodput tpot:nan: must be"),
        (["--unloaded", "none.json"], "none.json: "),
        (["--output", "none/r.json"], "none/r.json: the folder none does not exist"),
        (["--html", "."], ".: is a folder; a file name is needed"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    mesh: FakeMesh,
    tmp_path: Path,
    arguments: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert loadtest(*arguments) == 1
    assert f"muxmesh: {problem}" in capsys.readouterr().err
    assert mesh.requests == []


@pytest.mark.parametrize("content", ["[]", "{}", "no JSON", '"muxmesh_loadtest"'])
def test_a_file_that_is_not_a_report_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    for arguments in (["compare", str(path)], ["--workload", WORKLOAD, "--unloaded", str(path)]):
        assert main(["loadtest", *arguments]) == 1
        assert f"muxmesh: {path}: " in capsys.readouterr().err


# --- a run ---


def test_a_report_has_every_request_and_is_written_as_it_is_printed(
    mesh: FakeMesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_path, html = tmp_path / "r.json", tmp_path / "r.html"
    arguments = ["--calibrate", "0", "--name", "fake", "--goodput", "e2el:1e9", "--json"]
    assert loadtest("--output", output_path, "--html", html, *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(output_path.read_text())
    assert (report["name"], report["target"]) == ("fake", f"mesh at {mesh.address}")
    assert (report["completed"], report["failed"], report["partial"]) == (6, 0, None)
    assert report["total_output_tokens"] == 18 and report["finish_reasons"] == {"length": 6}
    assert report["request_goodput"] == report["request_throughput"] > 0
    assert "slo" not in report, "without calibration there is no SLO"
    assert "<svg" in html.read_text()
    assert len(mesh.requests) == 6


def test_requests_carry_the_options_of_the_command(mesh: FakeMesh) -> None:
    assert loadtest("--calibrate", "0", "--temperature", "0.5", "--timeout", "3600") == 0
    for request, deadline_s in zip(mesh.requests, mesh.deadlines_s, strict=True):
        assert (request.model, request.temperature) == ("m", 0.5)
        assert len(request.token_ids.ids) == 4
        assert request.stopping.max_new_tokens == request.stopping.min_new_tokens == 3
        assert deadline_s == pytest.approx(3600, rel=0.05)


def test_calibration_sends_further_requests_first(mesh: FakeMesh, tmp_path: Path) -> None:
    report = report_of(mesh, tmp_path / "r.json", "--calibrate", "2")
    assert len(mesh.requests) == 2 + 6 and report["completed"] == 6
    assert report["slo"]["unloaded"].keys() and "5" in report["slo"]["attainment"]


def test_an_earlier_report_replaces_the_calibration(mesh: FakeMesh, tmp_path: Path) -> None:
    first = report_of(mesh, tmp_path / "first.json", "--calibrate", "1")
    mesh.requests.clear()
    second = report_of(mesh, tmp_path / "second.json", "--unloaded", str(tmp_path / "first.json"))
    assert len(mesh.requests) == 6
    assert second["slo"]["unloaded"] == first["slo"]["unloaded"]


def test_a_report_without_calibration_has_no_unloaded_latency_to_take(
    mesh: FakeMesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_of(mesh, tmp_path / "r.json", "--calibrate", "0")
    assert loadtest("--unloaded", tmp_path / "r.json") == 1
    assert f"{tmp_path / 'r.json'}: has no unloaded latency" in capsys.readouterr().err


def test_failed_requests_are_counted_and_the_rest_is_reported(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = iter([True, False] * 3)

    def fail_every_second() -> None:
        if next(failures):
            raise Overloaded("full")

    mesh.script = [fail_every_second, *output("abc")]
    assert loadtest("--calibrate", "0", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["completed"], report["failed"]) == (3, 3)
    assert report["errors"]["RESOURCE_EXHAUSTED"]["count"] == 3


def every_request_fails() -> None:
    raise Overloaded("full")


def test_a_test_without_a_success_exits_with_1_and_says_so(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = [every_request_fails]
    assert loadtest("--calibrate", "0") == 1
    out, err = capsys.readouterr()
    assert "RESOURCE_EXHAUSTED" in out
    assert err == "muxmesh: 6 of 6 requests failed\n"


@pytest.mark.parametrize(("share", "code"), [("0", 1), ("0.49", 1), ("0.5", 0), ("1", 0)])
def test_the_share_of_failed_requests_that_is_accepted_can_be_set(
    mesh: FakeMesh, share: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = iter([True, False] * 3)
    mesh.script = [lambda: every_request_fails() if next(failures) else None, *output("abc")]
    assert loadtest("--calibrate", "0", "--max-failed", share) == code
    assert ("3 of 6 requests failed, more than" in capsys.readouterr().err) == bool(code)


def test_two_runs_share_no_cached_prefix_unless_a_salt_is_given(mesh: FakeMesh, tmp_path: Path) -> None:
    salts = []
    for arguments in ([], [], ["--cache-salt", "x"], ["--cache-salt", ""]):
        mesh.requests.clear()
        report = report_of(mesh, tmp_path / "r.json", "--calibrate", "0", *arguments)
        (salt,) = {request.kv.cache_salt for request in mesh.requests}
        assert salt == (f"{report['cache_salt']}-1" if report["cache_salt"] else "")
        salts.append(salt)
    assert len(set(salts)) == 4 and salts[2:] == ["x-1", ""]


def test_a_sweep_reports_each_rate_from_low_to_high(
    mesh: FakeMesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = "lengths=D(4,3) requests=3 models=m"
    arguments = ["--sweep", "900,300", "--slo-scale", "16", "--slo-attainment", "0.01", "--calibrate", "1"]
    assert loadtest("--output", tmp_path / "s.json", *arguments, workload=workload) == 0
    assert "Highest rate within the SLO" in capsys.readouterr().out
    document = json.loads((tmp_path / "s.json").read_text())
    assert [report["rate"] for report in document["reports"]] == [300, 900]
    assert len(mesh.requests) == 1 + 2 * 3
    assert main(["loadtest", "compare", str(tmp_path / "s.json"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["reports"]) == 2


# --- progress and Ctrl-C ---


def test_progress_is_a_line_every_ten_seconds_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    request = PlannedRequest(0, 0.0, (5,), False, 1, True, 0)

    async def drive(quiet: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        progress = _Progress(task, quiet)
        driver = Driver(StubTarget(stall_at_s=0, stall_s=25), [request], VirtualClock())
        progress.show("rate 1", driver)
        await driver.run()
        progress.end()

    run_virtually(drive(quiet=False))
    assert capsys.readouterr().err.splitlines() == [
        f"rate 1: {now_s} s, 1 of 1 sent, 1 in flight, 0 done, 0 failed" for now_s in (10, 20)
    ]
    run_virtually(drive(quiet=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("calibrate", "is_partial"), [("1", False), ("0", True)], ids=["while calibrating", "during the run"]
)
def test_ctrl_c_ends_with_130_and_keeps_what_was_measured(
    mesh: FakeMesh, tmp_path: Path, calibrate: str, is_partial: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    mesh.script = [interrupt, asyncio.Event()]
    assert loadtest("--output", path, "--calibrate", calibrate, "--max-concurrency", "1") == 130
    mesh.wait_until(lambda mesh: mesh.num_ended == len(mesh.requests) == 1)
    assert path.exists() is is_partial
    if is_partial:
        report = json.loads(path.read_text())
        assert (report["partial"], report["completed"]) == ("interrupted by the user", 0)
        assert report["interrupted"] == 6
    assert ("PARTIAL" in capsys.readouterr().out) is is_partial


def test_ctrl_c_between_two_runs_of_a_sweep_stops_the_second(capsys: pytest.CaptureFixture[str]) -> None:
    async def sweep() -> list[str]:
        task = asyncio.current_task()
        assert task is not None
        progress, reasons = _Progress(task, quiet=True), []
        for rate in (1, 2):
            driver = Driver(StubTarget(), [], VirtualClock())
            progress.show(f"rate {rate}", driver)
            reasons.append((await driver.run()).partial)
            progress.interrupt()
        progress.end()
        return reasons

    assert run_virtually(sweep()) == ["", _INTERRUPTED]


def test_ctrl_c_ends_with_130_though_the_driver_was_too_slow(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"partial": _INTERRUPTED, "driver_bottleneck": "the event loop was late", "reports": []}
    assert _finish(document, argparse.Namespace(output=None, allow_slow_driver=False)) == 130
    assert "the event loop was late" in capsys.readouterr().err


# --- compare ---


@pytest.fixture
def reports(mesh: FakeMesh, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        report_of(mesh, path, "--calibrate", "0", "--name", path.stem)
    return paths


def test_reports_are_compared_side_by_side(
    reports: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["loadtest", "compare", *map(str, reports), "--html", str(tmp_path / "c.html")]) == 0
    table = capsys.readouterr().out
    assert "one" in table and "two" in table
    assert "<svg" in (tmp_path / "c.html").read_text()


def test_a_comparison_for_programs_leaves_out_the_single_requests(
    reports: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["loadtest", "compare", *map(str, reports), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["reports"]
    for report, path in zip(compared, reports, strict=True):
        whole = json.loads(path.read_text())
        assert whole.keys() - report.keys() == {"requests", "series"}
        assert report == {key: whole[key] for key in report}
