"""Builds the router's objects, connects them to the units and serves the public API. Contains no policy."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import grpc

from muxmesh.background_task import background
from muxmesh.clock import Clock, SystemClock
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.endpoint_resolver import EndpointResolver
from muxmesh.errors import Unavailable
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc, kvstore_pb2_grpc
from muxmesh.lifecycle import Stop, raise_file_limit
from muxmesh.metrics.monitor import Monitor
from muxmesh.process_registry import ProcessRegistry
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.client_limits import PublicLimits
from muxmesh.rpc.internal_tls import internal_channel_credentials
from muxmesh.rpc.server import Identify, MeshServer
from muxmesh.rpc.server_credentials import ReloadedCredentials
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.service_registration import registered_service
from muxmesh.v1 import inference_pb2, inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc
from router.admin_service import RouterAdminService
from router.admission_client import UnitAdmission
from router.api.inference_service import InferenceService
from router.api.mesh_service import MeshService
from router.api.request_observer import RequestObserver
from router.attempt import WorkerChannels, run_attempt
from router.credit_wait import CreditWait
from router.expected_work import ExpectedWork
from router.length_forecast import LengthForecaster
from router.model_changes import ModelChanges, placed_model
from router.peer_routers import PeerRouters
from router.pipeline import GenerationPipeline
from router.predictor_snapshots import PredictorSnapshots
from router.prompt_tokenizer import PromptTokenizer
from router.public_limits import public_limits
from router.queue_limit import QueueLimit
from router.request_metrics import RequestMetrics
from router.residency import ResidencyIndex
from router.residency_reader import ResidencyReader
from router.router_metrics import router_families
from router.sequence_driver import SequenceDriver
from router.served_models import load_models
from router.tenancy import OPEN_TENANCY, Tenancy, open_tenancy
from router.tenant_key import SECRET_BYTES
from router.unit_link import UnitLink
from router.units import Units

DRAIN_S = 2.0
"""Less than the grace period of the supervisor."""
_RESIDENCY_WAIT_S = 1.0
"""Longest wait of a router that starts for what is in the prefix caches of the units."""
_LONG_NICENESS = 10
"""Of the threads that tokenize long prompts, so that they take no core from the workers' compute."""


async def serve(
    runtime: MeshRuntime, stop: Stop, monitor: Monitor, name: str = "router", drain_s: float = DRAIN_S
) -> None:
    """Serves the public API until ``stop`` is set. Its health is SERVING once every unit is connected.

    ``name``: of this router in the registry, and of its socket. A router that is stopped refuses new calls at once and
    lets running ones finish for ``drain_s``. Raises ConfigError, see `MeshRuntime.router_endpoint`, also if an address
    is in use.
    """
    clock, config, rng = SystemClock(), runtime.config, random.SystemRandom()
    endpoint = runtime.router_endpoint(name)
    policy, models = config.order.scheduling_policy(), load_models(runtime)
    incarnation = f"{name}-{rng.getrandbits(32):08x}"  # one that restarts is another router to units and workers
    async with AsyncExitStack() as stack:
        registry = ProcessRegistry(runtime.redis_url, config.mesh_id, clock)
        stack.push_async_callback(registry.close)
        to_units = internal_channel_credentials(config.internal_tls)
        workers = WorkerChannels(incarnation, to_units)
        stack.push_async_callback(workers.close)
        residency = ResidencyIndex()
        units = await _open_units(runtime, incarnation, policy, clock, registry, residency, to_units, stack)
        if len(config.units) > 1:
            await _follow_residency(runtime, residency, clock, stop, stack)
        for unit in units:
            await stack.enter_async_context(background(unit.admission.run(), f"admission to {unit.name}", stop.give_up))
        credit_wait = CreditWait(units, clock)
        driver = SequenceDriver(
            credit_wait.credited, functools.partial(run_attempt, workers, clock), clock, config.router.max_restarts
        )
        secret = bytes.fromhex(runtime.tenant_secret) or rng.randbytes(SECRET_BYTES)
        forecaster = await _open_forecaster(runtime, clock, secret, stack)
        tokenizer = _open_tokenizer(config.router.max_waiting_prompt_bytes, stack)
        metrics = RequestMetrics({model.name: model.limits.max_model_len for model in models})
        tenancy = await _open_tenancy(runtime, incarnation, clock, rng, stop, stack)
        queue_limit = QueueLimit(
            config.router.max_waiting_requests, secret, config.access.mode == "keys", config.order.longest_queue_s,
            lambda: sum(placed.config.max_num_seqs for unit in units for placed in unit.models.values()),
        )  # fmt: skip
        pipeline = GenerationPipeline(
            models, units, driver, forecaster, policy, config.router, clock, rng, tokenizer, metrics, queue_limit,
            tenancy.quotas,
        )  # fmt: skip
        monitor.add(tenancy.families)
        monitor.add(metrics.families)
        monitor.add(lambda: router_families(models, pipeline, forecaster, units, clock.unix_s()))
        mesh_service = MeshService(models, units, pipeline, forecaster, registry, policy, metrics, clock)
        peers = PeerRouters(runtime, name)
        stack.push_async_callback(peers.close)
        changes = ModelChanges(runtime.path, models, units, metrics)
        admin = _admin_server(RouterAdminService(units, changes, mesh_service.own_counts), mesh_service)
        await admin.start([runtime.admin_address(name)])
        await admin.set_serving()
        stack.push_async_callback(admin.stop, 0)
        server = _server(
            InferenceService(pipeline, clock, rng, RequestObserver(metrics, clock, config.router.log_requests)),
            MeshService(
                models, units, pipeline, forecaster, registry, policy, metrics, clock, peers.counts, tenancy.name_of
            ),
            public_limits(config.router, models, raise_file_limit()),
            monitor,
            tenancy.identify,
            runtime.has_supervisor and config.routers > 1,
        )
        credentials = await _open_credentials(config, clock, stop, stack)
        await server.start([config.listen, *endpoint.listen], credentials)
        stack.push_async_callback(server.stop, drain_s)
        stop.allow(drain_s)
        await asyncio.gather(*(unit.admission.connected.wait() for unit in units))
        await server.set_serving()
        async with registered_service(runtime, endpoint, stop, clock, config.listen):
            await stop.wait()


