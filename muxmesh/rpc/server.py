"""The gRPC server of every service: health, reflection, keepalive, and the conversion of errors to status.

Knows the descriptors of services, not what they do.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from muxmesh.errors import ConfigError, InternalError, InvalidRequest, MeshError, RequestAborted
from muxmesh.rpc.bindable_port import bindable_port
from muxmesh.rpc.client_limits import CallLimiter, PublicLimits, RequestReader
from muxmesh.rpc.limits import MAX_MESSAGE_BYTES, keepalive_options
from muxmesh.rpc.message_parser import check_num_fields, parse
from muxmesh.rpc.reflection import add_reflection
from muxmesh.rpc.status_codes import to_status

_log = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

_CANCEL_S = 5.0
_KEEPALIVE_TIME_S = 15.0
_KEEPALIVE_TIMEOUT_S = 5.0

Register = Callable[[grpc.aio.Server], None]
Context = grpc.aio.ServicerContext[Any, Any]


Identify = Callable[[Iterable[tuple[str, str | bytes]]], None]
"""Called with the metadata of a call before its request is read, in the task that serves it. Raises MeshError."""


def _ignore(not_serving: str) -> None:
    pass


def _admit(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    pass


class MeshServer:
    """A server whose health is NOT_SERVING until `set_serving`."""

    def __init__(
        self,
        services: Mapping[ServiceDescriptor, Register],
        public: PublicLimits | None = None,
        is_on_network: bool = False,
        on_health: Callable[[str], None] = _ignore,
        identify: Identify = _admit,
        shares_port: bool = False,
    ) -> None:
        """``services`` maps a descriptor to the function that adds its servicer to a server.

        ``public``: the limits on clients. None: all clients are processes of the mesh. ``is_on_network``: these may be
        on other hosts, whose loss is noticed by pings. ``on_health`` is called when the health has changed, with the
        reason for NOT_SERVING or an empty string. ``identify``: who calls a public server; health and reflection are
        for everyone. ``shares_port``: whether other processes of this user may listen on the same port.
        """
        self._on_health = on_health
        options, interceptor = dict(_OPTIONS), _ErrorInterceptor(services)
        if is_on_network:
            options |= keepalive_options(_KEEPALIVE_TIME_S, _KEEPALIVE_TIMEOUT_S)
        if shares_port:
            options["grpc.so_reuseport"] = 1
        if public is not None:
            options |= public.server_options()
            interceptor = _PublicInterceptor(services, public, identify)
        self._server = grpc.aio.server(options=tuple(options.items()), interceptors=[interceptor])
        self._names = ["", *(descriptor.full_name for descriptor in services)]
        self._health = health.aio.HealthServicer()
        for register in services.values():
            register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        add_reflection([*self._names[1:], health_name], self._server)

    async def start(
        self, addresses: Iterable[str], credentials: Mapping[str, grpc.ServerCredentials] = MappingProxyType({})
    ) -> None:
        """Listens on all addresses (HOST:PORT or unix:PATH). Raises ConfigError if one is in use or invalid.

        ``credentials``: for the addresses that serve TLS. The others serve plain text.
        """
        for address in addresses:
            try:
                if address in credentials:
                    self._server.add_secure_port(address, credentials[address])
                else:
                    self._server.add_insecure_port(address)
            except RuntimeError as error:
                if not address.startswith("unix:"):
                    bindable_port(address)  # raises the reason, which gRPC does not name
                raise ConfigError(f"cannot listen on {address}: {error}") from error
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def set_serving(self) -> None:
        """Sets the health of the server and of each service to SERVING."""
        await self._set(health_pb2.HealthCheckResponse.SERVING)
        self._on_health("")

    async def stop(self, grace_s: float) -> None:
        """Rejects new calls, waits up to ``grace_s`` for running ones, then cancels them.

        A call that arrives at the moment of the stop ends with CANCELLED, later ones with UNAVAILABLE: gRPC cancels
        what it has received and not yet passed on.
        """
        self._on_health("stopping")
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace_s)

    async def _set(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in self._names:
            await self._health.set(name, status)


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Parses the requests of the server's own services, and converts exceptions to status.

    It catches every Exception; no other RPC code does.
    """

    def __init__(self, services: Iterable[ServiceDescriptor]) -> None:
        self._inputs: dict[str, type[Message]] = {
            f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
            for service in services
            for method in service.methods
        }
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        method = details.method
        if method not in self._handlers:
            handler = await continuation(details)
            if handler is None:
                return None
            self._handlers[method] = self._intercepted(method, handler)
        return self._handlers[method]

    def _intercepted(self, method: str, handler: Any) -> Any:
        """The handler that gRPC calls instead of ``handler``."""
        kind = self._inputs.get(method)
        if kind is None:
            return handler
        serializer = handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, kind), None, serializer)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, kind), None, serializer)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(_bidi(handler.stream_stream, kind), None, serializer)
        raise NotImplementedError(f"{method} is client-streaming; no RPC of the mesh is")


