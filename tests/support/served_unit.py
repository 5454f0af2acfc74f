"""A unit in this process: its state, its gRPC service, its attach socket and the workers and routers of a test.

Everything is real but the exits of processes: the workers live in this process too, so a fence over pipes stands in.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from kvstore.attach_server import AttachServer
from kvstore.device_memory import DeviceMemory, HostMemory, new_memfd
from kvstore.grant_table import GrantTable
from kvstore.model_service import ModelService, PlacedModel, PlacedModels
from kvstore.service import KvStoreService
from kvstore.unit import Unit
from kvstore.unit_model import UnitModel
from muxmesh.block_hashes import KvIdentity
from muxmesh.clock import Clock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, QueuedRequest, Role, SchedulingState
from tests.kvstore.small_unit import SHAPES
from worker.attachment import Attachment, attach

FINGERPRINTS = {"a": "weights of a", "b": "weights of b"}
LONGEST_WAIT_S = 15.0
"""Less than `CREDIT_TTL_S`, after which a timer of the unit schedules again."""


def read_model(name: str) -> PlacedModel:
    """A model that a unit may get, of the shape of `a` in `small_unit`."""
    identity = KvIdentity(f"weights of {name}", "float32", "float32", "layout", "rope")
    return PlacedModel(ModelConfig(name=name), UnitModel(SHAPES["a"], 3, 512), identity)


class PipeFence:
    """`Fence` of workers in this process: `kill` makes the watch fd readable, as an exit would."""

    def __init__(self) -> None:
        self._write_fds: dict[int, int] = {}

    def watch(self, pid: int) -> int:
        watch_fd, write_fd = os.pipe()
        self._write_fds[watch_fd] = write_fd
        return watch_fd

    def expect_exit(self) -> None:
        pass

    def kill(self, watch_fd: int) -> None:
        os.close(self._write_fds.pop(watch_fd))

    def close(self) -> None:
        for fd in self._write_fds.values():
            os.close(fd)


class RouterStream:
    """An Admit stream, as a router holds it."""

    def __init__(
        self, stub: kvstore_pb2_grpc.KvStoreServiceAsyncStub, router: str = "r", says_hello: bool = True
    ) -> None:
        self._outbox: asyncio.Queue[kvstore_pb2.AdmitRequest | None] = asyncio.Queue()
        if says_hello:
            self.send(hello=kvstore_pb2.RouterHello(router=router))
        self._call: Any = stub.Admit(self._messages())
        self.unit_hello: kvstore_pb2.UnitHello | None = None
        """The first message, once one after it has been read."""

    async def _messages(self) -> AsyncIterator[kvstore_pb2.AdmitRequest]:
        while (message := await self._outbox.get()) is not None:
            yield message

    def send(self, **message: Any) -> None:
        self._outbox.put_nowait(kvstore_pb2.AdmitRequest(**message))

    def offer(self, request: QueuedRequest, sent_at_unix_s: float = 0.0) -> None:
        self.send(offer=convert.queued_to_wire(request), sent_at_unix_s=sent_at_unix_s)

    async def next_message(self) -> kvstore_pb2.AdmitResponse:
        """The next message after the unit's hello. Raises the error by which the stream ended; EOFError at its regular
        end.
        """
        try:
            response = await asyncio.wait_for(self._call.read(), LONGEST_WAIT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if response is grpc.aio.EOF:
            raise EOFError
        assert isinstance(response, kvstore_pb2.AdmitResponse)
        if self.unit_hello is None:
            self.unit_hello = response.hello
            return await self.next_message()
        return response

    async def next(self) -> kvstore_pb2.AdmitResponse:
        """The next message that is not of step costs or loads."""
        while (response := await self.next_message()).WhichOneof("message") in {"costs", "loads"}:
            pass
        return response

    async def loads(self) -> kvstore_pb2.UnitLoads:
        """The next loads. Messages before them are dropped."""
        while (response := await self.next_message()).WhichOneof("message") != "loads":
            pass
        return response.loads

    async def credit(self) -> kvstore_pb2.Credit:
        response = await self.next()
        assert response.WhichOneof("message") == "credit", response
        return response.credit

    async def refused(self) -> tuple[int, str, str]:
        response = await self.next()
        assert response.WhichOneof("message") == "refused", response
        return response.refused.entry_id, response.refused.field, response.refused.problem

    async def no_credit(self) -> None:
        """All earlier messages are applied, and no credit was issued to this router since the last one."""
        self.offer(QueuedRequest(999, "unknown", SchedulingState(0, 0.0), KvDemand(8, 8)))
        assert (await self.refused())[0] == 999

    def half_close(self) -> None:
        self._outbox.put_nowait(None)

    def cancel(self) -> None:
        self._call.cancel()


@dataclass
class ServedUnit:
    """A unit whose attach socket and gRPC service listen. ``unit`` and ``service`` are its own objects."""

    unit: Unit
    address: str
    attach_path: Path
    service: KvStoreService
    server: MeshServer
    channel: grpc.aio.Channel
    changed: asyncio.Event
    placed: PlacedModels
    attachments: list[Attachment] = field(default_factory=list)
    """Closed with the unit."""

    @property
    def stub(self) -> kvstore_pb2_grpc.KvStoreServiceAsyncStub:
        return kvstore_pb2_grpc.KvStoreServiceStub(self.channel)

    def router(self, name: str = "r", says_hello: bool = True) -> RouterStream:
        return RouterStream(self.stub, name, says_hello)

    async def until_ready(self, worker: str) -> None:
        async with asyncio.timeout(LONGEST_WAIT_S):
            while not self.unit.workers[worker].ready:
                self.changed.clear()
                await self.changed.wait()

    async def attach(self, role: Role, model: str) -> Attachment:
        """Attaches a worker in this process, which is ready."""
        attachment = await attach(self.attach_path, role, model, f"unix:{role.value}")
        self.attachments.append(attachment)
        attachment.set_ready(True)
        await self.until_ready(attachment.worker)
        return attachment

    async def attach_ready(self, model: str) -> tuple[Attachment, Attachment]:
        """A prefill and a decode worker, both ready."""
        return await self.attach(Role.PREFILL, model), await self.attach(Role.DECODE, model)


@asynccontextmanager
async def served(
    directory: Path,
    unit: Unit,
    clock: Clock,
    trace: bool = False,
    segment_bytes: int | None = None,
    address: str = "",
    attach_path: Path | None = None,
    memory: DeviceMemory | None = None,
) -> AsyncIterator[ServedUnit]:
    """Serves ``unit`` on sockets in ``directory`` until the context ends. Heartbeats are not checked.

    ``memory`` is host memory unless given. Closes it.
    """
    address, attach_path = address or f"unix:{directory}/k.sock", attach_path or directory / "a.sock"
    memory = memory or HostMemory(unit.pool.num_slabs * unit.slab_bytes, segment_bytes)
    grants, fence, loop, changed = GrantTable(), PipeFence(), asyncio.get_running_loop(), asyncio.Event()
    async with AsyncExitStack() as stack:
        for close in (memory.close, grants.close, fence.close):
            stack.callback(close)
        swap_fd = new_memfd("swap", unit.swap.num_pages * SWAP_PAGE_BYTES) if unit.swap.num_pages else None
        if swap_fd is not None:
            stack.callback(os.close, swap_fd)
        config = UnitConfig(name="unit7", models=tuple(ModelConfig(name=name) for name in unit.models))
        placed = PlacedModels({})
        placed.fingerprints.update(FINGERPRINTS)
        service = KvStoreService(config, unit, grants, clock, placed.fingerprints, trace)
        models = ModelService(config, unit, clock, service, read_model, placed)
        by_name, add = kvstore_pb2.DESCRIPTOR.services_by_name, kvstore_pb2_grpc
        server = MeshServer(
            {
                by_name["KvStoreService"]: functools.partial(add.add_KvStoreServiceServicer_to_server, service),
                by_name["UnitModelService"]: functools.partial(add.add_UnitModelServiceServicer_to_server, models),
            }
        )
        await server.start([address])
        stack.push_async_callback(server.stop, 0)
        attachments: list[Attachment] = []
        stack.callback(_close_all, attachments)

        def on_change() -> None:
            service.changed()
            changed.set()

        attach_server = service.attach = AttachServer(
            attach_path, unit, memory, swap_fd, grants, fence, on_change, check_every_s=3600
        )
        attach_server.start()
        stack.callback(attach_server.close)
        loop.add_reader(grants.doorbell_fd, grants.on_doorbell)
        stack.callback(loop.remove_reader, grants.doorbell_fd)
        channel = await stack.enter_async_context(internal_channel(address))
        yield ServedUnit(unit, address, attach_path, service, server, channel, changed, placed, attachments)


def _close_all(attachments: Sequence[Attachment]) -> None:
    loop = asyncio.get_running_loop()
    for attachment in attachments:
        attachment.close()
        for fd in (attachment.doorbell_fd, attachment.bell_fd):
            loop.remove_reader(fd)
            os.close(fd)
