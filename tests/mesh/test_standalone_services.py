"""Services that are started one by one, without `muxmesh up`, as an operator or a container engine starts them."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from muxmesh.cli.main import main
from muxmesh.client import MeshClient
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.errors import MeshError
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.types import Role
from tests.support.processes import without_privileges
from tests.support.standalone_mesh import RestartedService, StandaloneMesh, output_of, standalone_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

KVSTORE, ROUTER = ProcessKey("kvstore", "cpu0"), ProcessKey("router")
PREFILL, DECODE = (ProcessKey(role, "cpu0", "m") for role in Role)
NEW_TOKENS = 60
NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child")


def mesh_yaml(folder: Path, **model: object) -> Path:
    path, fields = folder / "mesh.yaml", {"name": "m", "engine": "sim", "sim": {"base_s": 0.02}, "max_num_seqs": 24}
    unit = {"name": "cpu0", "kv_pool": "64MiB", "models": [{**fields, **model}]}
    path.write_text(f"listen: {free_listen_address('127.0.0.1:0')}\nunits: [{unit}]\n".replace("'", '"'))
    return path


async def prepare(config: Path, redis_url: str) -> Path:
    """Runs `muxmesh prepare`; returns the runtime file."""
    run_dir = config.parent / "run"
    arguments = ("-c", str(config), "--run-dir", str(run_dir), "--redis-url", redis_url)
    await output_of(sys.executable, "-m", "muxmesh", "prepare", *arguments)
    return run_dir / "runtime.json"


class RunningMesh:
    """A mesh of all services, with two routers, and a client of each."""

    def __init__(self, mesh: StandaloneMesh, redis: RestartedService, a: MeshClient, b: MeshClient) -> None:
        self.mesh = mesh
        self.redis = redis
        self.a = a
        self.b = b


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    """The services are started in an order in which each has to wait for one that comes later."""
    folder = tmp_path_factory.mktemp("m")
    server = shutil.which("redis-server")
    assert server is not None
    socket = str(folder / "redis.sock")
    redis = RestartedService((server, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", str(folder)))
    try:
        runtime_file = await prepare(mesh_yaml(folder), f"unix://{socket}")
        other = free_listen_address("127.0.0.1:0")
        async with standalone_mesh(runtime_file) as mesh:
            mesh.start(ROUTER, "--name", "router-a", name="router-a")
            mesh.start(ROUTER, "--name", "router-b", "--listen", other, name="router-b")
            for worker in (PREFILL, DECODE):
                await mesh.start(worker).until_line("waits for the kvstore of its unit at")
            mesh.start(KVSTORE)
            await mesh.until_healthy(*mesh.services)
            async with MeshClient(mesh.runtime.config.listen) as a, MeshClient(other) as b:
                yield RunningMesh(mesh, redis, a, b)
    finally:
        await redis.end()


async def tokens_of(client: MeshClient, seed: int) -> tuple[int, ...]:
    completion = await client.generate(f"Story {seed}", seed=seed, temperature=1.0, max_new_tokens=NEW_TOKENS)
    return completion.token_ids


async def until_serving(client: MeshClient) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(MeshError):
                await client.generate("Hello", max_new_tokens=1, timeout_s=2.0)
                return


async def test_both_routers_and_all_services_are_listed_and_have_no_parent(running: RunningMesh) -> None:
    names = {"kvstore/cpu0", "prefill/m", "decode/m", "router-a", "router-b"}
    async with asyncio.timeout(30):
        while {process.name for process in (await running.b.status()).processes} != names:
            pass
    pids = {process.name: process.pid for process in (await running.a.status()).processes}
    assert pids == {name: running.mesh.services[name].pid for name in names}


async def test_models_sleep_and_wake_without_a_supervisor_and_a_new_one_is_refused_by_name(
    running: RunningMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    async def model(action: str, *more: str) -> int:
        arguments = ["model", action, *more, "--runtime", str(running.mesh.runtime_file)]
        return await asyncio.to_thread(main, arguments)

    assert await model("sleep", "m") == 0
    assert await model("ps") == 0
    assert "asleep" in capsys.readouterr().out
    assert await model("wake", "m") == 0
    for action in ("load", "unload"):
        assert await model(action, "m") == 1
        assert f"model {action}: this mesh has no supervisor" in capsys.readouterr().err


async def test_routers_beside_each_other_serve_one_unit_and_a_hand_off_copies_nothing(running: RunningMesh) -> None:
    expected = await tokens_of(running.a, 1)
    found = await asyncio.gather(*(tokens_of(client, 1) for client in (running.a, running.b) for _ in range(4)))
    assert set(found) == {expected}
    printed = await output_of(
        sys.executable, "-m", "muxmesh", "status", "--address", running.mesh.runtime.config.listen
    )
    assert re.search(r"memory shared by host shm; \d+ hand-offs, 0 bytes copied", printed)


@pytest.mark.parametrize("name", ["redis", "kvstore/cpu0", "prefill/m", "decode/m", "router-b"])
async def test_a_killed_service_that_is_started_again_is_all_that_is_needed(running: RunningMesh, name: str) -> None:
    """20 streams run over the router that is not killed: no token is lost, repeated or another one."""
    expected = await asyncio.gather(*(tokens_of(running.a, seed) for seed in range(20)))
    streams = [asyncio.create_task(tokens_of(running.a, seed)) for seed in range(20)]
    async with asyncio.timeout(30):
        while sum(worker.num_leases for worker in (await running.a.status()).units[0].workers) < 10:
            pass
    service = running.redis if name == "redis" else running.mesh.services[name]
    before = service.pid
    service.kill()
    async with asyncio.timeout(120):
        assert await asyncio.gather(*streams) == expected
        while service.pid == before:
            await asyncio.sleep(0.02)
    await until_serving(running.a)
    await until_serving(running.b)
    if name != "redis":
        await running.mesh.until_healthy(name)
    if name == "kvstore/cpu0":
        for worker in ("prefill/m", "decode/m"):
            assert running.mesh.services[worker].exit_codes[-1] == 1, "it ends with its unit, and says so by its code"
            await running.mesh.services[worker].until_line("giving up: the unit is lost")


@pytest.mark.parametrize("order", [("prefill/m", "kvstore/cpu0"), ("kvstore/cpu0", "decode/m", "prefill/m")])
async def test_services_that_are_killed_together_recover_in_any_order(
    running: RunningMesh, order: tuple[str, ...]
) -> None:
    expected = await tokens_of(running.a, 3)
    for name in order:
        running.mesh.services[name].kill()
    await until_serving(running.a)
    assert await tokens_of(running.b, 3) == expected


async def test_a_mesh_serves_while_redis_is_away_and_a_service_that_starts_then_says_so(running: RunningMesh) -> None:
    server, running.redis.command = running.redis.command, (sys.executable, "-c", "input()")
    running.redis.kill()
    async with asyncio.timeout(30):
        while (await running.a.status()).redis_connected:
            pass
    decode, router = running.mesh.services["decode/m"], running.mesh.services["router-b"]
    decode.lines.clear()
    router.lines.clear()
    decode.kill()
    router.kill()
    await until_serving(running.a)
    await until_serving(running.b)
    for service in (decode, router):
        await service.until_line("Redis is unreachable")
    running.redis.command = server
    async with asyncio.timeout(60):
        while len((await running.b.status()).processes) < 5:
            pass


async def test_a_second_process_of_a_name_ends_with_one_line_and_disturbs_nobody(running: RunningMesh) -> None:
    mesh = running.mesh
    for key in (KVSTORE, DECODE):
        name = mesh.runtime.display_name(key)
        printed = await output_of(*mesh.command(key), code=1)
        assert printed.splitlines()[-1].startswith(
            f"ERROR muxmesh.lifecycle: cannot serve: another {name} already runs on {mesh.runtime.run_dir} "
            f"(pid {mesh.services[name].pid}); "
        )
        assert len(printed.splitlines()) == 1
    await until_serving(running.a)


async def test_a_port_that_is_taken_is_named_in_one_line(running: RunningMesh) -> None:
    printed = await output_of(*running.mesh.command(ROUTER, "--name", "router-c"), code=1)
    listen = running.mesh.runtime.config.listen
    expected = f"ERROR muxmesh.lifecycle: cannot serve: cannot listen on {listen}: Address already in use; "
    assert printed.splitlines()[-1].startswith(expected)


async def test_a_worker_whose_file_has_changed_meets_its_kvstore_only_after_that_has_restarted(
    running: RunningMesh,
) -> None:
    """`muxmesh prepare` runs again beside the services, with another block size."""
    mesh = running.mesh
    decode, config = mesh.services["decode/m"], mesh.runtime_file.parent.parent / "mesh.yaml"
    before = config.read_text()
    config.write_text(before.replace('"max_num_seqs"', '"block_size": 32, "max_num_seqs"'))
    await prepare(config, mesh.runtime.redis_url)
    decode.lines.clear()
    decode.kill()
    line = await decode.until_line("cannot serve: ")
    assert line.endswith(
        "refused decode of m: its KV of m is not that of the unit: mesh.yaml or the model has changed since kvstore "
        "started; restart kvstore"
    )
    mesh.services["kvstore/cpu0"].kill()
    await until_serving(running.a)
    config.write_text(before)
    await prepare(config, mesh.runtime.redis_url)
    mesh.services["kvstore/cpu0"].kill()
    await until_serving(running.a)


async def test_services_that_are_stopped_end_with_code_0(running: RunningMesh) -> None:
    """The last test of this mesh."""
    assert [await service.stop() for service in running.mesh.services.values()] == [0] * 5


# What is wrong at the start


@pytest.fixture
async def runtime_file(tmp_path: Path, redis_url: str) -> Path:
    return await prepare(mesh_yaml(tmp_path), redis_url)


async def test_every_service_refuses_a_missing_runtime_file_in_one_line(runtime_file: Path) -> None:
    async with standalone_mesh(runtime_file) as mesh:
        runtime_file.unlink()
        for key in (KVSTORE, PREFILL, DECODE, ROUTER):
            assert await output_of(*mesh.command(key), code=1) == (
                f"ERROR muxmesh.lifecycle: cannot serve: {runtime_file}: the runtime file cannot be read: "
                "No such file or directory; `muxmesh prepare` writes it\n"
            )


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (ProcessKey("kvstore", "gpu9"), "no unit has the name 'gpu9'; units: cpu0"),
        (ProcessKey(Role.DECODE, "gpu9", "m"), "no unit has the name 'gpu9'; units: cpu0"),
        (ProcessKey(Role.PREFILL, "cpu0", "x"), "unit cpu0 has no model 'x'; models: m"),
    ],
)
async def test_an_unknown_unit_or_model_is_refused_in_one_line(
    runtime_file: Path, key: ProcessKey, problem: str
) -> None:
    async with standalone_mesh(runtime_file) as mesh:
        printed = await output_of(*mesh.command(key), code=1)
        assert printed == f"ERROR muxmesh.lifecycle: cannot serve: {problem}\n"


def can_unshare() -> bool:
    program = shutil.which("unshare")
    return (
        program is not None and subprocess.run([*NAMESPACES, "true"], check=False, capture_output=True).returncode == 0
    )


async def test_a_kvstore_in_another_pid_namespace_and_its_worker_name_it_at_once(runtime_file: Path) -> None:
    if not can_unshare():
        pytest.skip("this user may not create a pid namespace")
    reason = (
        "it is in another pid namespace, so its exit could not be seen; kvstore and the workers of a unit share one "
        "pid namespace: `pid: service:unit` in compose, shareProcessNamespace: true in Kubernetes"
    )
    async with standalone_mesh(runtime_file) as mesh:
        kvstore = mesh.services["kvstore"] = RestartedService([*NAMESPACES, *mesh.command(KVSTORE)])
        await mesh.until_healthy("kvstore/cpu0")
        path = mesh.runtime.attach_path("cpu0")
        printed = await output_of(*mesh.command(DECODE), code=1)
        expected = f"ERROR muxmesh.lifecycle: cannot serve: the unit at {path} refused decode of m: {reason}"
        assert printed.splitlines()[-1] == expected
        assert (await kvstore.until_line("refused to attach process")).endswith(f"process 0: {reason}")


async def test_a_worker_in_a_namespace_below_that_of_kvstore_serves(runtime_file: Path) -> None:
    """`pid: host` for kvstore: it sees the worker, under another pid than the worker's own."""
    if not can_unshare():
        pytest.skip("this user may not create a pid namespace")
    async with standalone_mesh(runtime_file) as mesh:
        mesh.start(KVSTORE)
        mesh.start(PREFILL)
        mesh.services["decode"] = RestartedService([*NAMESPACES, *mesh.command(DECODE)])
        mesh.start(ROUTER, "--name", "router-a")
        async with MeshClient(mesh.runtime.config.listen) as client:
            await until_serving(client)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
