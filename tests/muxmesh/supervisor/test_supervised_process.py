"""Supervised processes, with real ones."""

import asyncio
import json
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from muxmesh.clock import Clock, ManualClock, SystemClock
from muxmesh.errors import Unavailable
from muxmesh.log_format import LogFormat
from muxmesh.supervisor import supervised_process
from muxmesh.supervisor.liveness import MAX_SILENT_CHECKS
from muxmesh.supervisor.supervised_process import HEALTHY_AFTER_S, ProcessSpec, SupervisedProcess
from tests.support.debugged_process import DEBUGGED, skip_without_permission

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
GRACEFUL = """
import signal, sys, time

def stop(*_):
    print("stopping", flush=True)
    print("stopped", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(600)
"""


class Observed:
    """A supervised process with its lines and restarts."""

    def __init__(
        self,
        script: str,
        logs: Path,
        wait_ready: Callable[[], Awaitable[None]] | None = None,
        environment: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        command: tuple[str, ...] | None = None,
        ask: Callable[[], Coroutine[Any, Any, bool]] | None = None,
        quit_process: Callable[[], Awaitable[None]] | None = None,
        log_format: LogFormat = "text",
    ) -> None:
        self.lines: list[str] = []
        self.num_restarting = self.num_asked = 0
        self.has_output = asyncio.Event()
        self.is_restarting = asyncio.Event()
        spec = ProcessSpec(
            "a/process",
            command or (sys.executable, "-c", script),
            wait_ready or self._first_line,
            self._asked(ask or never),
            environment or {},
            quit=quit_process,
        )
        self.process = SupervisedProcess(spec, logs, clock or SystemClock(), self._show, self._on_restart, log_format)

    async def _first_line(self) -> None:
        await self.has_output.wait()

    def _asked(self, ask: Callable[[], Coroutine[Any, Any, bool]]) -> Callable[[], Coroutine[Any, Any, bool]]:
        async def counted() -> bool:
            self.num_asked += 1
            return await ask()

        return counted

    async def until(self, line: str) -> None:
        """Waits for a line of output."""
        async with asyncio.timeout(20):
            while line not in self.lines:
                self.has_output.clear()
                await self.has_output.wait()

    async def until_lines(self, count: int) -> None:
        """Waits for ``count`` lines of output."""
        async with asyncio.timeout(20):
            while len(self.lines) < count:
                self.has_output.clear()
                await self.has_output.wait()

    def _show(self, name: str, line: str) -> None:
        self.lines.append(f"{name}: {line}")
        self.has_output.set()

    def _on_restart(self) -> None:
        self.num_restarting += 1
        self.is_restarting.set()


@asynccontextmanager
async def started(observed: Observed) -> AsyncIterator[SupervisedProcess]:
    """The process, once it is ready. Stops it at the end."""
    observed.process.start()
    try:
        await observed.process.wait_ready(20)
        yield observed.process
    finally:
        await observed.process.stop(5)


async def never() -> Any:
    await asyncio.Event().wait()


async def kill(observed: Observed) -> None:
    """Kills the running instance and waits for the output of the next one."""
    pid = observed.process.pid
    assert pid is not None
    observed.has_output.clear()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        await observed.has_output.wait()
    assert observed.process.pid not in (None, pid)


async def test_output_is_shown_and_logged_under_the_name_of_the_process(tmp_path: Path) -> None:
    observed = Observed(SLEEPER, tmp_path)
    async with started(observed):
        pass
    assert observed.lines == ["a/process: up"]
    assert re.fullmatch(r"[-\d]+ [:,\d]+ up\n", (tmp_path / "a-process.log").read_text())


async def test_output_during_the_shutdown_is_collected(tmp_path: Path) -> None:
    observed = Observed(GRACEFUL, tmp_path)
    async with started(observed):
        pass
    assert observed.lines == ["a/process: up", "a/process: stopping", "a/process: stopped"]
    assert [line.split()[-1] for line in (tmp_path / "a-process.log").read_text().splitlines()] == [
        "up",
        "stopping",
        "stopped",
    ]


