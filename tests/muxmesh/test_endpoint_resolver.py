import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis

from muxmesh.clock import ManualClock
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.endpoint_resolver import EndpointResolver
from muxmesh.errors import Unavailable
from muxmesh.process_registry import ProcessRegistry, redis_key
from muxmesh.types import Role

REPLICA = ProcessKey(Role.DECODE, "unit0", "chat", replica=1)


def runtime_with(redis_url: str) -> MeshRuntime:
    config = MeshConfig.model_validate({"mesh_id": "m", "units": [{"models": [{"name": "chat"}]}]})
    return MeshRuntime(config=config, run_dir=Path("/run"), cache_dir=Path("/"), redis_url=redis_url, prepared={})


@pytest_asyncio.fixture
async def resolver(redis_url: str) -> AsyncIterator[EndpointResolver]:
    registry = ProcessRegistry(redis_url, "m", ManualClock(1000.0))
    yield EndpointResolver(runtime_with(redis_url), registry)
    await registry.close()


def register(url: str, name: str, address: str, mesh_id: str = "m", seen_at_unix_s: float = 1000.0) -> None:
    record = {"name": name, "pid": 1, "address": address, "started_at_unix_s": 1.0}
    with redis.Redis.from_url(url) as client:
        text = json.dumps({**record, "seen_at_unix_s": seen_at_unix_s})
        client.hset(redis_key(mesh_id, "processes"), name, text)


async def test_every_process_of_the_runtime_file_is_resolved_without_redis(tmp_path: Path) -> None:
    url = f"unix://{tmp_path / 'none.sock'}"
    registry = ProcessRegistry(url, "m", ManualClock())
    runtime = runtime_with(url)
    resolver = EndpointResolver(runtime, registry)
    resolved = {key: await resolver.address(key) for key in runtime.endpoints()}
    await registry.close()
    assert resolved == {
        ProcessKey("kvstore", "unit0"): "unix:/run/kvstore-unit0.sock",
        ProcessKey(Role.PREFILL, "unit0", "chat"): "unix:/run/prefill-chat.sock",
        ProcessKey(Role.DECODE, "unit0", "chat"): "unix:/run/decode-chat.sock",
        ProcessKey("router"): "unix:/run/router.sock",
    }


async def test_the_runtime_file_takes_precedence_over_the_registry(redis_url: str, resolver: EndpointResolver) -> None:
    key = ProcessKey("kvstore", "unit0")
    register(redis_url, key.name, "10.0.0.9:1")
    assert await resolver.address(key) == "unix:/run/kvstore-unit0.sock"


async def test_a_process_beyond_the_runtime_file_is_resolved_by_the_registry(
    redis_url: str, resolver: EndpointResolver
) -> None:
    register(redis_url, "decode/chat#1", "10.0.0.2:7000")
    assert await resolver.address(REPLICA) == "10.0.0.2:7000"


async def test_an_unknown_process_is_unavailable(resolver: EndpointResolver) -> None:
    with pytest.raises(Unavailable, match="no process is registered as decode/chat#1"):
        await resolver.address(REPLICA)


async def test_a_process_without_a_recent_heartbeat_is_unavailable(redis_url: str, resolver: EndpointResolver) -> None:
    register(redis_url, "decode/chat#1", "10.0.0.2:7000", seen_at_unix_s=1.0)
    with pytest.raises(Unavailable):
        await resolver.address(REPLICA)


async def test_a_process_of_another_mesh_is_unavailable(redis_url: str, resolver: EndpointResolver) -> None:
    register(redis_url, "decode/chat#1", "10.0.0.2:7000", mesh_id="another")
    with pytest.raises(Unavailable):
        await resolver.address(REPLICA)


async def test_without_redis_a_process_beyond_the_runtime_file_is_unavailable(tmp_path: Path) -> None:
    url = f"unix://{tmp_path / 'none.sock'}"
    registry = ProcessRegistry(url, "m", ManualClock())
    with pytest.raises(Unavailable, match="no process is registered as decode/chat#1"):
        await EndpointResolver(runtime_with(url), registry).address(REPLICA)
    await registry.close()
