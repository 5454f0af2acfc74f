"""A small unit with three models of different shapes, alone or with its attach socket and its gRPC service."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from kvstore.attach_server import AttachServer
from kvstore.device_memory import HostMemory, new_memfd
from kvstore.fence import HostFence
from kvstore.grant_table import GrantTable
from kvstore.service import KvStoreService
from kvstore.unit import AdmissionDecisions, Unit, UnitModel
from muxmesh.clock import ManualClock
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.models.model_spec import KvShape
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, QueuedRequest, Role, SchedulingState
from worker.attachment import Attachment, attach

SHAPES = {
    "a": KvShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=8, dtype_bytes=4),
    "b": KvShape(num_layers=3, num_kv_heads=2, head_dim=32, block_size=16, dtype_bytes=4),
    "c": KvShape(num_layers=1, num_kv_heads=4, head_dim=64, block_size=16, dtype_bytes=4),
}
SLAB_BYTES = 64 * 1024


def make_unit(num_slabs: int = 4, max_num_seqs: int = 3, swap_bytes: int = 0) -> Unit:
    return Unit(
        num_slabs * SLAB_BYTES,
        SLAB_BYTES,
        {name: UnitModel(shape, max_num_seqs, 512) for name, shape in SHAPES.items()},
        swap_bytes=swap_bytes,
    )


def slab_tokens(unit: Unit, model: str) -> int:
    """Tokens of one sequence that fill a slab."""
    return unit.pool.blocks_per_slab(model) * SHAPES[model].block_size


def attach_ready(unit: Unit, model: str) -> tuple[str, str]:
    """Names of a new prefill and a new decode worker, both ready."""
    names = []
    for role in (Role.PREFILL, Role.DECODE):
        worker = unit.attach(role, model, f"unix:{role}", 1)
        worker.ready = True
        names.append(worker.name)
    return names[0], names[1]


def queued(
    entry_id: int,
    model: str = "a",
    num_tokens: int = 8,
    priority: int = 0,
    arrived_at_s: float = 0.0,
    hashes: tuple[bytes, ...] = (),
    max_cached_tokens: int = 0,
) -> QueuedRequest:
    demand = KvDemand(num_tokens, num_tokens, hashes, max_cached_tokens)
    return QueuedRequest(entry_id, model, SchedulingState(priority, arrived_at_s), demand)


def schedule(unit: Unit, now_s: float = 0.0) -> AdmissionDecisions:
    return unit.schedule(now_s, now_s)


def admitted_ids(unit: Unit, now_s: float = 0.0) -> list[int]:
    """Schedules; entry ids of the requests that got a credit."""
    return [issued.entry_id for issued in schedule(unit, now_s).credits]


def decoding(
    unit: Unit, entry_id: int, num_tokens: int, model: str = "a", arrived_at_s: float = 0.0
) -> tuple[Lease, str]:
    """A resident lease after its hand-off, and the decode worker that owns it."""
    prefill, decode = (unit.ready_workers(role, model)[0] for role in Role)
    unit.offer("router", queued(entry_id, model, num_tokens, arrived_at_s=arrived_at_s))
    (issued,) = schedule(unit).credits
    acquired = unit.acquire(issued.lease.ref, prefill.name)
    return unit.move(acquired.ref, prefill.name, decode.name, num_tokens - 1, (1,)), decode.name


@dataclass
class ServedUnit:
    """A unit in this process whose attach socket and gRPC service listen. Its clock stands still."""

    unit: Unit
    attach_path: Path
    grants: GrantTable
    attach_server: AttachServer
    service: KvStoreService
    channel: grpc.aio.Channel
    clock: ManualClock
    changes: asyncio.Event
    attachments: list[Attachment] = field(default_factory=list)

    @property
    def stub(self) -> kvstore_pb2_grpc.KvStoreServiceAsyncStub:
        return kvstore_pb2_grpc.KvStoreServiceStub(self.channel)

    async def until_ready(self, worker: str) -> None:
        while not self.unit.workers[worker].ready:
            self.changes.clear()
            await self.changes.wait()

    async def attach_ready(self, model: str) -> tuple[Attachment, Attachment]:
        """A prefill and a decode worker in this process, both ready; closed with the unit."""
        attached = []
        for role in (Role.PREFILL, Role.DECODE):
            attachment = await attach(self.attach_path, role, model, f"unix:{role}")
            self.attachments.append(attachment)
            attachment.set_ready(True)
            await self.until_ready(attachment.worker)
            attached.append(attachment)
        return attached[0], attached[1]


@asynccontextmanager
async def served(
    folder: Path, unit: Unit, trace: bool = False, segment_bytes: int | None = None
) -> AsyncIterator[ServedUnit]:
    """Serves ``unit`` on sockets in ``folder``. Heartbeats are not checked."""
    clock, grants = ManualClock(), GrantTable()
    memory = HostMemory(unit.pool.num_slabs * SLAB_BYTES, segment_bytes)
    swap_fd = new_memfd("swap", unit.swap.num_pages * SWAP_PAGE_BYTES) if unit.swap.num_pages else None
    config = UnitConfig(name="unit7", models=tuple(ModelConfig(name=name) for name in unit.models))
    service = KvStoreService(config, unit, grants, clock, trace)
    attach_path, address = folder / "attach.sock", f"unix:{folder}/kv.sock"
    changes = asyncio.Event()

    def changed() -> None:
        service.changed()
        changes.set()

    attach_server = AttachServer(attach_path, unit, memory, swap_fd, grants, HostFence(), changed, check_every_s=3600)
    service.attach = attach_server
    register = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, service)
    server = MeshServer({kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: register})
    await server.start([address])
    attach_server.start()
    channel = internal_channel(address)
    running = ServedUnit(unit, attach_path, grants, attach_server, service, channel, clock, changes)
    try:
        yield running
    finally:
        await channel.close()
        attach_server.close()
        for attachment in running.attachments:
            attachment.close()
        await server.stop(grace_s=0.0)
        grants.close()
        memory.close()
        if swap_fd is not None:
            os.close(swap_fd)
