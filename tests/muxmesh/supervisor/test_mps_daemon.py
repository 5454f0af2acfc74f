"""The process that becomes an MPS daemon, and leftovers of earlier ones, with the fake control program."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.runtime import MeshRuntime
from muxmesh.cuda.mps import MpsControl
from muxmesh.errors import ConfigError
from muxmesh.process_state import has_ended
from muxmesh.supervisor.mps_checks import check_mps, mps_answers, wait_for_mps
from muxmesh.supervisor.mps_daemon import daemon_environment
from muxmesh.supervisor.mps_leftovers import end_leftovers
from tests.support.mps import FAKE_PROGRAM, FakeDaemon, fake_daemon, mps_runtime, next_line

UUID = "GPU-5f4df884-095b-d388-4934-d4853eca3833"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for sockets."""
    return tmp_path_factory.mktemp("m")


def runtime_in(folder: Path, device: str = "cuda:0") -> MeshRuntime:
    return mps_runtime(folder, [{"name": "u", "device": device, "models": [{"name": "m"}]}], {"u": UUID})


@contextmanager
def daemon_process(folder: Path, parent: int, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], MpsControl]]:
    """The process as the supervisor starts it."""
    runtime = runtime_in(folder)
    runtime.write(folder / "runtime.json")
    named = ("--runtime", str(folder / "runtime.json"), "--unit", "u", "--parent", str(parent))
    command = (sys.executable, "-m", "muxmesh.supervisor.mps_daemon", *named)
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
        try:
            yield process, runtime.mps_control("u")
        finally:
            process.kill()


async def test_the_process_becomes_the_daemon_of_the_units_gpu(folder: Path) -> None:
    with daemon_process(folder, os.getpid()) as (process, control):
        await wait_for_mps(control)
        environment = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        assert {
            f"CUDA_VISIBLE_DEVICES={UUID}",
            f"CUDA_MPS_PIPE_DIRECTORY={folder}/mps-5f4df884",
            f"CUDA_MPS_LOG_DIRECTORY={folder}/logs/mps-5f4df884",
        } <= set(environment)
        assert (folder / "mps-5f4df884").stat().st_mode & 0o777 == 0o700
        await control.quit()
        assert process.wait() == 0
        assert not await mps_answers(control)


def test_a_daemon_that_cannot_start_ends_with_one_line(folder: Path) -> None:
    (folder / "logs").touch()
    with daemon_process(folder, os.getpid(), stderr=subprocess.PIPE) as (process, _):
        assert process.stderr is not None
        (line,) = process.stderr.read().decode().splitlines()
        assert line.startswith("ERROR mps: the MPS daemon of unit u cannot run: ")
        assert line.endswith(f"'{folder}/logs/mps-5f4df884'")
        assert process.wait() == 1


def test_a_share_of_the_supervisor_does_not_limit_all_clients_of_the_daemon(folder: Path) -> None:
    control = MpsControl(FAKE_PROGRAM, folder / "pipe", folder / "log")
    inherited = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10", "CUDA_MPS_PIPE_DIRECTORY": "/other", "PATH": "/bin"}
    assert daemon_environment(control, UUID, inherited) == {
        "CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe",
        "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log",
        "CUDA_VISIBLE_DEVICES": UUID,
        "PATH": "/bin",
    }


async def test_the_logs_of_the_daemon_are_bounded_whenever_it_is_asked(folder: Path) -> None:
    with fake_daemon(folder) as daemon:
        log = folder / "log" / "control.log"
        with log.open("a") as file:
            file.write("x" * 11 * 1024 * 1024)
        assert await check_mps(daemon.control)
        assert log.read_text() == "Cmd:get_server_list\n"
        assert (folder / "log" / "control.log.1").stat().st_size == 10 * 1024 * 1024
        assert await check_mps(daemon.control)
        assert log.read_text() == "Cmd:get_server_list\n" * 2


def test_the_daemon_does_not_outlive_a_parent_that_is_gone(folder: Path) -> None:
    with daemon_process(folder, parent=2**22 - 1) as (process, _):
        assert process.wait() == 1


async def test_a_daemon_that_starts_again_ends_the_earlier_one(folder: Path) -> None:
    with daemon_process(folder, os.getpid()) as (first, control):
        await wait_for_mps(control)
        with daemon_process(folder, os.getpid()) as (second, _):
            assert first.wait() == 0
            assert next_line(second) == "listening"
            assert await mps_answers(control)


def test_a_unit_on_a_cpu_has_no_daemon(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unit u does not use MPS: its device is cpu"):
        runtime_in(folder, device="cpu").mps_control("u")


async def server_pid(daemon: FakeDaemon) -> int:
    """The server, which has had a client."""
    with daemon.client():
        (server,) = await daemon.control.server_pids()
    return server


@pytest.mark.parametrize("how", ["killed", "silent", "deaf_to_quit", "quit", "never started"])
async def test_leftovers_of_an_earlier_daemon_are_removed(folder: Path, how: str) -> None:
    """Whatever its end was: afterwards neither daemon nor server run, and the pipe directory is empty."""
    with fake_daemon(folder, answer_within_s=3.0 if how == "silent" else 60) as daemon:
        server = await server_pid(daemon)
        if how == "killed":
            daemon.process.kill()
            daemon.process.wait()
            assert not has_ended(server)
        elif how == "quit":
            await daemon.control.quit()
            daemon.process.wait()
        elif how == "never started":
            daemon.process.kill()
            daemon.process.wait()
            (daemon.pipe_dir / "nvidia-cuda-mps-control.pid").unlink()
        else:
            daemon.fail(how)
        await end_leftovers(daemon.control)
        assert has_ended(server)
        assert daemon.process.wait() in {0, -signal.SIGKILL}
        assert {path.name for path in daemon.pipe_dir.iterdir()} <= {f"fake.{how}"}


async def test_another_process_with_the_pid_of_the_earlier_daemon_is_left_alone(folder: Path) -> None:
    with fake_daemon(folder) as daemon, subprocess.Popen(["sleep", "1000"]) as other:
        daemon.process.kill()
        daemon.process.wait()
        (daemon.pipe_dir / "nvidia-cuda-mps-control.pid").write_text(str(other.pid))
        await end_leftovers(daemon.control)
        assert other.poll() is None
        other.kill()


async def test_the_server_of_a_supervisor_that_was_killed_is_ended_once_its_run_folder_is_deleted(folder: Path) -> None:
    earlier, present = folder / "run-1", folder / "run-2"
    earlier.mkdir()
    with fake_daemon(earlier) as daemon:
        control = MpsControl(FAKE_PROGRAM, present / "pipe", present / "log")
        server = await server_pid(daemon)
        daemon.process.kill()
        daemon.process.wait()
        await end_leftovers(control)
        assert not has_ended(server), "another supervisor may own it"
        moved = earlier.rename(folder / "deleted")
        await end_leftovers(control)
        assert has_ended(server)
        moved.rename(earlier)
