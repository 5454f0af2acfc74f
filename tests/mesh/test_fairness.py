"""A real mesh of sim engines with two tenants."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from muxmesh.client import MeshClient
from muxmesh.errors import Unauthenticated
from muxmesh.redis_connection import open_redis
from muxmesh.tenants.tenant_directory import TenantDirectory
from tests.support.mesh import RunningMesh, running_mesh
from tests.support.tenants import record

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio]

NUM_SLOTS = 4
MODEL = {
    "name": "sim",
    "engine": "sim",
    "sim": {"base_s": 0.02},
    "max_num_seqs": NUM_SLOTS,
    "max_paused_seqs": NUM_SLOTS,
}
CONFIG: dict[str, Any] = {"units": [{"kv_pool": "16MiB", "models": [MODEL]}], "access": {"mode": "keys"}}


async def client_of(mesh: RunningMesh, name: str, number: int) -> MeshClient:
    """A client of a new tenant, which the router knows. It may see the state of the mesh."""
    redis = open_redis(mesh.mesh.runtime.redis_url)
    directory = TenantDirectory(redis, mesh.mesh.runtime.config.mesh_id, random.Random(number))
    await directory.add(record(name, name, number=number, is_operator=True))
    await redis.aclose()
    client = MeshClient(mesh.address, api_key=name)

    async def is_known() -> bool:
        try:
            await client.list_models()
        except Unauthenticated:
            return False
        return True

    await mesh.until(is_known)
    return client


async def test_a_request_of_another_tenant_overtakes_a_flood_of_the_best_class_in_queue_and_batch(
    tmp_path: Path,
) -> None:
    async with running_mesh(tmp_path, **CONFIG) as mesh:
        clients = {name: await client_of(mesh, name, number) for number, name in enumerate(("flood", "b"), 1)}

        def send(tenant: str, num_tokens: int, priority: int) -> asyncio.Task[Any]:
            request = clients[tenant].generate(
                "a prompt", max_new_tokens=num_tokens, ignore_eos=True, explain_scheduling=True, priority=priority,
            )  # fmt: skip
            return asyncio.create_task(request)

        flood = [send("flood", 500, -5) for _ in range(20)]

        async def batch_is_full() -> bool:
            (model,) = (await clients["b"].status()).models
            return (model.num_requests_running, model.num_requests_waiting) == (NUM_SLOTS, len(flood) - NUM_SLOTS)

        await mesh.until(batch_is_full)
        scheduling = (await send("b", 5, 3)).prompt.scheduling
        assert not any(one.done() for one in flood)
        use = {one.tenant: one for one in (await clients["b"].status()).units[0].tenants}["flood"]
        assert use.num_queued_requests + use.num_leases == len(flood)
        assert use.num_leases >= NUM_SLOTS
        assert use.service_s > 0
        assert scheduling.decision == NUM_SLOTS + 1
        assert "its tenant is behind others, or level with them" in scheduling.reason
        assert scheduling.reason.endswith("its priority has no effect on requests of other tenants")
        for one in flood:
            one.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        for client in clients.values():
            await client.close()
