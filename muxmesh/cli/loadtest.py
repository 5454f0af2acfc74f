"""`muxmesh loadtest`: sends load to a mesh or an OpenAI-compatible server and writes the report.

It checks the arguments, shows progress and decides whether a report may be printed. `loadtest` drives and measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest import table
from loadtest.drive import Driver
from loadtest.html import page
from loadtest.mesh_target import MeshTarget
from loadtest.report import Goodput, bottleneck
from loadtest.session import Options, Session
from loadtest.slo import Unloaded
from loadtest.spec import parse_spec
from loadtest.target import Target
from muxmesh.cli.common import api_key, date_now, print_json, refuse_unwritable
from muxmesh.cli.tls_options import given_tls_option, tls_of
from muxmesh.clock import SystemClock
from muxmesh.errors import ConfigError
from muxmesh.quoting import named

_SHOW_EVERY_S = 1.0
_OPENAI_VOCABULARY = 32_000
_CALIBRATE, _SLO_SCALE, _SLO_ATTAINMENT = 5, 5, 0.9


def run(arguments: argparse.Namespace) -> int:
    """Runs the test or the comparison; returns the exit code, which is 1 for a partial report and 130 after Ctrl-C."""
    if arguments.action == "compare":
        return _compare(arguments)
    if arguments.workload is None:
        raise ConfigError("loadtest: needs --workload SPEC; see `muxmesh loadtest --help`")
    _refuse_without_effect(arguments)
    refuse_unwritable(arguments.output, arguments.html)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            document = runner.run(_test(arguments))
        except asyncio.CancelledError:
            return 130
    return _finish(document, arguments)


def _refuse_without_effect(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for an option that would have no effect."""
    for name, value, needed, needed_value in (
        ("--slo-scale", arguments.slo_scale, "--sweep", arguments.sweep),
        ("--slo-attainment", arguments.slo_attainment, "--sweep", arguments.sweep),
        ("--vocabulary", arguments.vocabulary, "--openai", arguments.openai),
    ):
        if value is not None and not needed_value:
            raise ConfigError(f"{name}: has no effect without {needed}")
    if arguments.openai is not None and (option := given_tls_option(arguments)) is not None:
        raise ConfigError(f"{option}: has no effect with --openai, where an https URL means TLS")
    if arguments.calibrate is not None and arguments.unloaded is not None:
        raise ConfigError("--calibrate: has no effect with --unloaded, which replaces the measurement")


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads reports and sweeps from JSON files. Raises ConfigError for any other content."""
    documents = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: is not JSON: {error}") from error
        if not isinstance(content, dict) or not {"muxmesh_loadtest", "muxmesh_loadtest_sweep"} & content.keys():
            raise ConfigError(f"{path}: is not a report of `muxmesh loadtest`")
        documents.append(content)
    return documents


async def _test(arguments: argparse.Namespace) -> dict[str, Any]:
    words = arguments.workload.split()
    needs_rate = arguments.sweep and not any(word.startswith(("rate=", "trace=")) for word in words)
    spec = parse_spec(arguments.workload + (f" rate={arguments.sweep[0]:g}" if needs_rate else ""))
    target = _target(arguments)
    options = Options(
        name=arguments.name or target.name,
        date=date_now(),
        max_concurrency=arguments.max_concurrency,
        goodput=_goodput(arguments.goodput),
        calibrate=_CALIBRATE if arguments.calibrate is None else arguments.calibrate,
        unloaded=_unloaded(arguments.unloaded),
        cache_salt=secrets.token_hex(4) if arguments.cache_salt is None else arguments.cache_salt,
        is_new_salt=arguments.cache_salt is None,
    )
    this_task = asyncio.current_task()
    assert this_task is not None
    progress = _Progress(this_task, quiet=arguments.quiet)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, progress.interrupt)
    try:
        session = Session(target, options, SystemClock(), progress.show)
        if arguments.sweep:
            scale, attainment = arguments.slo_scale or _SLO_SCALE, arguments.slo_attainment or _SLO_ATTAINMENT
            return await session.sweep(spec, arguments.sweep, scale, attainment)
        return await session.run(spec)
    finally:
        progress.end()
        await target.close()


def _target(arguments: argparse.Namespace) -> Target:
    if arguments.openai is None:
        tls = tls_of(arguments, arguments.address)
        return MeshTarget(arguments.address, arguments.temperature, arguments.timeout, tls, api_key())
    from loadtest.openai_target import OpenAiTarget  # noqa: PLC0415 - only this target needs an HTTP client

    if not arguments.openai.startswith(("http://", "https://")):
        raise ConfigError(f"--openai {named(arguments.openai)}: is not a URL, such as http://127.0.0.1:8000")
    size = arguments.vocabulary or _OPENAI_VOCABULARY
    return OpenAiTarget(arguments.openai, range(size // 8, size * 3 // 4), arguments.temperature, arguments.timeout)


def _goodput(pairs: Sequence[str]) -> Goodput | None:
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1
        if name not in ("ttft", "tpot", "e2el") or not limits[name] > 0:
            raise ConfigError(f"--goodput {named(pair)}: must be ttft:MS, tpot:MS or e2el:MS, in milliseconds above 0")
    return Goodput(**{f"{name}_ms": limit for name, limit in limits.items()}) if limits else None


def _unloaded(path: Path | None) -> dict[str, Unloaded] | Unloaded | None:
    """The unloaded latency in a report: that of its model, or by name if it has several."""
    if path is None:
        return None
    (document,) = read_documents([path])
    report = document.get("reports", [document])[0]
    if "slo" not in report:
        raise ConfigError(f"{path}: has no unloaded latency; the report was made with --calibrate 0")
    if "simulation" in report:
        raise ConfigError(f"{path}: is the report of a simulation, which measured no latency of an idle server")
    if "by_model" in report["slo"]:
        return {name: Unloaded(**one["unloaded"]) for name, one in report["slo"]["by_model"].items()}
    return Unloaded(**report["slo"]["unloaded"])


def _finish(document: dict[str, Any], arguments: argparse.Namespace) -> int:
    reports = document.get("reports", [document])
    for report in reports:
        if reason := bottleneck(report):
            report["driver_bottleneck"] = reason
            document.setdefault("driver_bottleneck", reason)
    reason, was_interrupted = document.get("driver_bottleneck"), document["partial"] == _INTERRUPTED
    if arguments.output:
        arguments.output.write_text(json.dumps(document) + "\n")
    if reason and not arguments.allow_slow_driver:
        kept = f" ({arguments.output} has them, marked as such)" if arguments.output else ""
        print(
            f"muxmesh: no report: {reason}, so the figures would measure the driver{kept}. Send less load, use a "
            "larger machine, or accept them with --allow-slow-driver",
            file=sys.stderr,
        )
        return 130 if was_interrupted else 1
    if arguments.html:
        arguments.html.write_text(page([document]))
    if arguments.json:
        print_json(document)
    else:
        print("\n\n".join(map(table.render, reports)))
        if "highest_rate_within_slo" in document:
            print(f"\n{table.render_sweep(document)}")
        if reason:
            print(f"NOT RELIABLE: {reason}")
    if was_interrupted:
        return 130
    return 1 if document["partial"] or _too_many_failed(reports, arguments.max_failed) else 0


def _too_many_failed(reports: Sequence[Mapping[str, Any]], max_failed: float | None) -> bool:
    """True, with a line on stderr, if no request succeeded or more than a share of ``max_failed`` failed."""
    num_failed = sum(report["failed"] for report in reports)
    num_ended = num_failed + sum(report["completed"] for report in reports)
    limit = 1.0 if max_failed is None else max_failed
    if not num_failed or (num_failed < num_ended and num_failed / num_ended <= limit):
        return False
    allowed = "" if max_failed is None else f", more than {max_failed:.1%}"
    print(f"muxmesh: {num_failed} of {num_ended} requests failed{allowed}", file=sys.stderr)
    return True


def _compare(arguments: argparse.Namespace) -> int:
    refuse_unwritable(arguments.html)
    documents = read_documents(arguments.files)
    reports = [report for document in documents for report in document.get("reports", [document])]
    if arguments.html:
        arguments.html.write_text(page(documents))
    if arguments.json:
        print_json({"reports": [_without_requests(report) for report in reports]})
    else:
        print(table.compare(reports))
    return 0


def _without_requests(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in ("requests", "series")}


_INTERRUPTED = "interrupted by the user"


class _Progress:
    """Progress on stderr: one line that is rewritten on a terminal, one line every ten seconds elsewhere."""

    def __init__(self, test: asyncio.Task[Any], quiet: bool) -> None:
        self._test = test
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._driver: Driver | None = None
        self._stage = ""
        self._num_ticks = 0
        self._is_interrupted = False
        self._timer = asyncio.get_running_loop().call_later(_SHOW_EVERY_S, self._tick)

    def show(self, stage: str, driver: Driver) -> None:
        """Shows this driver until another one is set."""
        self._stage, self._driver = stage, driver
        if self._is_interrupted:  # between two runs of a sweep
            driver.stop(_INTERRUPTED)

    def interrupt(self) -> None:
        """Stops the run in progress, whose report is then partial. Before the first run it cancels the whole test."""
        self._is_interrupted = True
        if self._driver is not None and self._stage != "calibrating":
            self._driver.stop(_INTERRUPTED)
        else:
            self._test.cancel()

    def end(self) -> None:
        """Clears the line and stops the timer."""
        self._timer.cancel()
        if self._is_terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tick(self) -> None:
        self._num_ticks += 1
        if self._driver is not None and not self._quiet and (self._is_terminal or self._num_ticks % 10 == 0):
            end = "" if self._is_terminal else "\n"
            start = "\r\x1b[K" if self._is_terminal else ""
            print(f"{start}{self._stage}: {_line(self._driver)}", end=end, file=sys.stderr, flush=True)
        self._timer = asyncio.get_running_loop().call_later(_SHOW_EVERY_S, self._tick)


def _line(driver: Driver) -> str:
    sent, done, failed = driver.num_sent, driver.num_done, driver.num_failed
    return (
        f"{driver.now_s():.0f} s, {sent} of {len(driver.run_so_far.records)} sent, {sent - done - failed} in flight, "
        f"{done} done, {failed} failed"
    )


def _loop_factory() -> Any:
    try:
        import uvloop  # noqa: PLC0415 - optional: it is faster
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop
