"""A unit in this process: its state, its gRPC service and its attach socket, a router's stream, and attached workers.

Everything is real but the exits of processes: the workers live in this process too, so a fence over pipes stands in.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from kvstore.attach_server import AttachServer
from kvstore.device_memory import HostMemory, new_memfd
from kvstore.grant_table import GrantTable
from kvstore.service import KvStoreService
from kvstore.unit import Unit, UnitModel
from muxmesh.block_hashes import KvIdentity
from muxmesh.clock import Clock, SystemClock
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.engine.api import Engine
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, LeaseRef, QueuedRequest, Role, SchedulingState
from worker.attachment import Attachment, attach
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient
from worker.worker_process import WorkerContext

IDENTITY = KvIdentity("weights", "float32", "float32", "layout", "rope")
CONFIG = ModelConfig(name="m", engine="sim", block_size=8)
SHAPE = SIM_SPEC.kv_shape(CONFIG.block_size, CONFIG.dtype)
SLAB_BYTES = 8 * SHAPE.token_block_bytes
SLAB_TOKENS = 8 * SHAPE.block_size


class PipeFence:
    """`Fence` of workers in this process: `kill` makes the watch fd readable, as an exit would."""

    def __init__(self) -> None:
        self._write_fds: dict[int, int] = {}

    def watch(self, pid: int) -> int:
        watch_fd, write_fd = os.pipe()
        self._write_fds[watch_fd] = write_fd
        return watch_fd

    def kill(self, watch_fd: int) -> None:
        os.close(self._write_fds.pop(watch_fd))

    def close(self) -> None:
        for fd in self._write_fds.values():
            os.close(fd)


class RouterStream:
    """The router's end of an Admit stream."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._num_offers = 0

    async def offer(self, demand: KvDemand, model: str = "m") -> int:
        """Queues a request, in the order of the calls. Returns its entry id."""
        self._num_offers += 1
        entry_id = self._num_offers
        request = QueuedRequest(entry_id, model, SchedulingState(0, float(entry_id)), demand)
        await self._call.write(kvstore_pb2.AdmitRequest(offer=convert.queued_to_wire(request)))
        return entry_id

    async def next_credit(self) -> kvstore_pb2.Credit:
        async with asyncio.timeout(20):
            while (response := await self._call.read()).WhichOneof("message") != "credit":
                assert not response.HasField("refused"), response
        credit: kvstore_pb2.Credit = response.credit
        return credit


class RunningUnit:
    """A unit that serves, with one router. ``state`` and ``service`` are the unit's own objects."""

    def __init__(
        self,
        state: Unit,
        service: KvStoreService,
        server: MeshServer,
        channel: Any,
        router: RouterStream,
        attach_path: Path,
        address: str,
        attachments: list[Attachment],
    ) -> None:
        """``attachments``: closed with the unit."""
        self.state, self.service, self.router = state, service, router
        self.server, self.channel = server, channel
        self.attach_path, self.address = attach_path, address
        self.attachments = attachments
        self.given_up: list[str] = []

    async def attach(self, role: Role, model: str = "m") -> Attachment:
        """Attaches a worker that is ready."""
        attachment = await attach(self.attach_path, role, model, f"unix:{role.value}")
        self.attachments.append(attachment)
        attachment.set_ready(True)
        await self.until(lambda: self.state.workers[attachment.worker].ready)
        return attachment

    def lease_client(self, attachment: Attachment) -> LeaseClient:
        return LeaseClient(self.channel, attachment.worker)

    def context(
        self, attachment: Attachment, engine: Engine, leases: LeaseClient, swapper: KvSwapper | None = None
    ) -> WorkerContext:
        """The parts of a worker of model ``m``. Why it gives up is in `given_up`."""
        return WorkerContext(engine, leases, attachment.progress, CONFIG, IDENTITY, swapper, self.given_up.append)

    async def credit(self, demand: KvDemand, model: str = "m") -> LeaseRef:
        """A credit that no worker has acquired."""
        await self.router.offer(demand, model)
        return convert.ref_from_wire((await self.router.next_credit()).lease)

    async def hand_off(
        self, prefill: LeaseClient, to: str, demand: KvDemand, num_computed: int, sampled: Sequence[int] = ()
    ) -> Lease:
        """Takes a request through prefill, without computing it. Returns the lease that ``to`` has then."""
        lease = await prefill.acquire(await self.credit(demand))
        await prefill.move(lease.ref, to, num_computed, tuple(sampled))
        return next(held for held in self.state.leases.of_owner(to) if held.ref.lease_id == lease.ref.lease_id)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Runs the event loop until ``condition()`` is true."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)

    @property
    def num_in_use(self) -> int:
        """Token blocks of model ``m`` that leases have."""
        return self.state.blocks.num_in_use("m")

    def is_empty(self) -> bool:
        """True if no lease has anything, and the whole swap region is free."""
        return len(self.state.leases) == 0 and self.state.swap.num_free_pages == self.state.swap.num_pages


@asynccontextmanager
async def running_unit(
    directory: Path,
    num_slabs: int = 1,
    num_swap_pages: int = 0,
    models: Sequence[str] = ("m",),
    clock: Clock | None = None,
    address: str = "",
    attach_path: Path | None = None,
) -> AsyncIterator[RunningUnit]:
    """Serves a unit until the context ends, then proves its integrity. A slab holds `SLAB_TOKENS` tokens."""
    address, attach_path = address or f"unix:{directory}/k.sock", attach_path or directory / "a.sock"
    swap_bytes = num_swap_pages * SWAP_PAGE_BYTES
    served = {name: UnitModel(SHAPE, max_num_seqs=8, max_model_len=SIM_SPEC.context_len) for name in models}
    unit = Unit(num_slabs * SLAB_BYTES, SLAB_BYTES, served, swap_bytes=swap_bytes)
    memory, grants, fence = HostMemory(num_slabs * SLAB_BYTES), GrantTable(), PipeFence()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        for close in (memory.close, grants.close, fence.close):
            stack.callback(close)
        swap_fd = new_memfd("swap", swap_bytes) if num_swap_pages else None
        if swap_fd is not None:
            stack.callback(os.close, swap_fd)
        config = UnitConfig(models=tuple(ModelConfig(name=name) for name in models))
        service = KvStoreService(config, unit, grants, clock or SystemClock())
        register = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, service)
        server = MeshServer({kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: register})
        await server.start([address])
        stack.push_async_callback(server.stop, 0)
        attachments: list[Attachment] = []
        stack.callback(_close_all, attachments)
        attach_server = service.attach = AttachServer(
            attach_path, unit, memory, swap_fd, grants, fence, service.changed, check_every_s=600
        )
        attach_server.start()
        stack.callback(attach_server.close)
        loop.add_reader(grants.doorbell_fd, grants.on_doorbell)
        stack.callback(loop.remove_reader, grants.doorbell_fd)
        channel = await stack.enter_async_context(internal_channel(address))
        call = kvstore_pb2_grpc.KvStoreServiceStub(channel).Admit()
        stack.callback(call.cancel)
        await call.write(kvstore_pb2.AdmitRequest(hello=kvstore_pb2.RouterHello(router="r")))
        yield RunningUnit(unit, service, server, channel, RouterStream(call), attach_path, address, attachments)
        unit.check_integrity()


def _close_all(attachments: Sequence[Attachment]) -> None:
    loop = asyncio.get_running_loop()
    for attachment in attachments:
        attachment.close()
        for fd in (attachment.doorbell_fd, attachment.bell_fd):
            loop.remove_reader(fd)
            os.close(fd)
