"""Two units as the Pods of a StatefulSet: the same mesh.yaml and ports, but a host and a run folder of their own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from muxmesh.client import MeshClient
from muxmesh.config.runtime import ProcessKey
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.types import Role
from muxmesh.v1 import mesh_pb2
from tests.support.mesh import collect
from tests.support.standalone_mesh import StandaloneMesh, output_of, standalone_mesh

pytestmark = pytest.mark.mesh

UNITS = ("unit-0", "unit-1")
NUM_STREAMS = 6
LONG = 150


def write_config(path: Path, listen: str, redis_url: str) -> None:
    cores = sorted(os.sched_getaffinity(0))  # units of one machine need disjoint ones
    if len(cores) < len(UNITS):
        pytest.skip("there is one core")
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.02}, "max_num_seqs": NUM_STREAMS}
    units = [
        {
            "name": name, "kv_pool": "16MiB", "cores": [core], "models": [model],
            "network": {"host": f"127.{os.getpid() % 250 + 1}.8.{number + 1}", "base_port": 50100},
        }
        for number, (name, core) in enumerate(zip(UNITS, cores, strict=False))
    ]  # fmt: skip
    path.write_text(json.dumps({"mesh_id": "two", "listen": listen, "redis_url": redis_url, "units": units}))


@asynccontextmanager
async def prepared(folder: Path, *part: str) -> AsyncIterator[StandaloneMesh]:
    """The services of one part of the mesh, with a run folder of its own."""
    run_dir = folder / part[-1].removeprefix("--")
    config = str(folder / "mesh.yaml")
    await output_of(sys.executable, "-m", "muxmesh", "prepare", "-c", config, "--run-dir", str(run_dir), *part)
    async with standalone_mesh(run_dir / "runtime.json") as services:
        yield services


def keys(unit: str) -> Iterator[ProcessKey]:
    """The containers of a Pod."""
    yield ProcessKey("kvstore", unit)
    for role in Role:
        yield ProcessKey(role, unit, "sim")


async def units_of(client: MeshClient) -> dict[str, mesh_pb2.UnitStatus]:
    return {unit.unit: unit for unit in (await client.status(timeout_s=10.0)).units}


async def until_ready(client: MeshClient, *names: str) -> None:
    """Waits until the workers of exactly these units are ready."""
    async with asyncio.timeout(60):
        while True:
            units = await units_of(client)
            ready = {name for name, unit in units.items() if sum(worker.ready for worker in unit.workers) == len(Role)}
            if ready == set(names):
                return
            await asyncio.sleep(0.05)


async def test_two_units_share_the_requests_and_one_goes_on_when_the_other_is_away(
    tmp_path: Path, redis_url: str
) -> None:
    listen = free_listen_address("127.0.0.1:0")
    write_config(tmp_path / "mesh.yaml", listen, redis_url)
    async with AsyncExitStack() as stack:
        pods = {name: await stack.enter_async_context(prepared(tmp_path, "--unit", name)) for name in UNITS}
        routers = await stack.enter_async_context(prepared(tmp_path, "--router"))
        for name, pod in pods.items():
            for key in keys(name):
                pod.start(key)
        routers.start(ProcessKey("router"), "--name", "router-0", name="router-0")
        await routers.until_healthy("router-0")
        client = await stack.enter_async_context(MeshClient(listen))
        await until_ready(client, *UNITS)
        undisturbed = list((await client.generate("Hello", max_new_tokens=LONG, temperature=0)).token_ids)
        assert len(undisturbed) == LONG

        started = [asyncio.Event() for _ in range(NUM_STREAMS)]

        async def stream(has_started: asyncio.Event) -> list[int]:
            deltas = client.stream("Hello", max_new_tokens=LONG, temperature=0)
            first = await anext(deltas)
            has_started.set()
            _, tokens, _ = await collect(deltas)
            return [*first.token_ids, *tokens]

        streams = [asyncio.create_task(stream(event)) for event in started]
        async with asyncio.timeout(60):
            for event in started:
                await event.wait()
        leased = {
            name: sum(model.num_leases for model in unit.models) for name, unit in (await units_of(client)).items()
        }
        assert leased == dict.fromkeys(UNITS, NUM_STREAMS // 2)
        for service in pods["unit-1"].services.values():
            await service.end()
        async with asyncio.timeout(60):
            assert await asyncio.gather(*streams) == [undisturbed] * NUM_STREAMS
        await until_ready(client, "unit-0")
        assert list((await client.generate("Hello", max_new_tokens=LONG, temperature=0)).token_ids) == undisturbed

        for key in keys("unit-1"):
            pods["unit-1"].start(key)
        await until_ready(client, *UNITS)