class _PublicInterceptor(_ErrorInterceptor):
    """Holds clients to their limits, and does what `_ErrorInterceptor` does.

    Every method becomes one that reads its request itself: a call is counted, and refused, before anything of its
    message is in memory. On the wire there is no difference.
    """

    def __init__(self, services: Iterable[ServiceDescriptor], limits: PublicLimits, identify: Identify) -> None:
        super().__init__(services)
        self._identify = identify
        self._limits = limits
        self._calls = CallLimiter(limits.max_calls, limits.exempt)
        self._reader = RequestReader(limits)

    def _intercepted(self, method: str, handler: Any) -> Any:
        kind = self._inputs.get(method)
        parsed: Callable[[bytes], Any] = (
            functools.partial(_parse, kind) if kind else functools.partial(_deserialize, handler.request_deserializer)
        )

        async def call(_: object, context: Context) -> None:
            try:
                with self._calls.counted(context.peer()):
                    if kind is not None:
                        self._identify(context.invocation_metadata() or ())
                    await self._serve(handler, parsed, context)
            except grpc.aio.AbortError:  # the servicer has set the status
                raise
            except grpc.aio.InternalError:
                # The client has gone in the middle of a message. gRPC cancels the call in a moment; it would log a
                # traceback if the call ended before.
                await asyncio.sleep(_CANCEL_S)
                raise
            except Exception as error:
                await _abort(context, error)

        return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)

    async def _serve(self, handler: Any, parsed: Callable[[bytes], Any], context: Context) -> None:
        if handler.request_streaming:
            responses = handler.stream_stream(self._requests(parsed, context), context)
        else:
            raw = await self._reader.read(context)
            if raw is None:
                raise InvalidRequest("request", "has no message")
            behavior = handler.unary_unary or handler.unary_stream
            responses = behavior(parsed(raw), context)
            del raw
        if handler.response_streaming and isinstance(responses, AsyncGenerator):
            await self._send(responses, context)
        elif (response := await responses) is not None:  # a stream may write to its context and return nothing
            await context.write(response)

    async def _requests(self, parsed: Callable[[bytes], Any], context: Context) -> AsyncGenerator[Any]:
        while (raw := await self._reader.read(context)) is not None:
            yield parsed(raw)

    async def _send(self, responses: AsyncGenerator[Message], context: Context) -> None:
        """Sends all responses. If the client does not read one in time, ``responses`` is closed.

        The status, RequestAborted, follows when the client reads again: gRPC sends nothing before what is pending.
        Until then, or until the connection ends, the call counts as one of its client.
        """
        loop, limit_s = asyncio.get_running_loop(), self._limits.slow_client_s
        timer: asyncio.TimerHandle
        writing_since_s: float | None = None
        closing: asyncio.Task[None] | None = None

        def check() -> None:
            nonlocal closing, timer
            now_s = loop.time()
            limit_at_s = (now_s if writing_since_s is None else writing_since_s) + limit_s
            if limit_at_s <= now_s:
                closing = loop.create_task(_close(responses))
            else:
                timer = loop.call_at(limit_at_s, check)

        timer = loop.call_later(limit_s, check)  # one for all responses: a timer for each costs more
        try:
            async for response in responses:
                writing_since_s = loop.time()
                await context.write(response)
                writing_since_s = None
                if closing is not None:
                    raise RequestAborted(f"the client has read nothing for {limit_s:g} s")
        finally:
            timer.cancel()
            await (closing or responses.aclose())


def _parse(kind: type[Message], raw: bytes) -> Message:
    check_num_fields(kind, raw)
    return parse(kind, raw)


def _deserialize(deserializer: Callable[[bytes], Any], raw: bytes) -> Any:
    """A request of a service that is not the mesh's own, such as health. Raises InvalidRequest."""
    try:
        return deserializer(raw)
    except DecodeError as error:
        raise InvalidRequest("request", f"is malformed: {error}") from error


async def _close(responses: AsyncGenerator[Message]) -> None:
    await responses.aclose()


def _unary(inner: Callable[[Any, Context], Awaitable[Message]], kind: type[Message]) -> Any:
    async def call(raw: bytes, context: Context) -> Message:
        try:
            return await inner(parse(kind, raw), context)
        except Exception as error:
            await _abort(context, error)

    return call


def _stream(inner: Callable[[Any, Context], AsyncGenerator[Message]], kind: type[Message]) -> Any:
    async def call(raw: bytes, context: Context) -> AsyncIterator[Message]:
        try:
            async with aclosing(inner(parse(kind, raw), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(context, error)

    return call


def _bidi(inner: Callable[[AsyncIterator[Any], Context], AsyncGenerator[Message]], kind: type[Message]) -> Any:
    async def parsed(raws: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for raw in raws:
            yield parse(kind, raw)

    async def call(raws: AsyncIterator[bytes], context: Context) -> AsyncIterator[Message]:
        try:
            async with aclosing(inner(parsed(raws), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(context, error)

    return call


async def _abort(context: Context, error: Exception) -> NoReturn:
    if not isinstance(error, MeshError):
        _log.exception("bug: an RPC failed", exc_info=error)
        error = InternalError(f"{type(error).__name__}: {error}")
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
