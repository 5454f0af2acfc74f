"""The processes of a mesh on a GPU, found by their names: the MPS daemon, its server and the processes that ask it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos.processes import MPS_QUESTION, MeshProcesses, names_of
from muxmesh.config.runtime import MeshRuntime
from tests.support.fake_driver import UUID
from tests.support.mps import FAKE_PROGRAM, FakeDaemon, daemon_of, mps_runtime

DAEMON = "mps/fa4ecada"
OTHER_UUID = "GPU-0badcafe-0000-4000-8000-000000000000"


def runtime_in(folder: Path, uuids: dict[str, str]) -> MeshRuntime:
    units = [
        {"name": unit, "device": "cuda:0", "models": [{"name": f"model-{unit}", "engine": "sim"}]} for unit in uuids
    ]
    return mps_runtime(folder, units, uuids)


@pytest.fixture
def runtime(tmp_path: Path) -> MeshRuntime:
    return runtime_in(tmp_path, {"u": UUID})


@pytest.fixture
def processes(runtime: MeshRuntime) -> MeshProcesses:
    """The processes that this test starts are those of the mesh."""
    return MeshProcesses(os.getpid(), runtime)


@pytest.fixture
def daemon(runtime: MeshRuntime) -> Iterator[FakeDaemon]:
    """A daemon in the pipe directory of the mesh."""
    with daemon_of(runtime.mps_control("u")) as daemon:
        yield daemon


def test_units_on_one_gpu_have_one_daemon(tmp_path: Path) -> None:
    shared = runtime_in(tmp_path, {"a": UUID, "b": UUID, "c": OTHER_UUID})
    processes = MeshProcesses(os.getpid(), shared)
    assert [name for name in names_of(shared) if name.startswith("mps/")] == [DAEMON, "mps/0badcafe"]
    assert [name for name in processes.group_of(DAEMON) if name.startswith("kvstore/")] == ["kvstore/a", "kvstore/b"]
    assert processes.daemon_of("decode/model-c") == "mps/0badcafe"
    assert processes.kvstore_of("decode/model-b") == "kvstore/b"


def server_of(processes: MeshProcesses) -> int:
    """The pid of the daemon's server, once it is one."""
    while True:
        for pid, name in processes.by_pid().items():
            if name == "MPS server":
                return pid


def test_the_daemon_and_its_server_are_found_by_their_names(processes: MeshProcesses, daemon: FakeDaemon) -> None:
    assert processes.pid(DAEMON) == daemon.process.pid
    with daemon.client():
        assert server_of(processes) in processes.by_pid()


def test_a_process_that_asks_the_daemon_has_a_name_of_its_own(processes: MeshProcesses, daemon: FakeDaemon) -> None:
    environment = {**os.environ, **daemon.control.environment}
    with subprocess.Popen(FAKE_PROGRAM, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ask:
        while processes.by_pid()[ask.pid] != MPS_QUESTION:  # it becomes the control program
            assert ask.poll() is None
        ask.communicate(b"get_server_list\n")


async def test_a_daemon_serves_as_long_as_it_answers(processes: MeshProcesses, daemon: FakeDaemon) -> None:
    assert await processes.serves(DAEMON, None, 30.0)
    assert not await processes.serves(DAEMON, daemon.process.pid, 0.3)


async def test_the_clients_of_a_daemon_are_those_that_it_lists(processes: MeshProcesses, daemon: FakeDaemon) -> None:
    with daemon.client() as client:
        assert await processes.clients_of(DAEMON) == {client.pid}


async def test_a_daemon_that_does_not_run_cannot_be_asked_for_its_clients(processes: MeshProcesses) -> None:
    with pytest.raises(LookupError, match="no MPS daemon answers"):
        await processes.clients_of(DAEMON)


def test_what_names_the_folder_of_the_mesh_is_found_wherever_it_is(
    processes: MeshProcesses, daemon: FakeDaemon
) -> None:
    """The server of a daemon that was killed has no parent in the mesh any more."""
    with daemon.client():
        server = server_of(processes)
        daemon.process.kill()
        daemon.process.wait()
        assert server not in processes.by_pid()
        assert processes.remnants()[server] == "MPS server"
        os.kill(server, signal.SIGKILL)
    while processes.remnants():
        assert list(processes.remnants()) in ([], [server])
