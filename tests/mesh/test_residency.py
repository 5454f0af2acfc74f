"""Two units and two routers as real processes: requests follow their prefixes through Redis, and leave a lost unit."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from muxmesh.client import Completion, MeshClient
from muxmesh.config.runtime import ProcessKey
from muxmesh.metrics.scrape import fetch
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.types import Role
from tests.support.mesh import Scrape
from tests.support.standalone_mesh import StandaloneMesh, output_of, standalone_mesh

pytestmark = pytest.mark.mesh

UNITS = ("unit-0", "unit-1")
ROUTER = ProcessKey("router")
SLOTS = 2
CONVERSATIONS = tuple(f"{number} " * 400 for number in range(4))
"""Prompts of 800 tokens that share no block."""
FULL_BLOCKS = 800 // 16


def keys(unit: str) -> tuple[ProcessKey, ...]:
    return (ProcessKey("kvstore", unit), *(ProcessKey(role, unit, "sim") for role in Role))


@asynccontextmanager
async def running(folder: Path, redis_url: str) -> AsyncIterator[StandaloneMesh]:
    """Both units; the routers are started by the test."""
    cores = sorted(os.sched_getaffinity(0))  # units of one machine need disjoint ones
    if len(cores) < len(UNITS):
        pytest.skip("there is one core")
    profile = {"base_s": 0.02, "per_token_s": 0.0005}
    model = {"name": "sim", "engine": "sim", "sim": profile, "max_num_seqs": SLOTS, "max_paused_seqs": 0}
    units = [
        {"name": name, "kv_pool": "16MiB", "cores": [core], "models": [model]}
        for name, core in zip(UNITS, cores, strict=False)
    ]
    config = folder / "mesh.yaml"
    config.write_text(json.dumps({"listen": free_listen_address("127.0.0.1:0"), "units": units}))
    arguments = ("-c", str(config), "--run-dir", str(folder / "run"), "--redis-url", redis_url)
    await output_of(sys.executable, "-m", "muxmesh", "prepare", *arguments)
    async with standalone_mesh(folder / "run" / "runtime.json") as mesh:
        for unit in UNITS:
            for key in keys(unit):
                mesh.start(key)
        yield mesh


@asynccontextmanager
async def router(mesh: StandaloneMesh, name: str) -> AsyncIterator[MeshClient]:
    """A client of a router that is started."""
    listen = free_listen_address("127.0.0.1:0")
    mesh.start(ROUTER, "--name", name, "--listen", listen, "--metrics", mesh.runtime.metrics_address(name), name=name)
    await mesh.until_healthy(name)
    async with MeshClient(listen) as client:
        yield client


async def until_ready(mesh: StandaloneMesh, client: MeshClient) -> None:
    async with asyncio.timeout(60):
        while True:
            units = (await client.status(timeout_s=10.0)).units
            if all(sum(worker.ready for worker in unit.workers) == len(Role) for unit in units):
                return
            await asyncio.sleep(0.05)


async def ask(client: MeshClient, prompt: str, num_tokens: int = 4) -> Completion:
    return await client.generate(
        prompt, max_new_tokens=num_tokens, ignore_eos=True, temperature=0, explain_scheduling=True
    )


async def until_known(mesh: StandaloneMesh, router: str, num_blocks: int) -> None:
    """Waits until the router knows of so many cached blocks."""
    async with asyncio.timeout(30):
        while True:
            _, body = await fetch(mesh.runtime.metrics_address(router), "/metrics", 20.0)
            if Scrape(body.decode()).value("muxmesh_residency_blocks") >= num_blocks:
                return
            await asyncio.sleep(0.02)


def unit_of(completion: Completion) -> str:
    scheduling = completion.prompt.scheduling
    assert scheduling is not None and scheduling.unit_reason.startswith(scheduling.unit)
    return scheduling.unit


async def test_a_conversation_stays_on_the_unit_that_caches_it_whichever_router_it_comes_through(
    tmp_path: Path, redis_url: str
) -> None:
    async with running(tmp_path, redis_url) as mesh, router(mesh, "router-a") as first:
        await until_ready(mesh, first)
        units = [unit_of(await ask(first, prompt)) for prompt in CONVERSATIONS]
        assert sorted(units) == sorted(UNITS * 2), "without any prefix, units take turns"
        await until_known(mesh, "router-a", len(CONVERSATIONS) * FULL_BLOCKS)
        for prompt, unit in zip(CONVERSATIONS, units, strict=True):
            second_turn = await ask(first, prompt + "and then?")
            assert unit_of(second_turn) == unit
            assert second_turn.prompt.num_cached_tokens >= 784, "nearly all of the first turn"
        async with router(mesh, "router-b") as fresh:
            for prompt, unit in zip(CONVERSATIONS, units, strict=True):
                third_turn = await ask(fresh, prompt + "and again?")
                assert unit_of(third_turn) == unit
                assert third_turn.prompt.num_cached_tokens >= 784


async def test_requests_of_a_killed_unit_finish_elsewhere_those_that_run_and_those_that_wait(
    tmp_path: Path, redis_url: str
) -> None:
    num_streams = 4 * SLOTS
    async with running(tmp_path, redis_url) as mesh, router(mesh, "router-a") as client:
        await until_ready(mesh, client)
        undisturbed = list((await ask(client, "Hello", 60)).token_ids)
        streams = [asyncio.create_task(ask(client, "Hello", 60)) for _ in range(num_streams)]
        async with asyncio.timeout(60):
            while True:
                models = {unit.unit: unit.models[0] for unit in (await client.status()).units}
                counts = {name: (model.num_leases, model.num_queued_requests) for name, model in models.items()}
                if counts == dict.fromkeys(UNITS, (SLOTS, num_streams // 2 - SLOTS)):
                    break
                await asyncio.sleep(0.02)
        for key in keys("unit-1"):
            await mesh.services[mesh.runtime.display_name(key)].end()
        async with asyncio.timeout(60):
            completions = await asyncio.gather(*streams)
        assert [list(one.token_ids) for one in completions] == [undisturbed] * num_streams
        after = {unit.unit: unit.connected for unit in (await client.status()).units}
        assert after == {"unit-0": True, "unit-1": False}