async def test_a_run_folder_of_another_user_is_named_by_every_service_at_once(runtime_file: Path) -> None:
    run_dir = runtime_file.parent
    async with standalone_mesh(runtime_file) as mesh:
        os.chown(run_dir, 10001, 10001)
        for key in (KVSTORE, DECODE, ROUTER):
            program = without_privileges(*mesh.command(key)[1:])
            assert await output_of(*program, code=1) == (
                f"ERROR muxmesh.lifecycle: cannot serve: {run_dir}: permission denied: it is of uid 10001, mode 0700, "
                "this process runs as uid 0; all processes of a mesh on one run folder have to run as one user\n"
            )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket to another user")
async def test_an_attach_socket_of_another_user_is_named_at_once(runtime_file: Path) -> None:
    async with standalone_mesh(runtime_file) as mesh:
        mesh.start(KVSTORE)
        await mesh.until_healthy("kvstore/cpu0")
        path = mesh.runtime.attach_path("cpu0")
        os.chown(path, 10001, 10001)
        printed = await output_of(*without_privileges(*mesh.command(DECODE)[1:]), code=1)
        assert printed.splitlines()[-1].startswith(
            f"ERROR muxmesh.lifecycle: cannot serve: {path}: permission denied: it is of uid 10001, mode 0755, "
        )


