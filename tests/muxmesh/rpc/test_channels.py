import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer


async def is_serving(channel: grpc.aio.Channel, wait_for_ready: bool) -> bool:
    stub = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=wait_for_ready)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def serving(address: str) -> MeshServer:
    server = MeshServer({})
    await server.start([address])
    await server.set_serving()
    return server


async def test_a_call_without_a_server_is_unavailable_at_once(tmp_path: Path) -> None:
    async with internal_channel(f"unix:{tmp_path / 'none.sock'}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await is_serving(channel, wait_for_ready=False)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_after_a_failed_attempt_a_channel_soon_tries_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's.sock'}"
    async with internal_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await is_serving(channel, wait_for_ready=False)
        server = await serving(address)
        async with asyncio.timeout(20):
            assert await is_serving(channel, wait_for_ready=True)
        await server.stop(0)


async def test_a_channel_reconnects_to_a_restarted_server(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's.sock'}"
    async with internal_channel(address) as channel, asyncio.timeout(20):
        for _ in range(2):
            server = await serving(address)
            assert await is_serving(channel, wait_for_ready=True)
            await server.stop(0)
