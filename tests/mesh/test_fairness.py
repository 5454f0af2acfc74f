"""A real mesh of sim engines with two tenants. Until there are API keys, a tenant is known by its cache salt."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.mesh import running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio]

NUM_SLOTS = 4
MODEL = {
    "name": "sim",
    "engine": "sim",
    "sim": {"base_s": 0.02},
    "max_num_seqs": NUM_SLOTS,
    "max_paused_seqs": NUM_SLOTS,
}
CONFIG: dict[str, Any] = {"units": [{"kv_pool": "16MiB", "models": [MODEL]}]}


async def test_a_request_of_another_tenant_overtakes_a_flood_of_the_best_class_in_queue_and_batch(
    tmp_path: Path,
) -> None:
    async with running_mesh(tmp_path, **CONFIG) as mesh:

        def send(tenant: str, num_tokens: int, priority: int) -> asyncio.Task[Any]:
            request = mesh.client.generate(
                "a prompt", max_new_tokens=num_tokens, ignore_eos=True, explain_scheduling=True, priority=priority,
                cache_salt=tenant,
            )  # fmt: skip
            return asyncio.create_task(request)

        flood = [send("flood", 500, -5) for _ in range(20)]

        async def batch_is_full() -> bool:
            (model,) = (await mesh.client.status()).models
            return (model.num_requests_running, model.num_requests_waiting) == (NUM_SLOTS, len(flood) - NUM_SLOTS)

        await mesh.until(batch_is_full)
        scheduling = (await send("b", 5, 3)).prompt.scheduling
        assert not any(one.done() for one in flood)
        assert scheduling.decision == NUM_SLOTS + 1
        assert "its tenant is behind others, or level with them" in scheduling.reason
        assert scheduling.reason.endswith("its priority has no effect on requests of other tenants")
        for one in flood:
            one.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
