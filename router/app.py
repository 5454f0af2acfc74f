"""Puts a router process together and runs it."""

from __future__ import annotations

import asyncio
import functools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime
from muxmesh.internal.v1 import kvstore_pb2_grpc
from muxmesh.lifecycle import Stop
from muxmesh.registry import Registry
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.v1 import inference_pb2, inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc
from router.attempt import Workers, run_attempt
from router.credits import UnitCredits
from router.forecast import Forecaster
from router.inference import InferenceService
from router.mesh import MeshService
from router.request import RequestDriver
from router.served_model import load_models
from router.snapshots import kept, known_before
from router.state import RouterState, UnitLink

_STOP_GRACE_S = 2.0


async def serve(runtime: MeshRuntime, stop: Stop) -> None:
    """Serves the public API until ``stop`` is set."""
    clock, config = SystemClock(), runtime.config
    order = config.order.order()
    models = load_models(runtime)
    async with AsyncExitStack() as stack:
        workers = Workers()
        stack.push_async_callback(workers.close)
        units = {}
        for unit in config.units:
            channel = await stack.enter_async_context(internal_channel(runtime.kvstore_address(unit.name)))
            unit_credits = UnitCredits(f"router-{os.getpid()}", channel, clock, order)
            served = {model.name: model for model in unit.models}
            attempt = functools.partial(run_attempt, workers, clock)
            driver = RequestDriver(unit_credits, attempt, served, clock, config.router.max_restarts)
            units[unit.name] = UnitLink(unit_credits, driver, kvstore_pb2_grpc.KvStoreServiceStub(channel))
            stack.callback(asyncio.create_task(unit_credits.run(), name=f"credits of {unit.name}").cancel)
        tokenizing = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="tokenize"))
        registry = Registry(runtime.redis_url, clock)
        stack.push_async_callback(registry.close)
        predictor, guard = await known_before(runtime.redis_url)
        forecaster = Forecaster(guard, config.router.predictor_budget_s, clock)
        stack.callback(forecaster.close)
        await stack.enter_async_context(kept(runtime.redis_url, forecaster, predictor, guard))
        state = RouterState(
            config.router, models, units, clock, random.SystemRandom(), tokenizing, registry, order, forecaster
        )
        server = _server(state)
        await server.start([config.listen, runtime.router_internal_address()])
        await asyncio.gather(*(unit.credits.connected.wait() for unit in units.values()))
        await server.set_serving()
        async with Registry(runtime.redis_url, clock).registered("router", config.listen):
            await stop.wait()
        await server.stop(_STOP_GRACE_S)


def _server(state: RouterState) -> MeshServer:
    inference, mesh = InferenceService(state), MeshService(state)
    return MeshServer(
        {
            inference_pb2.DESCRIPTOR.services_by_name["Inference"]: functools.partial(
                inference_pb2_grpc.add_InferenceServicer_to_server, inference
            ),
            mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]: functools.partial(
                mesh_pb2_grpc.add_MeshServicer_to_server, mesh
            ),
        },
        public=True,
    )
