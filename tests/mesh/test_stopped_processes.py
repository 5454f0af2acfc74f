"""Processes that are stopped by a signal: alive, and without a response. `make bench-stopped` has more streams."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from muxmesh.client import MeshClient
from muxmesh.errors import MeshError, Unavailable
from tests.support.mesh import RunningMesh, running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]
MODEL = {"name": "m", "engine": "sim", "sim": {"base_s": 0.02}, "max_num_seqs": 8}
NEW_TOKENS = 60


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[{"models": [MODEL]}]) as running:
        yield running


class Stream:
    """One sampled stream, and what has arrived of it."""

    def __init__(self, client: MeshClient, seed: int) -> None:
        self.tokens: list[int] = []
        self.error: MeshError | None = None
        self.task = asyncio.create_task(self._read(client, seed))

    async def _read(self, client: MeshClient, seed: int) -> None:
        try:
            async for delta in client.stream(f"Story {seed}", seed=seed, temperature=1.0, max_new_tokens=NEW_TOKENS):
                self.tokens += delta.token_ids
        except MeshError as error:
            self.error = error


async def read_all(streams: list[Stream]) -> None:
    async with asyncio.timeout(60):
        await asyncio.gather(*(stream.task for stream in streams))


async def stop(mesh: RunningMesh, name: str) -> int:
    """Stops a process once every stream of the test runs. Returns its pid."""
    pid = mesh.pid(name)
    os.kill(pid, signal.SIGSTOP)
    return pid


async def until_serving(mesh: RunningMesh) -> None:
    async def serves() -> bool:
        try:
            status = await mesh.client.status(timeout_s=2)
        except MeshError:
            return False
        (unit,) = status.units
        return status.redis_connected and unit.connected and sum(worker.ready for worker in unit.workers) == 2

    await mesh.until(serves)


@pytest.mark.parametrize("name", ["redis", "kvstore/unit0", "prefill/m", "decode/m", "router"])
async def test_a_stopped_process_is_restarted_and_no_stream_gets_a_wrong_token(mesh: RunningMesh, name: str) -> None:
    expected = [Stream(mesh.client, seed) for seed in range(6)]
    await read_all(expected)
    restarts = mesh.process(name).num_restarts
    early = [Stream(mesh.client, seed) for seed in range(3)]
    async with asyncio.timeout(30):
        while not all(stream.tokens for stream in early):
            await asyncio.sleep(0.01)
    pid = await stop(mesh, name)
    streams = [*early, *(Stream(mesh.client, seed) for seed in range(3, 6))]
    await read_all(streams)
    for stream, right in zip(streams, expected, strict=True):
        if name == "router":
            assert stream.error is None or isinstance(stream.error, Unavailable)
            assert stream.tokens == right.tokens[: len(stream.tokens)]
        else:
            assert stream.error is None
        assert stream.error is not None or stream.tokens == right.tokens
    await until_serving(mesh)
    assert not Path(f"/proc/{pid}").exists()
    assert mesh.process(name).num_restarts == restarts + 1
    await mesh.until_free()


async def test_the_status_of_a_mesh_with_a_stopped_redis_says_so(mesh: RunningMesh) -> None:
    """The call returns although Redis does not respond: before the stopped Redis is killed, or after."""
    await stop(mesh, "redis")
    status = await mesh.client.status(timeout_s=10)
    assert status.redis_connected is False
    assert status.units[0].connected is True
    await until_serving(mesh)


async def test_restart_counts_outlive_redis(mesh: RunningMesh) -> None:
    counts = {process.spec.name: process.num_restarts for process in mesh.mesh.processes}
    assert counts["redis"] >= 2

    async def are_reported() -> bool:
        reported = {process.name: process.num_restarts for process in (await mesh.client.status()).processes}
        return reported == {name: count for name, count in counts.items() if name != "redis"}

    await mesh.until(are_reported)
