"""Supervised processes, with real ones."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from muxmesh.clock import SystemClock
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.supervisor.mesh_supervisor import free_listen_address, state_lock
from muxmesh.supervisor.supervised_process import ProcessSpec, SupervisedProcess

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


class Watched:
    """A supervised process whose lines and restarts are remembered."""

    def __init__(self, script: str, logs: Path, wait_ready: Callable[[], Awaitable[None]] | None = None) -> None:
        self.lines: list[str] = []
        self.restarts: list[str] = []
        self.said_something = asyncio.Event()
        spec = ProcessSpec("a/process", (sys.executable, "-c", script), wait_ready or self._line)
        self.process = SupervisedProcess(spec, logs, SystemClock(), self._show, self._restarted)

    async def _line(self) -> None:
        await self.said_something.wait()

    def _show(self, name: str, line: str) -> None:
        self.lines.append(f"{name}: {line}")
        self.said_something.set()

    async def _restarted(self, name: str) -> None:
        self.restarts.append(name)


async def never() -> None:
    await asyncio.Event().wait()


async def test_lines_are_shown_and_kept_under_the_processes_name(tmp_path: Path) -> None:
    watched = Watched(SLEEPER, tmp_path)
    watched.process.start()
    await watched.process.wait_ready(20)
    await watched.process.stop(5)
    assert watched.lines == ["a/process: up"]
    assert re.fullmatch(r"[-\d]+ [:,\d]+ up\n", (tmp_path / "a-process.log").read_text())


async def test_what_dies_is_started_again(tmp_path: Path) -> None:
    watched = Watched(SLEEPER, tmp_path)
    watched.process.start()
    await watched.process.wait_ready(20)
    first = watched.process.pid
    assert first is not None
    watched.said_something.clear()
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(20):
        await watched.said_something.wait()
    assert watched.process.pid not in (None, first)
    assert watched.restarts == ["a/process"]
    assert watched.process.num_restarts == 1
    await watched.process.stop(5)


async def test_what_keeps_dying_before_it_is_ready_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    watched = Watched("print('no such model'); raise SystemExit(3)", tmp_path, never)
    watched.process.start()
    with pytest.raises(Unavailable, match=r"(?s)ended 3 times before it was ready, last with code 3.*no such model"):
        await watched.process.wait_ready(30)
    await watched.process.stop(5)


async def test_what_is_never_ready_is_given_up(tmp_path: Path) -> None:
    watched = Watched(SLEEPER, tmp_path, never)
    watched.process.start()
    with pytest.raises(Unavailable, match="not ready after 0 s"):
        await watched.process.wait_ready(0.2)
    await watched.process.stop(5)
    assert watched.process.pid is None


async def test_what_does_not_stop_is_killed(tmp_path: Path) -> None:
    watched = Watched(STUBBORN, tmp_path)
    watched.process.start()
    await watched.process.wait_ready(20)
    pid = watched.process.pid
    await watched.process.stop(0.2)
    assert not Path(f"/proc/{pid}").exists()


async def test_a_program_that_cannot_be_started_is_a_death(tmp_path: Path) -> None:
    watched = Watched("", tmp_path, never)
    watched.process.spec = ProcessSpec("a/process", (str(tmp_path / "nothing"),), never)
    watched.process.start()
    with pytest.raises(Unavailable, match="before it started: "):
        await watched.process.wait_ready(30)
    await watched.process.stop(5)


def test_a_second_mesh_with_the_same_state_directory_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=f"already running .*pid {os.getpid()}")
    with state_lock(tmp_path), refused, state_lock(tmp_path):
        pass
    with state_lock(tmp_path):
        pass


def test_port_zero_becomes_a_free_port() -> None:
    host, port = free_listen_address("127.0.0.1:0").split(":")
    assert host == "127.0.0.1"
    assert int(port) > 1024


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "192.0.2.1:80"])
def test_an_address_that_cannot_be_listened_on_is_named(listen: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {listen}"):
        free_listen_address(listen)