async def _open_credentials(
    config: MeshConfig, clock: Clock, stop: Stop, stack: AsyncExitStack
) -> dict[str, grpc.ServerCredentials]:
    """The TLS credentials by address: none without `tls`. Until ``stack`` is closed, certificates are reloaded."""
    if config.tls is None:
        return {}
    reloaded = ReloadedCredentials(config.tls, clock)
    await stack.enter_async_context(background(reloaded.watch(), "certificates", stop.give_up))
    return {config.listen: reloaded.credentials}


async def _open_units(
    runtime: MeshRuntime,
    router: str,
    policy: SchedulingPolicy,
    clock: Clock,
    registry: ProcessRegistry,
    residency: ResidencyIndex,
    credentials: grpc.ChannelCredentials | None,
    stack: AsyncExitStack,
) -> Units:
    """Opens a link to each unit, over the network with ``credentials``. ``stack`` closes them."""
    resolver = EndpointResolver(runtime, registry)
    links = []
    for unit in runtime.config.units:
        address = await resolver.address(ProcessKey("kvstore", unit.name))
        channel = await stack.enter_async_context(internal_channel(address, credentials))
        admission = UnitAdmission(unit.name, router, channel, clock, policy, runtime.config.order.fairness)
        placed = {model.name: placed_model(runtime, unit.name, model.name) for model in unit.models}
        kvstore, commands = kvstore_pb2_grpc.KvStoreServiceStub(channel), kvstore_pb2_grpc.UnitModelServiceStub(channel)
        work = ExpectedWork(policy.longest_lead)
        links.append(UnitLink(unit.name, admission, kvstore, commands, placed, work))
    return Units(links, residency)


async def _follow_residency(
    runtime: MeshRuntime, residency: ResidencyIndex, clock: Clock, stop: Stop, stack: AsyncExitStack
) -> None:
    """Follows the units' prefix caches in Redis, and waits for what they hold now, unless Redis is unreachable."""
    names = [unit.name for unit in runtime.config.units]
    reader = ResidencyReader(runtime.redis_url, runtime.config.mesh_id, names, residency, clock)
    await stack.enter_async_context(background(reader.run(), "residency", stop.give_up))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_RESIDENCY_WAIT_S):
            await reader.has_read.wait()


async def _open_forecaster(
    runtime: MeshRuntime, clock: Clock, secret: bytes, stack: AsyncExitStack
) -> LengthForecaster:
    """Opens the predictor of lengths from its last snapshot in Redis. ``stack`` saves and closes it."""
    snapshots = PredictorSnapshots(runtime.redis_url, runtime.config.mesh_id)
    predictor, checked = await snapshots.load()
    forecaster = LengthForecaster(checked, runtime.config.router.predictor_budget_s, clock, secret)
    stack.callback(forecaster.close)
    await stack.enter_async_context(snapshots.saved(forecaster, predictor, checked))
    return forecaster


async def _open_tenancy(
    runtime: MeshRuntime, incarnation: str, clock: Clock, rng: random.Random, stop: Stop, stack: AsyncExitStack
) -> Tenancy:
    """Opens the tenants and their quotas, if callers need API keys. ``stack`` settles what is left and closes them."""
    if runtime.config.access.mode == "open":
        return OPEN_TENANCY
    tenancy = open_tenancy(runtime, incarnation, clock, rng)
    stack.push_async_callback(tenancy.close)
    with contextlib.suppress(Unavailable):  # then keys are refused until Redis responds
        await tenancy.refresh()
    await stack.enter_async_context(background(tenancy.run(), "tenants", stop.give_up))
    return tenancy


def _open_tokenizer(max_waiting_bytes: int, stack: AsyncExitStack) -> PromptTokenizer:
    """Starts the threads that tokenize. ``stack`` ends them."""
    short = stack.enter_context(ThreadPoolExecutor(2, "tokenize"))
    long = stack.enter_context(ThreadPoolExecutor(2, "tokenize-long", functools.partial(os.nice, _LONG_NICENESS)))
    return PromptTokenizer(short, long, max_waiting_bytes)


def _server(
    inference: InferenceService,
    mesh: MeshService,
    limits: PublicLimits,
    monitor: Monitor,
    identify: Identify,
    shares_port: bool,
) -> MeshServer:
    return MeshServer(
        {
            inference_pb2.DESCRIPTOR.services_by_name["Inference"]: functools.partial(
                inference_pb2_grpc.add_InferenceServicer_to_server, inference
            ),
            mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]: functools.partial(
                mesh_pb2_grpc.add_MeshServicer_to_server, mesh
            ),
        },
        limits,
        on_health=monitor.report,
        identify=identify,
        shares_port=shares_port,
    )


def _admin_server(admin: RouterAdminService, mesh: MeshService) -> MeshServer:
    """The server on the private socket for the commands of an operator."""
    return MeshServer(
        {
            admin_pb2.DESCRIPTOR.services_by_name["RouterAdminService"]: functools.partial(
                admin_pb2_grpc.add_RouterAdminServiceServicer_to_server, admin
            ),
            mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]: functools.partial(
                mesh_pb2_grpc.add_MeshServicer_to_server, mesh
            ),
        }
    )