async def test_errors_and_bytes_that_are_not_utf_8_are_part_of_the_output(tmp_path: Path) -> None:
    script = r"import sys, time; sys.stderr.buffer.write(b'caf\xe9\n'); sys.stderr.flush(); time.sleep(600)"
    observed = Observed(script, tmp_path)
    async with started(observed):
        pass
    assert observed.lines == ["a/process: caf\N{REPLACEMENT CHARACTER}"]


async def test_a_very_long_line_is_divided_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    script = "import time; print('x' * 200_000 + chr(10) + 'short', flush=True); time.sleep(600)"
    observed = Observed(script, tmp_path)
    async with started(observed):
        await observed.until("a/process: short")
    assert sum(line.count("x") for line in observed.lines) == 200_000
    assert 1 < len(observed.lines) < 10
    assert observed.lines[-1] == "a/process: short"
    assert (tmp_path / "a-process.log").read_text().endswith(" short\n")


async def test_the_environment_extends_and_overrides_that_of_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEPT", "supervisor")
    monkeypatch.setenv("CHANGED", "supervisor")
    script = "import json, os, time; print(json.dumps(dict(os.environ)), flush=True); time.sleep(600)"
    observed = Observed(script, tmp_path, environment={"CHANGED": "process", "ADDED": "process"})
    async with started(observed):
        pass
    environment = json.loads(observed.lines[0].removeprefix("a/process: "))
    assert [environment[name] for name in ("KEPT", "CHANGED", "ADDED")] == ["supervisor", "process", "process"]
    assert "ADDED" not in os.environ


async def test_a_process_is_the_leader_of_a_new_session(tmp_path: Path) -> None:
    """So Ctrl-C reaches the supervisor only."""
    script = "import os, time; print(os.getsid(0), os.getpid(), flush=True); time.sleep(600)"
    observed = Observed(script, tmp_path)
    async with started(observed) as process:
        pid = process.pid
    assert observed.lines == [f"a/process: {pid} {pid}"]


async def test_a_process_that_exits_is_restarted(tmp_path: Path) -> None:
    observed = Observed(SLEEPER, tmp_path)
    async with started(observed) as process:
        await kill(observed)
        assert observed.num_restarting == 1
        assert process.num_restarts == 1


async def test_a_ready_process_is_restarted_more_often_than_one_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.001)
    observed = Observed(SLEEPER, tmp_path)
    async with started(observed) as process:
        for _ in range(4):
            await kill(observed)
        assert process.num_restarts == 4


