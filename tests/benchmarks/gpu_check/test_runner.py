import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.gpu_check.__main__ import chosen, line, summary
from benchmarks.gpu_check.check import Check, Findings, Result, startable
from benchmarks.gpu_check.runner import command_of, marked, run_checks

SCRIPTS = {
    "good": "findings.figure('speed', 3); findings.expect('it holds', True, 5)",
    "bad": "findings.expect('it holds', True); findings.expect('the sky is green', False, 'blue')",
    "raises": "print('the beginning'); raise ValueError('what is wrong')",
    "silent": "",
    "endless": "findings.figure('so far', 1); threading.Event().wait()",
    "leaves a daemon": (
        "findings.expect('it holds', True);"
        "subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=subprocess.DEVNULL)"
    ),
}


def script_of(check: Check, findings: Path) -> Sequence[str]:
    """A process that does what `SCRIPTS` says, as `benchmarks.gpu_check.checks` would run a function."""
    body = SCRIPTS[check.name].replace(";", "\n").replace("\n ", "\n")
    head = (
        "import subprocess, sys, threading\nfrom pathlib import Path\nfrom benchmarks.gpu_check.check import Findings\n"
    )
    made = f"findings = Findings(Path({str(findings)!r}))\n"
    return (sys.executable, "-c", f"{head}{made}{body}\nsys.exit(0 if findings.hold else 1)")


def check(name: str, limit_s: float = 60, use: str = "beside") -> Check:
    return Check(name, f"{name} is expected", limit_s, use)  # type: ignore[arg-type]


def results_of(folder: Path, *checks: Check, budget_s: float = 60.0) -> list[Result]:
    return asyncio.run(run_checks(checks, folder, budget_s, script_of, lambda result: None))


def test_a_check_passes_if_something_was_compared_and_everything_holds(tmp_path: Path) -> None:
    results = results_of(tmp_path, *(check(name) for name in ("good", "bad", "raises", "silent")))
    assert [result.state for result in results] == ["passed", "failed", "failed", "failed"]
    good, bad, raises, _ = results
    assert (good.figures, good.output) == ({"speed": 3}, "")
    assert [one["holds"] for one in bad.comparisons] == [True, False]
    assert "the beginning" in raises.output and "ValueError: what is wrong" in raises.output


def test_a_check_that_takes_too_long_is_killed_and_keeps_what_it_found(tmp_path: Path) -> None:
    (result,) = results_of(tmp_path, check("endless", limit_s=2))
    assert (result.state, result.figures) == ("timed out", {"so far": 1})
    assert 2 <= result.seconds < 30
    assert marked(f"endless-{os.getpid()}") == []


def test_a_process_that_a_check_leaves_behind_is_killed_and_fails_it(tmp_path: Path) -> None:
    (result,) = results_of(tmp_path, check("leaves a daemon"))
    assert result.state == "failed"
    assert result.comparisons[-1]["value"] == ["sleep 1000"]
    assert marked(f"leaves a daemon-{os.getpid()}") == []


def test_results_are_in_the_file_after_each_check(tmp_path: Path) -> None:
    written: list[list[str]] = []

    def show(_: Result) -> None:
        path = tmp_path / "gpu_check.json"
        written.append([one["name"] for one in json.loads(path.read_text())] if path.exists() else [])

    checks = [check("good", use="alone"), check("bad", use="alone"), check("silent", use="alone")]
    asyncio.run(run_checks(checks, tmp_path, 60, script_of, show))
    assert written == [[], ["good"], ["good", "bad"]]
    last = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(one["name"], one["state"]) for one in last] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("silent", "failed"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.json"]


def test_a_check_for_which_no_time_is_left_is_not_run(tmp_path: Path) -> None:
    first, second = results_of(tmp_path, check("endless", use="alone"), check("good", use="alone"), budget_s=6)
    assert (first.state, second.state, second.seconds) == ("timed out", "not run", 0.0)


def test_checks_that_measure_run_alone_and_one_mps_daemon_runs_at_a_time() -> None:
    a, b, mps, other_mps = check("a"), check("b"), check("m", use="mps"), check("n", use="mps")
    alone = check("alone", use="alone")
    assert startable([a, mps, other_mps, b, alone], [], 9) == [a, mps, b]
    assert startable([other_mps, alone], [a, mps], 9) == []
    assert startable([other_mps, alone], [a], 9) == [other_mps]
    assert startable([alone, b], [a], 9) == []
    assert startable([alone, b], [], 9) == [alone]
    assert startable([b, other_mps], [alone], 9) == []
    assert startable([a, b, mps], [], 2) == [a, b]


def test_pytest_is_asked_for_a_report_and_functions_for_their_findings(tmp_path: Path) -> None:
    tests = Check("t", "", 1, "beside", ("tests/x.py", "-k", "cuda"))
    assert command_of(tests, tmp_path / "t.json", is_dry_run=False)[1:] == (
        "-m", "pytest", "-q", "--tb=short", "-W", "default", "-p", "no:benchmark", f"--junitxml={tmp_path}/t.xml",
        "tests/x.py", "-k", "cuda",
    )  # fmt: skip
    assert command_of(check("good"), tmp_path / "g.json", is_dry_run=True)[2:] == (
        "benchmarks.gpu_check.checks", "good", "--findings", str(tmp_path / "g.json"), "--dry-run",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "state"), [("assert True", "passed"), ("assert False", "failed"), ("pytest.skip('no GPU')", "failed")]
)
def test_tests_that_are_all_skipped_fail_the_check(tmp_path: Path, body: str, state: str) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(f"import pytest\ndef test_it():\n    {body}\n")
    tests = Check("t", "", 60, "beside", (str(path), "-c", os.devnull, "--rootdir", str(tmp_path)))
    (result,) = asyncio.run(
        run_checks([tests], tmp_path / "out", 60, lambda one, to: command_of(one, to, False), lambda _: None)
    )
    assert (result.state, result.figures["tests"]) == (state, 1)
    assert list(result.figures["failed"]) == (["test_it.test_it"] if "False" in body else [])


def test_names_choose_among_the_checks_in_the_order_of_the_table() -> None:
    checks = [check("a"), check("b"), check("c")]
    assert [one.name for one in chosen(checks, ["c", "a"], [])] == ["a", "c"]
    assert [one.name for one in chosen(checks, [], ["b"])] == ["a", "c"]
    with pytest.raises(SystemExit, match="no check has the name x; checks: a, b, c"):
        chosen(checks, ["x"], [])


def test_the_summary_names_what_does_not_hold_and_ends_with_the_count() -> None:
    passed = Result("a", "is fast", "passed", 1.0)
    failed = Result("b", "", "failed", 2.0, {}, [{"what": "it is fast", "holds": False, "value": 3}], "the end")
    assert line(passed).endswith("is fast")
    assert "NOT: it is fast (3)" in line(failed)
    text = summary([passed, failed])
    assert "--- b: failed\nthe end" in text and text.endswith("1 of 2 checks passed")


def test_aims_that_are_missed_fail_nothing() -> None:
    findings = Findings()
    assert not findings.hold, "nothing was compared"
    findings.aim("fast", False, 3)
    assert findings.hold
    findings.expect("right", False)
    assert not findings.hold
