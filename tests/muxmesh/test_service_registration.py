import asyncio
from pathlib import Path

import pytest

from muxmesh.clock import ManualClock
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.lifecycle import Stop
from muxmesh.process_registry import ProcessRecord, ProcessRegistry
from muxmesh.service_registration import registered_service


def runtime_of(redis_url: str, has_supervisor: bool = False) -> MeshRuntime:
    unit = {"name": "u", "network": {"host": "127.0.0.1", "base_port": 7000}, "models": [{"name": "m"}]}
    return MeshRuntime(
        config=MeshConfig.model_validate({"mesh_id": "m", "units": [unit]}),
        run_dir=Path("/r"),
        cache_dir=Path("/c"),
        redis_url=redis_url,
        prepared={},
        has_supervisor=has_supervisor,
    )


async def registered(
    runtime: MeshRuntime, address: str = "", gives_up: bool = False, started_at_s: float = 1000.0
) -> tuple[str, str, int]:
    """Name, address and restarts of a kvstore while it is registered. Its record ends with it unless it gives up."""
    stop, clock, endpoint = Stop(), ManualClock(started_at_s), runtime.endpoints()[ProcessKey("kvstore", "u")]
    reader = ProcessRegistry(runtime.redis_url, "m", clock)
    try:
        async with asyncio.timeout(20):
            async with registered_service(runtime, endpoint, stop, clock, address):
                while not (found := await own_records(reader, started_at_s)):
                    await asyncio.sleep(0)
                if gives_up:
                    stop.give_up("a test")
            assert bool(await reader.processes()) == gives_up
    finally:
        await reader.close()
    ((record, num_restarts),) = found
    return record.name, record.address, num_restarts


async def own_records(reader: ProcessRegistry, started_at_s: float) -> list[tuple[ProcessRecord, int]]:
    """Those of the process that has started then, and not of an earlier one of the name."""
    return [one for one in await reader.processes() or () if one[0].started_at_unix_s == started_at_s]


@pytest.mark.parametrize(("address", "expected"), [("", "127.0.0.1:7000"), ("host:1", "host:1")])
async def test_a_service_is_found_at_its_remote_address_or_at_a_given_one(
    redis_url: str, address: str, expected: str
) -> None:
    assert await registered(runtime_of(redis_url), address) == ("kvstore/u", expected, 0)


@pytest.mark.parametrize(("has_supervisor", "num_restarts"), [(False, 1), (True, 0)])
async def test_a_start_after_one_that_gave_up_is_a_restart_unless_a_supervisor_counts_it(
    redis_url: str, has_supervisor: bool, num_restarts: int
) -> None:
    runtime = runtime_of(redis_url, has_supervisor)
    await registered(runtime, gives_up=True)
    assert await registered(runtime, started_at_s=1001.0) == ("kvstore/u", "127.0.0.1:7000", num_restarts)
