import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.rpc.channels import _OPTIONS, internal_channel
from muxmesh.rpc.server import MeshServer


async def is_serving(channel: grpc.aio.Channel, wait_for_ready: bool) -> bool:
    stub = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=wait_for_ready)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def is_answered(channel: grpc.aio.Channel) -> bool:
    """False if the call went to a connection whose end the channel had not seen."""
    try:
        return await is_serving(channel, wait_for_ready=True)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        raise


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


@contextlib.contextmanager
def listening(path: Path | None) -> Iterator[tuple[socket.socket, str]]:
    """A unix socket at ``path``, or a TCP port, that speaks no HTTP/2, with its address."""
    with socket.socket(socket.AF_INET if path is None else socket.AF_UNIX) as listener:
        listener.bind(("127.0.0.1", 0) if path is None else str(path))
        listener.listen()
        listener.setblocking(False)
        yield listener, f"127.0.0.1:{listener.getsockname()[1]}" if path is None else f"unix:{path}"


@pytest.mark.parametrize("is_on_network", [False, True])
async def test_a_channel_makes_seven_attempts_to_connect_within_seconds(tmp_path: Path, is_on_network: bool) -> None:
    """With the default options of gRPC, the back-off makes it 20 seconds or more."""
    loop = asyncio.get_running_loop()
    with listening(None if is_on_network else tmp_path / "a.sock") as (listener, address):
        async with internal_channel(address) as channel:
            call = asyncio.create_task(is_serving(channel, wait_for_ready=True))
            async with asyncio.timeout(15):
                for _ in range(7):
                    connection, _ = await loop.sock_accept(listener)
                    connection.close()
            assert not call.done()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)


async def test_a_call_to_a_process_that_is_stopped_waits_and_does_not_fail(tmp_path: Path) -> None:
    """The kernel accepts the connection, and the process does not respond, until the process continues or is killed.

    On the network a call fails after 3 s, since a host that is gone does not respond either.
    """
    with listening(tmp_path / "a.sock") as (_, address):
        async with internal_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=3.0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_delay_between_attempts_grows_from_a_tenth_of_a_second_to_a_second() -> None:
    options = dict(_OPTIONS)
    assert options["grpc.initial_reconnect_backoff_ms"] == 100
    assert options["grpc.max_reconnect_backoff_ms"] == 1000


async def test_channels_to_one_address_have_connections_of_their_own() -> None:
    """So the back-off of one does not delay another."""

    async def peer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        return context.peer().encode()

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Peer": grpc.unary_unary_rpc_method_handler(peer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with internal_channel(address) as one, internal_channel(address) as other, asyncio.timeout(20):
            calls: list[Any] = [channel.unary_unary("/test/Peer") for channel in (one, other, one, other)]
            peers = [await call(b"") for call in calls]
    finally:
        await server.stop(0)
    assert peers[0] != peers[1] and peers[:2] == peers[2:]


async def test_a_channel_reconnects_to_a_restarted_server(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's.sock'}"
    async with internal_channel(address) as channel, asyncio.timeout(20):
        for _ in range(2):
            server = await serving(address)
            try:
                while not await is_answered(channel):
                    await asyncio.sleep(0.01)
            finally:
                await server.stop(0)