def delays(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Delay of each restart, from the log."""
    return [
        record.getMessage().rpartition(" restart in ")[2] for record in caplog.records if "restart in" in record.msg
    ]


async def test_the_delay_before_a_restart_doubles_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervised_process, "LONGEST_BACKOFF_S", 0.3)
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.1)
    observed = Observed(SLEEPER, tmp_path, clock=ManualClock())
    async with started(observed):
        for _ in range(4):
            await kill(observed)
    assert delays(caplog) == ["0.1 s", "0.2 s", "0.3 s", "0.3 s"]
    assert caplog.records[0].getMessage() == "a/process: exit code -9; restart in 0.1 s"


async def test_a_long_uptime_resets_the_delay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.1)
    clock = ManualClock()
    observed = Observed(SLEEPER, tmp_path, clock=clock)
    async with started(observed):
        for uptime_s in (0.0, HEALTHY_AFTER_S - 1, HEALTHY_AFTER_S, 0.0):
            clock.advance(uptime_s)
            await kill(observed)
    assert delays(caplog) == ["0.1 s", "0.2 s", "0.1 s", "0.2 s"]


async def test_a_process_that_exits_repeatedly_before_it_is_ready_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.01)
    observed = Observed("print('no such model'); raise SystemExit(3)", tmp_path, never)
    observed.process.start()
    with pytest.raises(Unavailable) as caught:
        await observed.process.wait_ready(30)
    await observed.process.stop(5)
    assert str(caught.value) == (
        "a/process exited 3 times before it was ready, last: exit code 3; its last output:\n"
        "  no such model\n  no such model\n  no such model"
    )
    assert observed.num_restarting == 2


async def test_a_bug_in_the_supervision_of_a_process_is_its_end_and_not_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observed = Observed("", tmp_path, never, command=("a\0command",))
    observed.process.start()
    with pytest.raises(Unavailable, match="a/process the task supervise a/process failed: ValueError: embedded null"):
        await observed.process.wait_ready(30)
    await observed.process.stop(5)
    assert caplog.records[0].getMessage() == "the task supervise a/process failed"


async def test_a_process_that_is_not_ready_in_time_is_unavailable(tmp_path: Path) -> None:
    observed = Observed(SLEEPER, tmp_path, never)
    observed.process.start()
    async with asyncio.timeout(20):
        await observed.has_output.wait()
    with pytest.raises(Unavailable) as caught:
        await observed.process.wait_ready(0.01)
    await observed.process.stop(5)
    assert str(caught.value) == "a/process not ready after 0 s; its last output:\n  up"
    assert observed.process.pid is None


async def test_an_error_of_the_readiness_check_is_raised(tmp_path: Path) -> None:
    async def broken() -> None:
        raise LookupError("no address")

    observed = Observed(SLEEPER, tmp_path, broken)
    observed.process.start()
    with pytest.raises(LookupError, match="no address"):
        await observed.process.wait_ready(20)
    await observed.process.stop(5)


async def test_a_program_that_cannot_be_started_counts_as_an_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.01)
    observed = Observed("", tmp_path, never, command=(str(tmp_path / "nothing"),))
    observed.process.start()
    with pytest.raises(
        Unavailable, match=r"exited 3 times before it was ready, last: cannot be started: .*No such file"
    ):
        await observed.process.wait_ready(30)
    await observed.process.stop(5)


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observed = Observed(STUBBORN, tmp_path)
    observed.process.start()
    await observed.process.wait_ready(20)
    pid = observed.process.pid
    await observed.process.stop(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "a/process did not stop within 0 s and is killed"
    ]


@pytest.fixture
def fast_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised_process, "CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.01)


async def until_restarted(observed: Observed) -> None:
    async with asyncio.timeout(20):
        await observed.is_restarting.wait()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


async def responds() -> bool:
    return True


@pytest.mark.usefixtures("fast_checks")
async def test_a_process_that_a_signal_stops_is_killed_and_restarted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observed = Observed(SLEEPER, tmp_path, ask=responds)
    async with started(observed) as process:
        stopped = process.pid
        observed.has_output.clear()
        process.signal(signal.SIGSTOP)
        await until_restarted(observed)
        assert not Path(f"/proc/{stopped}").exists()
        async with asyncio.timeout(20):
            await observed.has_output.wait()
        assert process.pid not in (None, stopped)
        assert process.num_restarts == 1
    assert warnings(caplog) == ["a/process: was stopped by a signal for 5 s and was killed; restart in 0.0 s"]


@pytest.mark.usefixtures("fast_checks")
async def test_a_process_that_no_longer_responds_is_killed_and_restarted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hangs = asyncio.Event()

    async def responds_until_it_hangs() -> bool:
        if hangs.is_set():
            await asyncio.Event().wait()
        return True

    observed = Observed(STUBBORN, tmp_path, ask=responds_until_it_hangs)
    async with started(observed):
        async with asyncio.timeout(20):
            while not observed.num_asked:
                await asyncio.sleep(0)
        hangs.set()
        await until_restarted(observed)
    assert warnings(caplog)[0] == "a/process: did not respond for 8 s and was killed; restart in 0.0 s"


@pytest.mark.usefixtures("fast_checks")
async def test_a_process_in_a_debugger_is_not_killed_although_it_stands_and_does_not_respond(tmp_path: Path) -> None:
    async def responds_until_debugged() -> bool:
        return not observed.lines

    observed = Observed(DEBUGGED, tmp_path, ask=responds_until_debugged)
    async with started(observed) as process:
        skip_without_permission(observed.lines[0].removeprefix("a/process: "))
        pid, num_asked = process.pid, observed.num_asked
        async with asyncio.timeout(20):
            while observed.num_asked < num_asked + 3 * MAX_SILENT_CHECKS:
                await asyncio.sleep(0)
        assert (process.pid, process.num_restarts) == (pid, 0)


@pytest.mark.usefixtures("fast_checks")
async def test_a_process_is_stopped_by_a_signal_and_ends_in_order_all_the_same(tmp_path: Path) -> None:
    """SIGTERM is pending until SIGCONT; without it the grace period would pass."""
    observed = Observed(GRACEFUL, tmp_path)
    observed.process.start()
    await observed.process.wait_ready(20)
    observed.process.signal(signal.SIGSTOP)
    async with asyncio.timeout(20):
        await observed.process.stop(600)
    assert observed.lines[-1] == "a/process: stopped"


@pytest.mark.usefixtures("fast_checks")
async def test_a_check_that_fails_stops_no_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> bool:
        raise LookupError("no address")

    observed = Observed(SLEEPER, tmp_path, ask=broken)
    async with started(observed):
        async with asyncio.timeout(20):
            while observed.num_asked < 2:
                await asyncio.sleep(0)
        await kill(observed)
    assert observed.num_restarting == 1
    assert "a/process cannot be asked" in [record.getMessage() for record in caplog.records]


@pytest.mark.usefixtures("fast_checks")
async def test_a_check_of_a_process_ends_with_it(tmp_path: Path) -> None:
    observed = Observed(SLEEPER, tmp_path, ask=never)
    async with started(observed):
        await kill(observed)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_a_stopped_process_is_not_restarted(tmp_path: Path) -> None:
    observed = Observed(SLEEPER, tmp_path)
    async with started(observed) as process:
        pid = process.pid
    assert not Path(f"/proc/{pid}").exists()
    assert (process.pid, process.num_restarts, observed.num_restarting) == (None, 0, 0)


async def test_a_process_is_stopped_during_the_delay_before_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 600.0)
    observed = Observed("print('up', flush=True)", tmp_path)
    observed.process.start()
    async with asyncio.timeout(20):
        await observed.is_restarting.wait()
        await observed.process.stop(600)
    assert observed.process.pid is None


async def test_a_process_that_was_never_started_is_stopped(tmp_path: Path) -> None:
    observed = Observed(SLEEPER, tmp_path)
    await observed.process.stop(5)
    observed.process.signal(signal.SIGTERM)
    assert observed.process.pid is None


async def test_a_process_that_is_stopped_at_once_never_runs(tmp_path: Path) -> None:
    observed = Observed(SLEEPER, tmp_path)
    observed.process.start()
    async with asyncio.timeout(20):
        await observed.process.stop(600)
    assert observed.process.pid is None
    assert observed.lines == []


QUITTER = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
print("up", flush=True)
while True:
    signal.pause()
"""
"""Does not handle SIGTERM, and exits when it is asked to in a way of its own."""


async def test_a_process_that_is_asked_to_quit_gets_no_other_signal(tmp_path: Path) -> None:
    async def quit_process() -> None:
        observed.process.signal(signal.SIGUSR1)

    observed = Observed(QUITTER, tmp_path, quit_process=quit_process)
    async with started(observed) as process:
        await process.stop(grace_s=20)
        assert process.pid is None


async def test_a_process_that_cannot_be_asked_to_quit_gets_sigterm(tmp_path: Path) -> None:
    async def quit_process() -> None:
        raise Unavailable("it does not listen")

    observed = Observed(GRACEFUL, tmp_path, quit_process=quit_process)
    async with started(observed) as process:
        await process.stop(grace_s=20)
    assert observed.lines[-1] == "a/process: stopped"


async def test_with_json_each_line_of_output_is_an_object_as_printed_or_made_of_the_line(tmp_path: Path) -> None:
    script = (
        """print('{"message": "own", "process": "p"}'); print("of a {library}"); print('["no object"]', flush=True)"""
    )
    observed = Observed(f"{script}\nimport time; time.sleep(600)", tmp_path, log_format="json")
    async with started(observed):
        await observed.until_lines(3)
    own, library, other = (json.loads(line.removeprefix("a/process: ")) for line in observed.lines)
    assert own == {"message": "own", "process": "p"}
    assert (library["message"], library["logger"], library["process"]) == ("of a {library}", "output", "a/process")
    assert other["message"] == '["no object"]'
    in_file = (tmp_path / "a-process.log").read_text().splitlines()
    assert [f"a/process: {line}" for line in in_file] == observed.lines


async def test_an_early_failure_shows_the_output_as_printed_in_json_too(tmp_path: Path) -> None:
    observed = Observed("raise SystemExit('no such unit')", tmp_path, wait_ready=never, log_format="json")
    observed.process.start()
    with pytest.raises(Unavailable, match="\n  no such unit"):
        await observed.process.wait_ready(20)
    await observed.process.stop(5)
