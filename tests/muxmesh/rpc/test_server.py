"""A server on a unix socket with one servicer whose behavior each test defines. Calls are those of kvstore."""

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh import errors
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.client_limits import PublicLimits
from muxmesh.rpc.limits import MAX_MESSAGE_BYTES
from muxmesh.rpc.server import MeshServer
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.supervisor.mesh_supervisor import free_listen_address

KVSTORE = kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

Unary = Callable[[Any, Any], Awaitable[Any]]
Stream = Callable[[Any, Any], AsyncGenerator[Any]]


Base: Any = kvstore_pb2_grpc.KvStoreServiceServicer
"""Without its abstract methods, which only the type checker sees."""


@dataclass
class Servicer(Base):  # type: ignore[misc]
    """One RPC of each kind that the mesh has."""

    unary: Unary | None = None
    stream: Stream | None = None
    bidi: Stream | None = None

    async def AcquireLease(self, request: Any, context: Any) -> Any:
        assert self.unary is not None
        return await self.unary(request, context)

    def WatchLeases(self, request: Any, context: Any) -> Any:
        assert self.stream is not None
        return self.stream(request, context)

    def Admit(self, requests: Any, context: Any) -> Any:
        assert self.bidi is not None
        return self.bidi(requests, context)


@dataclass
class Running:
    server: MeshServer
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return kvstore_pb2_grpc.KvStoreServiceStub(self.channel)

    @property
    def health(self) -> health_pb2_grpc.HealthStub:
        return health_pb2_grpc.HealthStub(self.channel)

    async def error_of(self, call: Awaitable[Any]) -> errors.MeshError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return from_rpc_error(caught.value)

    def send_raw(self, method: str, raw: bytes) -> Awaitable[bytes]:
        """A call whose request is not a valid message."""
        call: Any = self.channel.unary_unary(f"/{KVSTORE.full_name}/{method}")
        response: Awaitable[bytes] = call(raw)
        return response


LIMITS = PublicLimits(
    max_message_bytes=1024 * 1024, max_connections=100, max_calls=100, max_idle_s=300, slow_client_s=30
)
both = pytest.mark.parametrize("public", [None, LIMITS], ids=["internal", "public"])


def mesh_server(servicer: Servicer, public: PublicLimits | None = None) -> MeshServer:
    register = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, servicer)
    return MeshServer({KVSTORE: register}, public=public)


@asynccontextmanager
async def running(
    tmp_path: Path, servicer: Servicer | None = None, public: PublicLimits | None = None
) -> AsyncIterator[Running]:
    server, address = mesh_server(servicer or Servicer(), public), f"unix:{tmp_path / 's.sock'}"
    await server.start([address])
    try:
        async with internal_channel(address) as channel:
            yield Running(server, channel)
    finally:
        await server.stop(0)


async def collect(call: AsyncIterator[Any]) -> list[Any]:
    return [message async for message in call]


def request(owner: str = "o") -> kvstore_pb2.AcquireLeaseRequest:
    return kvstore_pb2.AcquireLeaseRequest(owner=owner)


def lease_response(model: str) -> kvstore_pb2.AcquireLeaseResponse:
    return kvstore_pb2.AcquireLeaseResponse(lease=kvstore_pb2.Lease(model=model))


async def echo(request: kvstore_pb2.AcquireLeaseRequest, context: object) -> kvstore_pb2.AcquireLeaseResponse:
    return lease_response(request.owner)


async def preempt_twice(request: kvstore_pb2.WatchLeasesRequest, context: object) -> AsyncGenerator[Any]:
    for lease_id in (1, 2):
        yield kvstore_pb2.WatchLeasesResponse(preempt=kvstore_pb2.LeasePreemption(lease_id=lease_id))


async def refuse_each(requests: AsyncIterator[kvstore_pb2.AdmitRequest], context: object) -> AsyncGenerator[Any]:
    async for request in requests:
        yield kvstore_pb2.AdmitResponse(refused=kvstore_pb2.RequestRefused(entry_id=request.withdraw))


