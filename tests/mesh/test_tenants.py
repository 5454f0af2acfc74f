"""Tenants with API keys, quotas and keys that are changed, on meshes of real processes."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from muxmesh.cli.main import main
from muxmesh.client import MeshClient, SyncMeshClient
from muxmesh.errors import InvalidRequest, PermissionDenied, QuotaExceeded, Unauthenticated
from tests.support.mesh import SIM_MODEL, RunningMesh, running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

UNIT = {"kv_pool": "4MiB", "slab": "64KiB", "models": [SIM_MODEL]}
ACCESS = {"mode": "keys"}


class Tenants:
    """Commands of `muxmesh tenant` for one mesh."""

    def __init__(self, mesh: RunningMesh, capsys: pytest.CaptureFixture[str]) -> None:
        self.mesh, self._capsys = mesh, capsys

    async def run(self, *arguments: str, code: int = 0) -> Any:
        """What a command prints with --json."""
        place = ("--runtime", str(self.mesh.mesh.runtime.path), "--json")
        self._capsys.readouterr()
        assert await asyncio.to_thread(main, ["tenant", *arguments, *place]) == code
        return json.loads(self._capsys.readouterr().out)

    async def add(self, name: str, *options: str) -> MeshClient:
        """A client with the key of a new tenant, once the router knows it."""
        return await self.client((await self.run("add", name, *options))["api_key"])

    async def client(self, key: str) -> MeshClient:
        client = MeshClient(self.mesh.address, api_key=key)

        async def is_known() -> bool:
            try:
                await client.list_models()
            except Unauthenticated:
                return False
            return True

        await self.mesh.until(is_known)
        return client

    async def settled(self, name: str) -> dict[str, Any]:
        """The usage of a tenant once nothing of it runs."""
        usage: dict[str, Any] = {}

        async def is_settled() -> bool:
            (found,) = await self.run("usage", name)
            usage.update(found)
            return bool(found["open_requests"] == 0)

        await self.mesh.until(is_settled)
        return usage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[UNIT], access=ACCESS) as running:
        yield running


@pytest.fixture
def tenants(mesh: RunningMesh, capsys: pytest.CaptureFixture[str]) -> Tenants:
    return Tenants(mesh, capsys)


async def generate(client: MeshClient, num_tokens: int = 8, **options: Any) -> Any:
    return await client.generate("Hello", max_new_tokens=num_tokens, temperature=0, ignore_eos=True, **options)


async def test_calls_need_the_key_of_a_tenant(tenants: Tenants) -> None:
    client = await tenants.add("calls")
    assert len((await generate(client)).token_ids) == 8
    for key in (None, "mm-wrong"):
        async with MeshClient(tenants.mesh.address, api_key=key) as stranger:
            for call in (stranger.list_models(), generate(stranger), stranger.tokenize("Hello"), stranger.status()):
                with pytest.raises(Unauthenticated):
                    await call
    key = (await tenants.run("rotate", "calls"))["api_key"]
    with SyncMeshClient(tenants.mesh.address, api_key=key) as sync:
        await (await tenants.client(key)).close()
        assert [model.name for model in await asyncio.to_thread(sync.list_models)] == ["sim"]
    await client.close()


async def test_the_state_of_the_mesh_is_for_operators(tenants: Tenants) -> None:
    client = await tenants.add("curious")
    with pytest.raises(PermissionDenied, match="for operators"):
        await client.status()
    await tenants.run("set", "curious", "--operator")

    async def may_see() -> bool:
        try:
            return (await client.status()).redis_connected
        except PermissionDenied:
            return False

    await tenants.mesh.until(may_see)
    await client.close()


async def test_tokens_are_settled_by_what_was_generated(tenants: Tenants) -> None:
    client = await tenants.add("small", "--tokens-per-minute", "600")
    await generate(client, 95)
    usage = await tenants.settled("small")
    assert (usage["requests"], usage["prompt_tokens"], usage["output_tokens"]) == (1, 5, 95)
    assert 500 <= usage["tokens_left"] < 600
    for _ in range(4):
        await generate(client, 95)
    with pytest.raises(QuotaExceeded, match="per minute are left") as caught:
        for _ in range(8):
            await generate(client, 595)
    assert caught.value.quota == "tokens_per_minute"
    assert 0 < caught.value.retry_after_s < 60
    assert (await tenants.settled("small"))["refused"] == 1
    await client.close()


async def test_a_cancelled_request_gives_its_reservation_back(tenants: Tenants) -> None:
    client = await tenants.add("cancels", "--max-concurrent-requests", "1")
    stream = client.stream("Hello", max_new_tokens=4000, ignore_eos=True)
    await anext(stream)
    with pytest.raises(QuotaExceeded, match="1 requests of tenant cancels are in progress"):
        await generate(client)
    await stream.aclose()
    usage = await tenants.settled("cancels")
    assert 0 < usage["output_tokens"] < 4000
    await generate(client)
    await client.close()


async def test_limits_of_a_request(tenants: Tenants) -> None:
    client = await tenants.add("limits", "--max-request-tokens", "40", "--best-priority", "3")
    assert len((await generate(client, 35)).token_ids) == 35
    with pytest.raises(InvalidRequest, match="requests of tenant limits have at most 40 tokens"):
        await generate(client, 36)
    assert len((await client.generate("Hello", ignore_eos=True)).token_ids) == 35, "the default length is cut"
    with pytest.raises(PermissionDenied, match="tenant limits may ask for 3 or a higher number"):
        await generate(client, priority=2)
    await generate(client, priority=5)
    await client.close()


async def test_tenants_share_no_cached_prefix(tenants: Tenants) -> None:
    first, second = await tenants.add("first"), await tenants.add("second")
    prompt = "a prefix of several blocks, " * 8

    async def num_cached(client: MeshClient) -> int:
        return (await client.generate(prompt, max_new_tokens=1)).prompt.num_cached_tokens

    assert await num_cached(first) == 0
    await tenants.mesh.until(lambda: _true(num_cached(first)))
    assert await num_cached(second) == 0
    await tenants.run("remove", "first")
    again = await tenants.add("first")
    assert await num_cached(again) == 0, "a new tenant with the name of an earlier one"
    for client in (first, second, again):
        await client.close()


async def _true(call: Any) -> bool:
    return bool(await call)


async def test_rotated_and_removed_keys_are_refused(tenants: Tenants) -> None:
    client = await tenants.add("keys")
    fresh = await tenants.client((await tenants.run("rotate", "keys", "--grace", "0"))["api_key"])

    async def is_refused(one: MeshClient) -> bool:
        try:
            await one.list_models()
        except Unauthenticated as error:
            return str(error) == "the API key is not valid"
        return False

    await tenants.mesh.until(lambda: is_refused(client))
    await fresh.list_models()
    await tenants.run("remove", "keys")
    await tenants.mesh.until(lambda: is_refused(fresh))
    listed = [one["name"] for one in await tenants.run("list")]
    assert "keys" not in listed
    assert (await tenants.run("usage", "keys", code=1))["field"] == "name"
    for one in (client, fresh):
        await one.close()


async def test_redis_may_restart_while_requests_run(tenants: Tenants) -> None:
    client = await tenants.add("survivor", "--tokens-per-minute", "100000")
    running = asyncio.ensure_future(generate(client, 1500))
    mesh = tenants.mesh
    before = mesh.pid("redis")
    mesh.process("redis").signal(signal.SIGKILL)
    completions = await asyncio.gather(*(generate(client, 5) for _ in range(4)))
    assert all(len(one.token_ids) == 5 for one in completions)
    assert len((await running).token_ids) == 1500

    async def is_back() -> bool:
        return mesh.process("redis").pid not in (None, before)

    await mesh.until(is_back)
    usage = {}

    async def is_settled() -> bool:
        found = await tenants.run("usage", "survivor")
        usage.update(found[0])
        return bool(usage["requests"] == 5)

    await mesh.until(is_settled)
    assert (usage["open_requests"], usage["output_tokens"]) == (0, 1520)
    await client.close()


async def test_tenants_outlive_the_mesh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_mesh(tmp_path, units=[UNIT], access=ACCESS) as first:
        client = await Tenants(first, capsys).add("lasting")
        await client.close()
        key = client._metadata[0][1].removeprefix("Bearer ")
    async with running_mesh(tmp_path, units=[UNIT], access=ACCESS) as second:
        again = await Tenants(second, capsys).client(key)
        await generate(again)
        await again.close()
