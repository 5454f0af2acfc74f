"""Puts a kvstore process together and runs it."""

from __future__ import annotations

import asyncio
import functools

from kvstore.attach import AttachServer
from kvstore.memory import UnitMemory
from kvstore.service import KvStoreService
from kvstore.unit import ModelShare, Unit, first_id
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import UnitConfig
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.lifecycle import Stop
from muxmesh.models.prepare import model_spec
from muxmesh.registry import Registry
from muxmesh.rpc.server import MeshServer


def build_unit(runtime: MeshRuntime, config: UnitConfig, last_id: int) -> Unit:
    """The unit's brain for its configuration."""
    shares = {}
    for model in config.models:
        spec = model_spec(runtime.prepared[model.name].folder)
        shares[model.name] = ModelShare(
            shape=spec.kv_shape(model.block_size, model.dtype),
            max_num_seqs=model.max_num_seqs,
            max_model_len=model.max_model_len or spec.context_len,
            guaranteed_slabs=config.guaranteed_slabs(model),
        )
    return Unit(config.kv_pool, config.slab, shares, last_id, config.kv_swap, runtime.config.order.order())


async def serve(runtime: MeshRuntime, unit_name: str, stop: Stop) -> None:
    """Serves one unit until ``stop`` is set."""
    config = runtime.unit(unit_name)
    clock = SystemClock()
    unit = build_unit(runtime, config, last_id=first_id(clock.unix_s()))
    memory = UnitMemory(config.kv_pool, config.kv_swap)
    service = KvStoreService(config, unit, memory, clock, runtime.config.order.trace)
    attach = service.attach = AttachServer(runtime.attach_path(unit_name), unit, memory, service.changed)
    register = functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, service)
    server = MeshServer({kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: register})
    address = runtime.kvstore_address(unit_name)
    await server.start([address])
    attach.start()
    asyncio.get_running_loop().add_reader(memory.doorbell_fd, memory.on_doorbell)
    await server.set_serving()
    async with Registry(runtime.redis_url, clock).registered(f"kvstore/{unit_name}", address):
        await stop.wait()
    attach.close()
    await server.stop(grace_s=0.5)
