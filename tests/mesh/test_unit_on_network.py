"""A unit and its routers as on separate hosts: folders and preparations of their own, TCP between them, no supervisor.

Each service is started again when it ends, as an orchestrator does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from muxmesh.client import MeshClient
from muxmesh.errors import MeshError
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from tests.support.mesh import collect
from tests.support.tiny import TinyShape, greedy_tokens, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

PROMPT = "The quick brown fox jumps over the lazy dog. " * 3
LONG = 200
UNIT_PROCESSES = ("kvstore", "prefill_svc", "decode_svc")


class Service:
    """A process that is started again whenever it ends."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, environment, log
        self.process: asyncio.subprocess.Process | None = None
        self.num_starts = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            if self.process is not None and self.process.returncode is None:
                self.process.kill()
                await self.process.wait()

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)

    async def _run(self) -> None:
        while True:
            with self._log.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    sys.executable, *self._command, env=self._environment, stdout=log, stderr=log
                )
            self.num_starts += 1
            await self.process.wait()


@dataclass
class Mesh:
    unit: dict[str, Service]
    routers: list[Service]
    clients: list[MeshClient]
    folder: Path
    """With weights."""
    router_cache: Path

    async def until_serving(self) -> None:
        """Waits until both routers serve, and the unit's workers are ready and hold nothing."""
        async with asyncio.timeout(120):
            for client in self.clients:
                while not await self._is_idle(client):
                    await asyncio.sleep(0.05)

    @staticmethod
    async def _is_idle(client: MeshClient) -> bool:
        try:
            unit = (await client.status(timeout_s=5.0)).units[0]
        except MeshError:
            return False
        ready = {worker.role for worker in unit.workers if worker.ready}
        is_free = all(model.num_leases + model.num_credits + model.num_queued_requests == 0 for model in unit.models)
        return unit.connected and len(ready) == 2 and is_free and unit.pool.leased_bytes == 0


async def run(folder: Path, environment: dict[str, str], *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", *arguments, cwd=folder, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


def write_config(folder: Path, listen: str, host: str) -> None:
    model = {"name": "tiny", "source": "./tiny", "prefill_token_budget": 48, "threads": 2}
    network = {"host": host, "base_port": 50100}
    unit = {"name": "unit-0", "kv_pool": "8MiB", "slab": "256KiB", "network": network, "models": [model]}
    (folder / "mesh.yaml").write_text(json.dumps({"mesh_id": "net", "listen": listen, "units": [unit]}))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> AsyncIterator[Mesh]:
    base, host = tmp_path_factory.mktemp("net"), f"127.{os.getpid() % 250 + 1}.7.9"  # an address of this test
    whole = write_tiny_model(base / "unit" / "tiny", TinyShape())
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    services: dict[str, Service] = {}

    async def prepare(name: str, part: Sequence[str], settings: dict[str, str]) -> list[str]:
        arguments = ("-c", "mesh.yaml", "--run-dir", "run", "--redis-url", redis_server, "--quiet", *part)
        await run(base / name, settings, "prepare", *arguments)
        return ["--runtime", str(base / name / "run" / "runtime.json")]

    write_config(base / "unit", "127.0.0.1:1", host)
    runtime = await prepare("unit", ("--unit", "unit-0"), environment)
    for module in UNIT_PROCESSES:
        model = () if module == "kvstore" else ("--model", "tiny")
        command = ["-m", module, *runtime, "--unit", "unit-0", *model]
        services[module] = Service(command, environment, base / f"{module}.log")
    routers, addresses, of_routers = [], [], {**environment, "MUXMESH_CACHE_DIR": str(base / "router-cache")}
    for name in ("router-0", "router-1"):
        shutil.copytree(whole, base / name / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
        addresses.append(free_listen_address("127.0.0.1:0"))
        write_config(base / name, addresses[-1], host)
        runtime = await prepare(name, ("--router",), of_routers)
        routers.append(Service(["-m", "router", *runtime, "--name", name], of_routers, base / f"{name}.log"))
    async with AsyncExitStack() as stack:
        for service in (*services.values(), *routers):
            await stack.enter_async_context(service.running())
        clients = [await stack.enter_async_context(MeshClient(address)) for address in addresses]
        running = Mesh(services, routers, clients, whole, base / "router-cache")
        try:
            await running.until_serving()
            yield running
        except BaseException:
            print("\n".join(f"{log.name}\n{log.read_text()[-2000:]}" for log in sorted(base.glob("*.log"))))
            raise


async def test_routers_without_weights_return_the_tokens_of_the_reference_and_share_the_prefix_cache(
    mesh: Mesh,
) -> None:
    """A block is found only if router and unit agree on the identity of its KV, which has the weights in it."""
    expected = greedy_tokens(mesh.folder, PROMPT, 24)
    cached = []
    for client in mesh.clients:
        completion = await client.generate(PROMPT, max_new_tokens=24, temperature=0)
        assert list(completion.token_ids) == expected
        cached.append(completion.prompt.num_cached_tokens)
    assert cached[0] == 0 < cached[1]
    assert not [path for path in mesh.router_cache.rglob("*") if path.suffix in (".safetensors", ".f32")]


async def test_status_names_the_ports_of_the_unit(mesh: Mesh) -> None:
    processes = {process.name: process.address for process in (await mesh.clients[0].status()).processes}
    host = processes["kvstore/unit-0"].partition(":")[0]
    assert {name: address for name, address in processes.items() if not name.startswith("router")} == {
        "kvstore/unit-0": f"{host}:50100", "prefill/tiny": f"{host}:50101", "decode/tiny": f"{host}:50102"
    }  # fmt: skip


@pytest.mark.parametrize("module", UNIT_PROCESSES)
async def test_streams_of_all_routers_survive_the_loss_of_a_process_of_the_unit(mesh: Mesh, module: str) -> None:
    await mesh.until_serving()
    started = asyncio.Event()

    async def stream(client: MeshClient) -> list[int]:
        deltas = client.stream(PROMPT, max_new_tokens=LONG, temperature=0, ignore_eos=True)
        first = await anext(deltas)
        started.set()
        _, tokens, _ = await collect(deltas)
        return [*first.token_ids, *tokens]

    undisturbed = await stream(mesh.clients[0])
    assert len(undisturbed) == LONG
    started.clear()
    streams = [asyncio.create_task(stream(client)) for client in mesh.clients for _ in range(3)]
    await started.wait()
    before = mesh.unit[module].num_starts
    mesh.unit[module].kill()
    async with asyncio.timeout(120):
        for tokens in await asyncio.gather(*streams):
            assert tokens == undisturbed
    assert mesh.unit[module].num_starts > before
    await mesh.until_serving()


async def test_a_unit_frees_what_a_lost_router_held_and_another_router_goes_on(mesh: Mesh) -> None:
    await mesh.until_serving()
    lost, other = mesh.clients
    deltas = lost.stream(PROMPT, max_new_tokens=LONG, temperature=0, ignore_eos=True)
    await anext(deltas)
    mesh.routers[0].kill()
    with pytest.raises(MeshError):
        await collect(deltas)
    completion = await other.generate(PROMPT, max_new_tokens=24, temperature=0)
    assert list(completion.token_ids) == greedy_tokens(mesh.folder, PROMPT, 24)
    await mesh.until_serving()