@both
async def test_requests_and_responses_of_each_kind_are_messages(tmp_path: Path, public: PublicLimits | None) -> None:
    async with running(tmp_path, Servicer(echo, preempt_twice, refuse_each), public) as mesh:
        assert (await mesh.stub.AcquireLease(request("decode/m"))).lease.model == "decode/m"
        watched = await collect(mesh.stub.WatchLeases(kvstore_pb2.WatchLeasesRequest()))
        assert [message.preempt.lease_id for message in watched] == [1, 2]
        offers = [kvstore_pb2.AdmitRequest(withdraw=entry_id) for entry_id in (7, 8)]
        refused = await collect(mesh.stub.Admit(iter(offers)))
        assert [message.refused.entry_id for message in refused] == [7, 8]


ERRORS = [
    errors.LeaseLost("lease 3 has another owner"),
    errors.InvalidRequest("demand.num_tokens", "is 0; at least 1"),
    errors.Overloaded("the pool is full", retry_after_s=0.5),
    errors.WorkerLost("decode/m is not attached"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@both
async def test_an_error_reaches_the_client_of_each_kind_of_call(
    tmp_path: Path, error: errors.MeshError, public: PublicLimits | None
) -> None:
    async def unary(request: object, context: object) -> Any:
        raise error

    async def stream(request: object, context: object) -> AsyncGenerator[Any]:
        raise error
        yield

    async def both_ways(requests: AsyncIterator[Any], context: object) -> AsyncGenerator[Any]:
        await anext(requests)  # a client that is still writing when the call ends may report its own failure instead
        raise error
        yield

    async with running(tmp_path, Servicer(unary, stream, both_ways), public) as mesh:
        calls = [
            mesh.stub.AcquireLease(request()),
            collect(mesh.stub.WatchLeases(kvstore_pb2.WatchLeasesRequest())),
            collect(mesh.stub.Admit(iter([kvstore_pb2.AdmitRequest()]))),
        ]
        for call in calls:
            received = await mesh.error_of(call)
            assert type(received) is type(error)
            assert (str(received), vars(received)) == (str(error), vars(error))


@both
async def test_responses_before_an_error_are_delivered(tmp_path: Path, public: PublicLimits | None) -> None:
    async def stream(request: object, context: object) -> AsyncGenerator[Any]:
        yield kvstore_pb2.WatchLeasesResponse(preempt=kvstore_pb2.LeasePreemption(lease_id=5))
        raise errors.Unavailable("the unit stops")

    async with running(tmp_path, Servicer(stream=stream), public) as mesh:
        watch = mesh.stub.WatchLeases(kvstore_pb2.WatchLeasesRequest())
        assert (await watch.read()).preempt.lease_id == 5
        assert str(await mesh.error_of(watch.read())) == "the unit stops"


@both
async def test_any_other_exception_is_a_logged_internal_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, public: PublicLimits | None
) -> None:
    async def unary(request: object, context: object) -> Any:
        return dict[str, str]()["missing"]

    with caplog.at_level(logging.ERROR, "muxmesh.rpc.server"):
        async with running(tmp_path, Servicer(unary), public) as mesh:
            received = await mesh.error_of(mesh.stub.AcquireLease(request()))
    assert type(received) is errors.InternalError
    assert str(received) == "KeyError: 'missing'"
    (record,) = [record for record in caplog.records if record.name == "muxmesh.rpc.server"]
    assert record.exc_info is not None and record.exc_info[0] is KeyError


async def test_an_error_of_the_mesh_is_not_logged_as_a_bug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def unary(request: object, context: object) -> Any:
        raise errors.LeaseLost("x")

    async with running(tmp_path, Servicer(unary)) as mesh:
        await mesh.error_of(mesh.stub.AcquireLease(request()))
    assert [record for record in caplog.records if record.name == "muxmesh.rpc.server"] == []


@pytest.mark.parametrize(
    ("raw", "field"),
    [(b"\x12\x01\xff", "owner"), (b"\x12\x05a", "AcquireLeaseRequest")],
    ids=["not UTF-8", "truncated"],
)
@both
async def test_a_malformed_request_is_refused_before_the_servicer(
    tmp_path: Path, raw: bytes, field: str, public: PublicLimits | None
) -> None:
    async with running(tmp_path, public=public) as mesh:
        received = await mesh.error_of(mesh.send_raw("AcquireLease", raw))
    assert isinstance(received, errors.InvalidRequest)
    assert received.field == field


@both
async def test_a_malformed_request_of_a_stream_is_refused(tmp_path: Path, public: PublicLimits | None) -> None:
    async with running(tmp_path, Servicer(stream=preempt_twice, bidi=refuse_each), public) as mesh:
        watch: Any = mesh.channel.unary_stream(f"/{KVSTORE.full_name}/WatchLeases")
        assert str(await mesh.error_of(collect(watch(b"\x0a\x01\xff")))) == "owner: is not valid UTF-8"
        hello = b"\x0a\x03\x0a\x01\xff"
        admit: Any = mesh.channel.stream_stream(f"/{KVSTORE.full_name}/Admit")
        assert str(await mesh.error_of(collect(admit(iter([hello]))))) == "hello.router: is not valid UTF-8"


@pytest.mark.parametrize(
    ("method", "raw"),
    [
        ("grpc.health.v1.Health/Check", b"\x0a\x05a"),
        ("grpc.health.v1.Health/Watch", b"\x0a\x01\xff"),
        ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", b"\x0a\x05a"),
        ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x0a\x01\xff"),
    ],
)
async def test_a_malformed_request_of_health_and_reflection_is_refused(
    tmp_path: Path, method: str, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, public=LIMITS) as mesh:
        call: Any = mesh.channel.stream_stream(f"/{method}")
        received = await mesh.error_of(collect(call(iter([raw]))))
    assert isinstance(received, errors.InvalidRequest) and str(received).startswith("request: is malformed")
    assert [record for record in caplog.records if record.name == "muxmesh.rpc.server"] == []


@both
async def test_an_unknown_method_is_unimplemented(tmp_path: Path, public: PublicLimits | None) -> None:
    async with running(tmp_path, public=public) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.send_raw("Unknown", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("kind", ["stream", "bidi"])
@both
async def test_a_cancelled_call_closes_the_generator_of_the_servicer(
    tmp_path: Path, kind: str, public: PublicLimits | None
) -> None:
    is_closed = asyncio.Event()

    async def stream(request: object, context: object) -> AsyncGenerator[Any]:
        response = kvstore_pb2.WatchLeasesResponse if kind == "stream" else kvstore_pb2.AdmitResponse
        try:
            yield response()
            await asyncio.Event().wait()
        finally:
            is_closed.set()

    async with running(tmp_path, Servicer(stream=stream, bidi=stream), public) as mesh:
        watch = mesh.stub.WatchLeases(kvstore_pb2.WatchLeasesRequest()) if kind == "stream" else mesh.stub.Admit()
        await watch.read()
        watch.cancel()
        async with asyncio.timeout(20):
            await is_closed.wait()


@both
async def test_a_cancelled_unary_call_is_cancelled_in_the_servicer(tmp_path: Path, public: PublicLimits | None) -> None:
    has_started, is_cancelled = asyncio.Event(), asyncio.Event()

    async def unary(request: object, context: object) -> Any:
        has_started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            is_cancelled.set()
            raise

    async with running(tmp_path, Servicer(unary), public) as mesh:
        call = mesh.stub.AcquireLease(request())
        async with asyncio.timeout(20):
            await has_started.wait()
            call.cancel()
            await is_cancelled.wait()


async def test_health_is_serving_only_once_the_service_is_ready(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        for name in ("", KVSTORE.full_name):
            assert (await mesh.health.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
        await mesh.server.set_serving()
        for name in ("", KVSTORE.full_name):
            assert (await mesh.health.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING


@both
async def test_health_of_an_unknown_service_is_not_found(tmp_path: Path, public: PublicLimits | None) -> None:
    async with running(tmp_path, public=public) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.health.Check(health_pb2.HealthCheckRequest(service="muxmesh.v1.Unknown"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@both
async def test_watchers_of_the_health_see_the_start_and_the_stop(tmp_path: Path, public: PublicLimits | None) -> None:
    async with running(tmp_path, public=public) as mesh:
        watch = mesh.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        await mesh.server.set_serving()
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(mesh.server.stop(20))
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        await stopping


async def test_a_message_larger_than_the_default_of_grpc_passes_in_both_directions(tmp_path: Path) -> None:
    large = "x" * (5 * 1024 * 1024)
    async with running(tmp_path, Servicer(echo)) as mesh:
        assert (await mesh.stub.AcquireLease(request(large))).lease.model == large


async def test_a_message_above_the_limit_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, Servicer(echo)) as mesh:
        received = await mesh.error_of(mesh.send_raw("AcquireLease", bytes(MAX_MESSAGE_BYTES + 1)))
    assert str(received) == f"request: is {MAX_MESSAGE_BYTES + 1} bytes; at most {MAX_MESSAGE_BYTES}"


async def test_one_server_listens_on_several_addresses(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path / name}" for name in ("a.sock", "b.sock")]
    server = mesh_server(Servicer(echo), public=LIMITS)
    await server.start(addresses)
    for address in addresses:
        async with internal_channel(address) as channel:
            stub: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel)
            assert (await stub.AcquireLease(request(address))).lease.model == address
    await server.stop(0)


async def test_an_address_in_use_is_named() -> None:
    first, second = mesh_server(Servicer()), mesh_server(Servicer())
    address = free_listen_address("127.0.0.1:0")
    await first.start([address])
    with pytest.raises(errors.ConfigError, match=f"cannot listen on {address}: Address already in use; choose another"):
        await second.start([address])
    await first.stop(0)
    await second.stop(0)


async def test_a_socket_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    server, address = mesh_server(Servicer()), f"unix:{tmp_path / 'missing' / 'a.sock'}"
    with pytest.raises(errors.ConfigError, match=f"cannot listen on {address}"):
        await server.start([address])
    await server.stop(0)


@both
async def test_a_running_call_ends_within_the_grace_period(tmp_path: Path, public: PublicLimits | None) -> None:
    has_started, may_end = asyncio.Event(), asyncio.Event()

    async def unary(request: Any, context: object) -> Any:
        has_started.set()
        await may_end.wait()
        return lease_response("done")

    async with running(tmp_path, Servicer(unary), public) as mesh:
        call = asyncio.ensure_future(mesh.stub.AcquireLease(request()))
        await has_started.wait()
        await mesh.server.set_serving()
        watch = mesh.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(mesh.server.stop(60))
        assert (await asyncio.wait_for(watch.read(), 20)).status == NOT_SERVING
        watch.cancel()
        assert not call.done()
        may_end.set()
        assert (await call).lease.model == "done"
        await stopping


@both
async def test_a_call_that_runs_longer_than_the_grace_period_is_cancelled(
    tmp_path: Path, public: PublicLimits | None
) -> None:
    has_started = asyncio.Event()

    async def unary(request: object, context: object) -> Any:
        has_started.set()
        await asyncio.Event().wait()

    async with running(tmp_path, Servicer(unary), public) as mesh:
        call = asyncio.ensure_future(mesh.stub.AcquireLease(request()))
        await has_started.wait()
        await mesh.server.stop(0)
        assert isinstance(await mesh.error_of(call), errors.Unavailable | errors.RequestAborted)
