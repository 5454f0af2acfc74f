"""The MPS daemon without a supervisor, with the fake control program."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from muxmesh.cuda.mps import LOG_DIRECTORY, MpsControl
from muxmesh.errors import Unavailable
from muxmesh.process_state import has_ended
from muxmesh.supervisor.mps_checks import mps_answers, wait_for_mps
from muxmesh.supervisor.mps_keeper import keep_daemon
from tests.support.mps import FAKE_PROGRAM, client_of, mps_runtime, next_line

UUID = "GPU-5f4df884-095b-d388-4934-d4853eca3833"


@pytest.fixture
def control(tmp_path_factory: pytest.TempPathFactory) -> MpsControl:
    """Its paths are short enough for sockets."""
    folder = tmp_path_factory.mktemp("m")
    made = MpsControl(FAKE_PROGRAM, folder / "pipe", folder / "log", answer_within_s=0.5)
    for directory in made.environment.values():
        Path(directory).mkdir()
    return made


@contextlib.asynccontextmanager
async def kept(control: MpsControl) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Event]]:
    """A daemon that is kept, checked often, and that answers."""
    stop = asyncio.Event()
    keeping = asyncio.create_task(keep_daemon(control, {**os.environ, **control.environment}, stop, 0.05))
    try:
        async with asyncio.timeout(30):
            await wait_for_mps(control)
            yield keeping, stop
    finally:
        for fault in control.pipe_dir.glob("fake.*"):
            fault.unlink()
        stop.set()
        await asyncio.gather(keeping, return_exceptions=True)


async def server_of(control: MpsControl) -> int:
    """The server, which has had a client."""
    with client_of(control):
        (server,) = await control.server_pids()
    return server


async def test_a_stop_ends_the_daemon_and_its_server(control: MpsControl) -> None:
    async with kept(control) as (keeping, stop):
        server = await server_of(control)
        stop.set()
        await keeping
        assert has_ended(server) and not await mps_answers(control)


async def test_a_daemon_that_is_killed_takes_its_server_and_its_keeper_with_it(control: MpsControl) -> None:
    async with kept(control) as (keeping, _):
        server = await server_of(control)
        os.kill(int((control.pipe_dir / "nvidia-cuda-mps-control.pid").read_text()), signal.SIGKILL)
        with pytest.raises(Unavailable, match=re.escape(f"daemon in {control.pipe_dir} exited with code -9")):
            await keeping
        assert has_ended(server)


async def test_a_daemon_that_does_not_answer_is_killed(control: MpsControl) -> None:
    async with kept(control) as (keeping, _):
        daemon = int((control.pipe_dir / "nvidia-cuda-mps-control.pid").read_text())
        (control.pipe_dir / "fake.silent").touch()
        with pytest.raises(Unavailable, match="did not answer 3 times in a row"):
            await keeping
        assert has_ended(daemon)


async def test_its_logs_are_bounded(control: MpsControl) -> None:
    log = Path(control.environment[LOG_DIRECTORY]) / "control.log"
    async with kept(control):
        with log.open("a") as file:
            file.write("x" * 11 * 1024 * 1024)
        while not log.with_name("control.log.1").exists():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_service_of_an_operator_ends_in_order(
    tmp_path_factory: pytest.TempPathFactory, number: signal.Signals
) -> None:
    folder = tmp_path_factory.mktemp("m")
    runtime = mps_runtime(folder, [{"name": "u", "device": "cuda:0", "models": [{"name": "m"}]}], {"u": UUID})
    runtime.write(folder / "runtime.json")
    control = runtime.mps_control("u")
    module = (sys.executable, "-m", "muxmesh.supervisor.mps_daemon")
    command = (*module, "--runtime", str(folder / "runtime.json"), "--unit", "u")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert next_line(process) == "listening"
            server = await server_of(control)
            process.send_signal(number)
            assert await asyncio.to_thread(process.wait, 30) == 0
            assert has_ended(server) and not await mps_answers(control)
        finally:
            process.kill()


async def test_a_service_whose_daemon_exits_ends_with_one_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("m")
    runtime = mps_runtime(folder, [{"name": "u", "device": "cuda:0", "models": [{"name": "m"}]}], {"u": UUID})
    runtime.write(folder / "runtime.json")
    control = runtime.mps_control("u")
    module = (sys.executable, "-m", "muxmesh.supervisor.mps_daemon")
    command = (*module, "--runtime", str(folder / "runtime.json"), "--unit", "u")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert next_line(process) == "listening"
        await control.quit()
        _, printed = await asyncio.to_thread(process.communicate, None, 30)
        assert process.returncode == 1
        assert printed.decode() == (
            f"ERROR mps: the MPS daemon of unit u cannot run: the MPS daemon in {control.pipe_dir} exited with code 0\n"
        )
