"""Runs checks as processes, each with a time limit, and writes the results as JSON after each.

Knows nothing of GPUs. A check's processes are found by a variable in their environment, so that a daemon that a check
left behind is found and killed too, and reported as a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_check.check import Check, Result, startable

MARK = "MUXMESH_GPU_CHECK"
"""Environment variable of all processes of a check."""
MAX_OUTPUT = 3000
MOST_AT_ONCE = 6
_PYTEST = ("-W", "default", "-p", "no:benchmark")
"""Warnings are no errors: libraries differ from machine to machine, and so do the plugins that are installed."""
_LEAST_S = 5.0
"""A check does not start with less time than this left."""

Command = Callable[[Check, Path], Sequence[str]]
"""The command of a check; the path is where it leaves its findings."""


def command_of(check: Check, findings: Path, is_dry_run: bool) -> Sequence[str]:
    """The command line of a check of the table."""
    if check.tests:
        report = f"--junitxml={findings.with_suffix('.xml')}"
        divided = ("-n", str(check.workers)) if check.workers and importlib.util.find_spec("xdist") else ()
        return (sys.executable, "-m", "pytest", "-q", "--tb=short", *_PYTEST, report, *divided, *check.tests)
    dry = ("--dry-run",) if is_dry_run else ()
    return (sys.executable, "-m", "benchmarks.gpu_check.checks", check.name, "--findings", str(findings), *dry)


async def run_checks(
    checks: Sequence[Check], folder: Path, budget_s: float, command: Command, show: Callable[[Result], None]
) -> list[Result]:
    """Runs all checks, as many at once as their uses allow, in ``budget_s`` seconds. Writes ``folder``/gpu_check.json.

    A check that has no time left is "not run". Results are in the order of ``checks``.
    """
    deadline_s = time.monotonic() + budget_s
    waiting, results = list(checks), dict[str, Result]()
    running: dict[asyncio.Task[Result], Check] = {}
    with contextlib.ExitStack() as undo:
        scratch = folder / "findings"
        scratch.mkdir(parents=True, exist_ok=True)
        undo.callback(_remove, scratch)
        while waiting or running:
            for check in startable(waiting, list(running.values()), MOST_AT_ONCE):
                waiting.remove(check)
                limit_s = min(check.limit_s, deadline_s - time.monotonic())
                running[asyncio.create_task(run_check(check, scratch, limit_s, command))] = check
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                result = results[running.pop(task).name] = task.result()
                show(result)
            ordered = [results[check.name] for check in checks if check.name in results]
            write_results(folder / "gpu_check.json", ordered)
    return ordered


async def run_check(check: Check, scratch: Path, limit_s: float, command: Command) -> Result:
    """Runs one check, and kills all of its processes at the end, or after ``limit_s``."""
    result = Result(check.name, check.expected, "not run")
    if limit_s < _LEAST_S and limit_s < check.limit_s:
        result.output = "no time was left for it"
        return result
    findings, log = scratch / f"{check.name}.json", scratch / f"{check.name}.log"
    mark = f"{check.name}-{os.getpid()}"
    started_at_s = time.monotonic()
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command(check, findings),
            env={**os.environ, **dict(check.environment), MARK: mark, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        async with asyncio.timeout(limit_s):
            result.state = "failed" if await process.wait() else "passed"
    except TimeoutError:
        result.state = "timed out"
    left = await kill_marked(mark)
    await process.wait()
    result.seconds = round(time.monotonic() - started_at_s, 2)
    _read_findings(result, findings)
    if left and result.state == "passed":
        result.state = "failed"
        result.comparisons.append({"what": "no process is left behind", "holds": False, "value": left})
    if result.state != "passed":
        result.output = log.read_text(errors="replace")[-MAX_OUTPUT:]
    return result


async def kill_marked(mark: str) -> list[str]:
    """Kills all processes whose environment has this mark. Returns their command lines."""
    killed: list[str] = []
    for _ in range(100):  # a process may start another while it is being killed
        pids = marked(mark)
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(OSError):
                killed.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
    return killed


def marked(mark: str) -> list[int]:
    """Ids of all processes of this user whose environment has the mark; those that have ended have none."""
    entry, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if entry in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Writes all results so far; the file is there in full or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([result.as_json() for result in results], indent=1, default=str) + "\n")
    partial.replace(path)


def _read_findings(result: Result, findings: Path) -> None:
    """Reads what the check left: its findings, or pytest's report, of which skipped tests count as failures."""
    report = findings.with_suffix(".xml")
    if findings.exists():
        content = json.loads(findings.read_text())
        result.figures, result.comparisons = content["figures"], content["comparisons"]
    elif report.exists():
        suite = next(ElementTree.parse(report).iter("testsuite"))
        counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        result.figures = {**counts, "failed": dict(_failures(suite))}
        ran = counts["tests"] - counts["skipped"]
        skipped = counts["skipped"]
        result.comparisons = [
            {"what": "tests ran", "holds": ran > 0, "value": ran},
            {"what": "tests failed", "holds": not counts["failures"] + counts["errors"], "value": counts["failures"]},
            {"what": "tests were skipped", "holds": True, "value": skipped, "is_aim": True},
        ]
        if ran == 0 and result.state == "passed":
            result.state = "failed"


def _failures(suite: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """The name of each test of pytest's report that failed, and the end of what it says."""
    for case in suite.iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            yield f"{case.get('classname', '')}.{case.get('name', '')}", (problem.text or "")[-1200:]


def _remove(scratch: Path) -> None:
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
