"""In-process stand-ins for the processes of a unit: a kvstore and a worker, on real gRPC servers over unix sockets.

`AdmitStream` and `PendingCall` are the test's ends of the calls: nothing is sent that the test does not send.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from muxmesh.errors import MeshError
from muxmesh.internal.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from muxmesh.rpc.server import MeshServer, Register


@asynccontextmanager
async def serving(socket: Path, services: dict[ServiceDescriptor, Register]) -> AsyncIterator[str]:
    """A server of the mesh on a unix socket; yields its address."""
    server = MeshServer(services)
    await server.start([f"unix:{socket}"])
    await server.set_serving()
    try:
        yield f"unix:{socket}"
    finally:
        await server.stop(0)


@dataclass
class AdmitStream:
    """The kvstore's end of one Admit call. `send` None ends the call."""

    received: asyncio.Queue[kvstore_pb2.AdmitRequest] = field(default_factory=asyncio.Queue)
    _responses: asyncio.Queue[kvstore_pb2.AdmitResponse | None] = field(default_factory=asyncio.Queue)

    async def next(self, kind: str) -> Any:
        """The next message of the router, which has to be of this kind."""
        async with asyncio.timeout(20):
            message = await self.received.get()
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    def send(self, **message: Any) -> None:
        self._responses.put_nowait(kvstore_pb2.AdmitResponse(**message))

    def end(self) -> None:
        self._responses.put_nowait(None)

    async def responses(self) -> AsyncIterator[kvstore_pb2.AdmitResponse]:
        while (response := await self._responses.get()) is not None:
            yield response

    async def read(self, requests: AsyncIterator[kvstore_pb2.AdmitRequest]) -> None:
        async for request in requests:
            self.received.put_nowait(request)


class FakeKvStore(kvstore_pb2_grpc.KvStoreServiceServicer):
    """A kvstore that sends its hello and admits nothing: the test responds to each Admit call by its `AdmitStream`."""

    AcquireLease = MoveLease = ReleaseLease = GrowLease = WatchLeases = cast(Any, None)
    SwapOut = FinishSwapOut = SwapIn = FinishSwapIn = cast(Any, None)

    def __init__(self) -> None:
        self.status: kvstore_pb2.GetUnitStatusResponse | MeshError = kvstore_pb2.GetUnitStatusResponse()
        self.fingerprints = {"m": "weights of m", "n": "weights of n"}
        self._streams: asyncio.Queue[AdmitStream] = asyncio.Queue()

    @property
    def services(self) -> dict[ServiceDescriptor, Register]:
        add = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, self)
        return {kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: add}

    async def stream(self) -> AdmitStream:
        """The next Admit call."""
        async with asyncio.timeout(20):
            return await self._streams.get()

    async def Admit(
        self, request_iterator: AsyncIterator[kvstore_pb2.AdmitRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[kvstore_pb2.AdmitResponse]:
        weights = (kvstore_pb2.ModelWeights(model=name, fingerprint=one) for name, one in self.fingerprints.items())
        yield kvstore_pb2.AdmitResponse(hello=kvstore_pb2.UnitHello(models=weights))
        stream = AdmitStream()
        self._streams.put_nowait(stream)
        reader = asyncio.create_task(stream.read(request_iterator))
        try:
            async for response in stream.responses():
                yield response
        finally:
            reader.cancel()

    async def GetUnitStatus(
        self, request: kvstore_pb2.GetUnitStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.GetUnitStatusResponse:
        if isinstance(self.status, MeshError):
            raise self.status
        return self.status


@dataclass
class PendingCall:
    """The worker's end of a Prefill or Decode call, which waits for the test's response."""

    request: Any
    _response: asyncio.Future[Any]
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def respond(self, response: Any) -> None:
        self._response.set_result(response)

    def fail(self, error: MeshError) -> None:
        self._response.set_exception(error)

    async def wait(self) -> Any:
        try:
            return await self._response
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class FakeWorker(prefill_pb2_grpc.PrefillServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """A prefill and a decode worker at one address. The test responds to every call, and sends every token."""

    def __init__(self) -> None:
        self.token_streams: dict[str, asyncio.Queue[list[decode_pb2.NewTokens] | MeshError | None]] = {}
        """By watcher. None ends the stream, an error fails it."""
        self.opens_streams = asyncio.Event()
        self.opens_streams.set()
        self._prefills: asyncio.Queue[PendingCall] = asyncio.Queue()
        self._decodes: asyncio.Queue[PendingCall] = asyncio.Queue()

    @property
    def services(self) -> dict[ServiceDescriptor, Register]:
        return {
            prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"]: functools.partial(
                prefill_pb2_grpc.add_PrefillServiceServicer_to_server, self
            ),
            decode_pb2.DESCRIPTOR.services_by_name["DecodeService"]: functools.partial(
                decode_pb2_grpc.add_DecodeServiceServicer_to_server, self
            ),
        }

    @property
    def num_pending_calls(self) -> int:
        return self._prefills.qsize() + self._decodes.qsize()

    async def calls(self) -> tuple[PendingCall, PendingCall]:
        """The next Prefill and the next Decode call."""
        async with asyncio.timeout(20):
            return await self._prefills.get(), await self._decodes.get()

    def send(self, watcher: str, *sequences: decode_pb2.NewTokens) -> None:
        """Sends the tokens of one step."""
        self.token_streams[watcher].put_nowait(list(sequences))

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> prefill_pb2.PrefillResponse:
        response: prefill_pb2.PrefillResponse = await self._pending(self._prefills, request)
        return response

    async def Decode(self, request: decode_pb2.DecodeRequest, context: Any) -> decode_pb2.DecodeResponse:
        response: decode_pb2.DecodeResponse = await self._pending(self._decodes, request)
        return response

    async def WatchTokens(
        self, request: decode_pb2.WatchTokensRequest, context: Any
    ) -> AsyncIterator[decode_pb2.WatchTokensResponse]:
        assert request.watcher not in self.token_streams, "a watcher's name is used twice"
        tokens = self.token_streams[request.watcher] = asyncio.Queue()
        await self.opens_streams.wait()
        await context.send_initial_metadata(())
        while (sent := await tokens.get()) is not None:
            if isinstance(sent, MeshError):
                raise sent
            yield decode_pb2.WatchTokensResponse(sequences=sent)

    @staticmethod
    async def _pending(calls: asyncio.Queue[PendingCall], request: Any) -> Any:
        call = PendingCall(request, asyncio.get_running_loop().create_future())
        calls.put_nowait(call)
        return await call.wait()
