"""The shell of a worker process: attach, build the engine, serve, until stopped or the unit is lost."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor

from kvstore.attach_protocol import BEAT_EVERY_S
from kvstore.client.attachment import Attachment, attach
from kvstore.client.grant import SharedGrant
from kvstore.client.leases import LeaseClient
from kvstore.client.swapper import Swapper
from kvstore.progress import ProgressPage
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime, Role
from muxmesh.engine.api import Engine
from muxmesh.engine.build import build_engine, num_threads
from muxmesh.engine.kernel_cache import kernel_cache_dir
from muxmesh.engine.kv_view import KvView
from muxmesh.lifecycle import Stop, run_service, service_arguments
from muxmesh.models.prepare import model_spec
from muxmesh.registry import Registry
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer, Register
from muxmesh.types import KvFormat

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a phase's service works with."""

    engine: Engine
    leases: LeaseClient
    progress: ProgressPage
    block_size: int
    kv_swap_format: KvFormat
    swapper: Swapper | None
    """None: the unit has no memory to swap to."""
    give_up: Callable[[str], None]
    """Ends the process, which cannot be of use any more; the supervisor starts another."""


Services = Mapping[ServiceDescriptor, Register]
OpenServices = Callable[[WorkerParts], AbstractAsyncContextManager[Services]]
"""Opens the phase's own services around a worker's parts."""


def worker_main(role: Role, description: str, open_services: OpenServices) -> None:
    """The body of a worker's ``__main__``."""
    arguments = service_arguments(description, "model")
    runtime = MeshRuntime.read(arguments.runtime)
    _set_up_threads(runtime, arguments.model)
    run_service(functools.partial(host_worker, runtime, role, arguments.model, open_services))


async def host_worker(runtime: MeshRuntime, role: Role, model: str, open_services: OpenServices, stop: Stop) -> None:
    """Serves one phase of one model until ``stop`` is set; the loss of the unit or of the engine sets it too."""

    def give_up(reason: str) -> None:
        _log.error("giving up: %s", reason)
        stop.set()

    unit, config = runtime.model(model)
    address = runtime.worker_address(role, model)
    attachment = await attach(runtime.attach_path(unit.name), role, model, address)
    attachment.on_unit_lost(lambda: give_up("the unit is lost"))
    prepared = runtime.prepared[model]
    shape = model_spec(prepared.folder).kv_shape(config.block_size, config.dtype)
    grant = SharedGrant(attachment, SystemClock())
    view = KvView(attachment.pool, shape, attachment.slab_bytes)
    engine = build_engine(config, prepared, view, grant, runtime.config.order.order(), grant.count_step)
    await engine.start()
    background = [
        asyncio.create_task(_watch(engine, give_up), name="engine watch"),
        asyncio.create_task(_beat(attachment), name="heartbeat"),
    ]
    async with internal_channel(runtime.kvstore_address(unit.name)) as channel:
        leases = LeaseClient(channel, attachment.worker)
        swapper = Swapper(attachment, attachment.swap, view, leases, SystemClock()) if attachment.swap else None
        parts = WorkerParts(
            engine, leases, attachment.progress, config.block_size, config.kv_swap_format, swapper, give_up
        )
        async with open_services(parts) as services:
            server = MeshServer(services)
            await server.start([address])
            await server.set_serving()
            attachment.set_ready(True)
            async with Registry(runtime.redis_url, SystemClock()).registered(f"{role.value}/{model}", address):
                await stop.wait()
                attachment.set_ready(False)  # no more credits for us
            await server.stop(grace_s=0.5)
        for task in background:
            task.cancel()
        await engine.stop()
        await leases.close()
        if swapper:
            swapper.close()


async def _beat(attachment: Attachment) -> None:
    while True:
        attachment.beat()
        await asyncio.sleep(BEAT_EVERY_S)


async def _watch(engine: Engine, give_up: Callable[[str], None]) -> None:
    give_up(f"the engine is dead: {await engine.wait_dead()}")


def _set_up_threads(runtime: MeshRuntime, model: str) -> None:
    """What libraries read once, when they are loaded. Waiting threads sleep: an idle worker never spins."""
    _, config = runtime.model(model)
    os.environ.update(
        OMP_NUM_THREADS=str(num_threads(config)),
        OMP_WAIT_POLICY="PASSIVE",
        NUMBA_CACHE_DIR=str(kernel_cache_dir(runtime.cache_dir)),
    )