async def test_a_socket_that_a_killed_kvstore_has_left_makes_workers_wait(runtime_file: Path) -> None:
    async with standalone_mesh(runtime_file) as mesh:
        first = mesh.start(KVSTORE)
        await mesh.until_healthy("kvstore/cpu0")
        await first.end()
        assert mesh.runtime.attach_path("cpu0").exists()
        await mesh.start(DECODE).until_line("waits for the kvstore of its unit at")
        mesh.start(KVSTORE)
        await mesh.until_healthy("kvstore/cpu0", "decode/m")


async def test_a_worker_that_waits_is_stopped_at_once(runtime_file: Path) -> None:
    async with standalone_mesh(runtime_file) as mesh:
        decode = mesh.start(DECODE)
        await decode.until_line("waits for the kvstore of its unit at")
        assert await decode.stop() == 0


async def test_a_service_outlives_what_started_it(runtime_file: Path) -> None:
    """As a shell that ends."""
    runtime = MeshRuntime.read(runtime_file)
    async with standalone_mesh(runtime_file) as mesh:
        starter = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=-3, stderr=-3).pid)"
        pid = int(await output_of(sys.executable, "-c", starter, *mesh.command(KVSTORE)))
        try:
            await mesh.until_healthy(runtime.display_name(KVSTORE))
        finally:
            os.kill(pid, signal.SIGKILL)
