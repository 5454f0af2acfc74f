"""A public server whose clients send half a message, read nothing, and open more than they may."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh import errors
from muxmesh.rpc.client_limits import CallLimiter, PublicLimits, client_of
from muxmesh.rpc.server import MeshServer
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.v1 import inference_pb2, inference_pb2_grpc
from tests.support import http2

MIB = 1024 * 1024
LIMITS = PublicLimits(max_message_bytes=MIB, max_connections=50, max_calls=20, max_idle_s=300, slow_client_s=300)
STREAM = "/muxmesh.v1.Inference/GenerateStream"
UNARY = "/muxmesh.v1.Inference/Generate"


Base: Any = inference_pb2_grpc.InferenceServicer
"""Without its abstract methods, which only the type checker sees."""


class Servicer(Base):  # type: ignore[misc]
    """Answers with the text that it was sent, after ``may_answer``; a stream repeats it without end."""

    Tokenize = Detokenize = cast(Any, None)

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_running = 0
        self.changed = asyncio.Event()

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> inference_pb2.GenerateResponse:
        await self.may_answer.wait()
        return response(request)

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        self.count(1)
        try:
            await self.may_answer.wait()
            while True:
                yield response(request)
        finally:
            self.count(-1)

    def count(self, change: int) -> None:
        self.num_running += change
        self.changed.set()

    async def until_running(self, number: int) -> None:
        async with asyncio.timeout(20):
            while self.num_running != number:
                self.changed.clear()
                await self.changed.wait()


def response(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(outputs=inference_pb2.SequenceOutput(text=request.text))


class Public:
    def __init__(self, address: str, servicer: Servicer, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.servicer = servicer
        self.stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def text(self, text: str = "hi") -> str:
        """A request that is answered at once."""
        async with asyncio.timeout(20):
            return (await self.stub.Generate(inference_pb2.GenerateRequest(text=text))).outputs.text


@asynccontextmanager
async def public(limits: PublicLimits) -> AsyncIterator[Public]:
    servicer, address = Servicer(), free_listen_address("127.0.0.1:0")
    register = functools.partial(inference_pb2_grpc.add_InferenceServicer_to_server, servicer)
    server = MeshServer({inference_pb2.DESCRIPTOR.services_by_name["Inference"]: register}, limits)
    await server.start([address])
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Public(address, servicer, channel)
    finally:
        await server.stop(0)


async def refused(call: Any) -> errors.MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(20):
            await call
    return from_rpc_error(caught.value)


async def test_a_message_above_the_limit_is_refused_with_its_size_and_the_limit() -> None:
    async with public(LIMITS) as mesh:
        assert str(await refused(mesh.text("x" * MIB))) == f"request: is {MIB + 4} bytes; at most {MIB}"
        assert await mesh.text("x" * (MIB - 4)) == "x" * (MIB - 4)


@pytest.mark.parametrize("path", [STREAM, UNARY, "/grpc.health.v1.Health/Check"])
async def test_a_call_whose_message_does_not_arrive_ends(path: str) -> None:
    async with public(replace(LIMITS, slow_client_s=0.2)) as mesh:
        reader, writer = await http2.connect(mesh.address)
        writer.write(http2.hello() + http2.call(1, path) + http2.message(1, b"half", announced=1000))
        await http2.until(reader, b"the request did not arrive within 0.2 s")
        writer.close()


async def test_messages_that_are_sent_by_halves_keep_no_other_from_arriving() -> None:
    limits = replace(LIMITS, max_message_bytes=64 * MIB)  # memory for eight of them
    async with public(limits) as mesh:
        reader, writer = await http2.connect(mesh.address)
        writer.write(http2.hello())
        for stream in range(1, 25, 2):
            writer.write(http2.call(stream, STREAM) + http2.message(stream, b"half", announced=60 * MIB))
        await http2.until(reader, b"too slowly")  # there are twelve
        assert await mesh.text() == "hi"
        writer.close()


async def test_a_small_message_does_not_wait_for_all_half_sent_ones_before_it() -> None:
    limits, num_half_sent = replace(LIMITS, max_message_bytes=64 * MIB, max_calls=500), 400  # memory for eight of them
    async with public(limits) as mesh:
        reader, writer = await http2.connect(mesh.address)
        writer.write(http2.hello())
        for stream in range(1, 2 * num_half_sent, 2):
            writer.write(http2.call(stream, STREAM) + http2.message(stream, b"half", announced=60 * MIB))
        ended = await http2.until(reader, b"too slowly")
        assert await mesh.text() == "hi"
        writer.write(http2.frame(http2.PING, 0, 0, b"so far ?"))
        ended += await http2.until(reader, b"so far ?")
        assert num_frames(ended, http2.RST_STREAM) < num_half_sent // 2
        writer.close()


def num_frames(received: bytes, kind: int) -> int:
    number = offset = 0
    while len(received) >= offset + 9:
        number += received[offset + 3] == kind
        offset += 9 + int.from_bytes(received[offset : offset + 3], "big")
    return number


async def test_a_call_that_is_cancelled_while_it_waits_to_be_received_leaves_no_trace() -> None:
    limits = replace(LIMITS, max_message_bytes=64 * MIB)
    async with public(limits) as mesh:
        _, writer = await http2.connect(mesh.address)
        writer.write(http2.hello())
        for stream in range(1, 33, 2):
            writer.write(http2.call(stream, STREAM) + http2.message(stream, b"half", announced=60 * MIB))
        writer.write(b"".join(http2.frame(http2.RST_STREAM, 0, stream, bytes(4)) for stream in range(17, 33, 2)))
        assert await mesh.text() == "hi"
        writer.close()
        for _ in range(20):
            assert await mesh.text() == "hi"


async def test_a_request_without_a_message_is_refused() -> None:
    async with public(LIMITS) as mesh:
        reader, writer = await http2.connect(mesh.address)
        writer.write(http2.hello() + http2.call(1, STREAM) + http2.frame(http2.DATA, http2.END_STREAM, 1))
        await http2.until(reader, b"has no message")
        writer.close()


@pytest.mark.parametrize("window", [0, 1000])
async def test_a_stream_that_is_not_read_ends(window: int) -> None:
    async with public(replace(LIMITS, slow_client_s=0.2)) as mesh:
        _, writer = await http2.connect(mesh.address)
        request = inference_pb2.GenerateRequest(text="x" * 100).SerializeToString()
        writer.write(http2.hello(window) + http2.call(1, STREAM) + http2.message(1, request))
        await mesh.servicer.until_running(1)
        await mesh.servicer.until_running(0)
        assert await mesh.text() == "hi"
        writer.close()


async def test_a_stream_that_is_read_lasts_as_long_as_its_output_takes() -> None:
    async with public(replace(LIMITS, slow_client_s=0.1)) as mesh:
        mesh.servicer.may_answer.clear()
        stream = mesh.stub.GenerateStream(inference_pb2.GenerateRequest(text="slow"))
        await mesh.servicer.until_running(1)
        asyncio.get_running_loop().call_later(0.3, mesh.servicer.may_answer.set)
        answer: Any = await stream.read()
        assert answer.outputs.text == "slow"
        stream.cancel()


async def test_the_client_that_reads_again_after_its_stream_ended_sees_why() -> None:
    async with public(replace(LIMITS, slow_client_s=0.2)) as mesh:
        reader, writer = await http2.connect(mesh.address)
        request = inference_pb2.GenerateRequest(text="x" * 100).SerializeToString()
        writer.write(http2.hello(0) + http2.call(1, STREAM) + http2.message(1, request))
        await mesh.servicer.until_running(1)
        await mesh.servicer.until_running(0)
        writer.write(http2.frame(http2.WINDOW_UPDATE, 0, 1, (10_000).to_bytes(4, "big")))
        await http2.until(reader, b"the client has read nothing for 0.2 s")
        writer.close()


async def test_a_client_with_too_many_calls_is_refused_and_may_call_again_when_one_ends() -> None:
    async with public(replace(LIMITS, max_calls=2)) as mesh:
        mesh.servicer.may_answer.clear()
        streams = []
        for number in (1, 2):
            streams.append(mesh.stub.GenerateStream(inference_pb2.GenerateRequest()))
            await mesh.servicer.until_running(number)
        async with grpc.aio.insecure_channel(mesh.address, [("grpc.use_local_subchannel_pool", 1)]) as another:
            stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(another)
            error = await refused(stub.Generate(inference_pb2.GenerateRequest()))
            assert isinstance(error, errors.Overloaded)
            assert str(error) == "the client 127.0.0.1 has 2 calls in progress; at most 2"
            streams[0].cancel()
            await mesh.servicer.until_running(1)
            mesh.servicer.may_answer.set()
            assert (await stub.Generate(inference_pb2.GenerateRequest(text="a"))).outputs.text == "a"
        streams[1].cancel()


async def test_a_client_in_an_exempt_network_may_have_any_number_of_calls() -> None:
    exempt = (ipaddress.ip_network("127.0.0.0/8"),)
    async with public(replace(LIMITS, max_calls=1, exempt=exempt)) as mesh:
        mesh.servicer.may_answer.clear()
        channels = [grpc.aio.insecure_channel(mesh.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(3)]
        stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        streams = [stub.GenerateStream(inference_pb2.GenerateRequest()) for stub in stubs]
        await mesh.servicer.until_running(3)
        for stream in streams:
            stream.cancel()
        for channel in channels:
            await channel.close()


async def test_a_connection_above_the_limit_is_closed() -> None:
    async with public(replace(LIMITS, max_connections=2)) as mesh:
        writers = []
        for _ in range(2):
            reader, writer = await http2.connect(mesh.address)
            writer.write(http2.hello())
            await reader.read(1)
            writers.append(writer)
        reader, writer = await http2.connect(mesh.address)
        assert await http2.ends(reader) == b""
        for one in [*writers, writer]:
            one.close()


async def test_connections_of_clients_keep_no_process_of_the_mesh_out(tmp_path: Path) -> None:
    servicer, address = Servicer(), free_listen_address("127.0.0.1:0")
    register = functools.partial(inference_pb2_grpc.add_InferenceServicer_to_server, servicer)
    server = MeshServer(
        {inference_pb2.DESCRIPTOR.services_by_name["Inference"]: register}, replace(LIMITS, max_connections=1)
    )
    await server.start([address, f"unix:{tmp_path / 's.sock'}"])
    reader, writer = await http2.connect(address)
    await reader.read(1)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 's.sock'}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    writer.close()
    await server.stop(0)


async def test_an_idle_connection_is_closed_and_its_client_connects_again() -> None:
    async with public(replace(LIMITS, max_idle_s=1)) as mesh:
        reader, writer = await http2.connect(mesh.address)
        writer.write(http2.hello())
        assert await mesh.text() == "hi"
        await http2.ends(reader)
        assert await mesh.text() == "hi"
        writer.close()


async def test_the_health_is_answered_beside_everything_else() -> None:
    async with public(LIMITS) as mesh:
        check = await mesh.health.Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.NOT_SERVING
        async with aclosing(aiter_of(mesh.health.Watch(health_pb2.HealthCheckRequest()))) as watch:
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def aiter_of(call: Any) -> AsyncGenerator[Any]:
    try:
        async for message in call:
            yield message
    finally:
        call.cancel()


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("ipv4:192.0.2.1:5001", "192.0.2.1"),
        ("ipv6:%5B2001:db8::7%5D:80", "2001:db8::/64"),
        ("ipv6:[2001:db8:0:0:1::7]:80", "2001:db8::/64"),
        ("ipv6:[fe80::1%25eth0]:80", "fe80::/64"),
        ("ipv6:[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("unix:", None),
        ("unix:/run/mesh.sock", None),
    ],
)
def test_a_client_is_known_by_its_address(peer: str, client: str | None) -> None:
    assert client_of(peer) == client


def test_processes_at_a_unix_socket_are_not_counted() -> None:
    calls = CallLimiter(1, ())
    with calls.counted("unix:"), calls.counted("unix:"), calls.counted("ipv4:192.0.2.1:1"):
        with pytest.raises(errors.Overloaded), calls.counted("ipv4:192.0.2.1:2"):
            pass
        with calls.counted("ipv4:192.0.2.2:1"):
            pass
    with calls.counted("ipv4:192.0.2.1:2"):
        pass
