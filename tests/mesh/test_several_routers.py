"""Several routers behind one address, as processes: one order, one status, and none is missed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from muxmesh.cli.main import main
from muxmesh.client import MeshClient
from tests.support.mesh import SIM_MODEL, RunningMesh, running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

NUM_ROUTERS = 3
UNIT = {"kv_pool": "4MiB", "slab": "64KiB", "models": [SIM_MODEL]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[UNIT], routers=NUM_ROUTERS) as running:
        yield running


async def generate(mesh: RunningMesh, **options: Any) -> tuple[int, ...]:
    """Over a connection of its own, which any of the routers may get."""
    async with MeshClient(mesh.address) as client:
        return (await client.generate("Hello", max_new_tokens=8, temperature=0, **options)).token_ids


def num_served(mesh: RunningMesh, name: str) -> int:
    log = mesh.mesh.runtime.run_dir.parent / "logs" / f"{name}.log"
    return log.read_text().count("request id=") if log.exists() else 0


def names() -> list[str]:
    return ["router", *(f"router-{number}" for number in range(2, NUM_ROUTERS + 1))]


async def test_all_routers_serve_one_address_and_any_of_them_reports_all(mesh: RunningMesh) -> None:
    outputs = await asyncio.gather(*(generate(mesh) for _ in range(60)))
    assert len(set(outputs)) == 1
    assert sum(num_served(mesh, name) for name in names()) == 60
    assert sum(num_served(mesh, name) > 0 for name in names()) >= 2, "60 connections go to more than one router"
    for _ in range(5):
        async with MeshClient(mesh.address) as client:
            (model,) = (await client.status()).models
        assert (model.num_requests_finished, model.output_tokens) == (60, 480)
    status = await mesh.client.status()
    assert {one.name for one in status.processes if one.name.startswith("router")} == set(names())


async def test_a_router_that_is_killed_leaves_the_others(mesh: RunningMesh) -> None:
    before = mesh.pid("router-2")
    os.kill(before, signal.SIGKILL)
    assert len(set(await asyncio.gather(*(generate(mesh) for _ in range(20))))) == 1

    async def is_back() -> bool:
        return mesh.process("router-2").pid not in (None, before)

    await mesh.until(is_back)


async def test_a_loaded_model_is_served_by_every_router(mesh: RunningMesh, capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--runtime", str(mesh.mesh.runtime.path))
    source = ("x", "--name", "late", "--set", "engine=sim", "--set", "max_num_seqs=4")
    assert await asyncio.to_thread(main, ["model", "load", *source, *place]) == 0
    await asyncio.gather(*(generate(mesh, model="late") for _ in range(30)))
    assert await asyncio.to_thread(main, ["model", "unload", "late", *place]) == 0
