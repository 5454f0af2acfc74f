"""The kvstore process of one unit: builds its parts from the configuration and connects them. Decides nothing."""

from __future__ import annotations

import asyncio
import functools

from kvstore.attach_server import AttachServer
from kvstore.device_memory import HostMemory, new_memfd
from kvstore.fence import HostFence
from kvstore.grant_table import GrantTable
from kvstore.service import KvStoreService
from kvstore.unit import Unit, UnitModel, first_id
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.lifecycle import Stop
from muxmesh.models.prepared_model import model_spec
from muxmesh.process_registry import ProcessRegistry
from muxmesh.rpc.server import MeshServer


async def serve(runtime: MeshRuntime, unit_name: str, stop: Stop) -> None:
    """Serves one unit until ``stop`` is set.

    Raises ConfigError if there is no such unit; ValueError if a slab is too small for a token block of a model.
    """
    config, clock = runtime.unit(unit_name), SystemClock()
    models = {
        model.name: UnitModel.of(config, model, model_spec(runtime.prepared_model(unit_name, model.name).folder))
        for model in config.models
    }
    policy = runtime.config.order.scheduling_policy()
    unit = Unit(config.kv_pool, config.slab, models, first_id(clock.unix_s()), config.kv_swap, policy)
    memory, grants = HostMemory(config.kv_pool), GrantTable()
    swap_fd = new_memfd("muxmesh-kv-swap", config.kv_swap) if config.kv_swap else None
    service = KvStoreService(config, unit, grants, clock, runtime.config.order.trace)
    attach = service.attach = AttachServer(
        runtime.attach_path(unit_name), unit, memory, swap_fd, grants, HostFence(), service.changed
    )
    register = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, service)
    server = MeshServer({kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: register})
    endpoint = runtime.endpoints()[ProcessKey("kvstore", unit_name)]
    await server.start([endpoint.address])
    attach.start()
    asyncio.get_running_loop().add_reader(grants.doorbell_fd, grants.on_doorbell)
    await server.set_serving()
    registry = ProcessRegistry(runtime.redis_url, runtime.config.mesh_id, clock)
    async with registry.registered(endpoint.name, endpoint.address):
        await stop.wait()
    attach.close()
    await server.stop(grace_s=0.5)
