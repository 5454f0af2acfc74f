"""A unit in this process with one router, for the tests of workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from kvstore.unit import Unit
from kvstore.unit_model import UnitModel
from muxmesh.block_hashes import KvIdentity
from muxmesh.clock import Clock, SystemClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.engine.api import Engine
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.rpc import convert
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, LeaseRef, QueuedRequest, Role, SchedulingState
from tests.support.served_unit import ServedUnit, served
from worker.attachment import Attachment
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient
from worker.worker_metrics import WorkerCounters
from worker.worker_process import WorkerContext

IDENTITY = KvIdentity("weights", "float32", "float32", "layout", "rope")
CONFIG = ModelConfig(name="m", engine="sim", block_size=8)
SHAPE = SIM_SPEC.kv_shape(CONFIG.block_size, CONFIG.dtype)
SLAB_BYTES = 8 * SHAPE.token_block_bytes
SLAB_TOKENS = 8 * SHAPE.block_size


class RunningUnit:
    """A unit that serves, with one router. ``state`` and ``service`` are the unit's own objects."""

    def __init__(self, served_unit: ServedUnit) -> None:
        self._served = served_unit
        self.state, self.service = served_unit.unit, served_unit.service
        self.server, self.channel = served_unit.server, served_unit.channel
        self.attach_path, self.address = served_unit.attach_path, served_unit.address
        self.attachments = served_unit.attachments
        self.router = served_unit.router()
        self.given_up: list[str] = []
        self.counters = WorkerCounters()
        self._num_offers = 0

    async def attach(self, role: Role, model: str = "m") -> Attachment:
        """Attaches a worker that is ready."""
        return await self._served.attach(role, model)

    def lease_client(self, attachment: Attachment) -> LeaseClient:
        return LeaseClient(self.channel, attachment.worker)

    def context(
        self, attachment: Attachment, engine: Engine, leases: LeaseClient, swapper: KvSwapper | None = None
    ) -> WorkerContext:
        """The parts of a worker of model ``m``. Why it gives up is in `given_up`."""
        return WorkerContext(
            engine,
            leases,
            attachment.progress,
            CONFIG,
            IDENTITY,
            swapper,
            SystemClock(),
            self.counters,
            self.given_up.append,
        )

    def offer(self, demand: KvDemand, model: str = "m") -> None:
        """Queues a request, in the order of the calls."""
        self._num_offers += 1
        scheduling = SchedulingState(0, float(self._num_offers))
        self.router.offer(QueuedRequest(self._num_offers, model, scheduling, demand))

    async def next_credit(self) -> LeaseRef:
        return convert.ref_from_wire((await self.router.credit()).lease)

    async def credit(self, demand: KvDemand, model: str = "m") -> LeaseRef:
        """A credit that no worker has acquired."""
        self.offer(demand, model)
        return await self.next_credit()

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
    shapes = {name: UnitModel(SHAPE, max_num_seqs=8, max_model_len=SIM_SPEC.context_len) for name in models}
    unit = Unit(num_slabs * SLAB_BYTES, SLAB_BYTES, shapes, swap_bytes=num_swap_pages * SWAP_PAGE_BYTES)
    async with served(directory, unit, clock or SystemClock(), address=address, attach_path=attach_path) as served_unit:
        running = RunningUnit(served_unit)
        try:
            yield running
            unit.check_integrity()
        finally:
            running.router.cancel()
