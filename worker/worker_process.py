"""The process of a worker: attaches to its unit, builds the engine, and serves one phase of one model until stopped.

Knows which parts a worker has and in which order they start and end. The services of a phase know what a request is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor

from kvstore.attach_protocol import BEAT_EVERY_S
from kvstore.progress_page import ProgressPage
from kvstore.worker_slots import EngineState
from muxmesh.background_task import background
from muxmesh.block_hashes import KvIdentity
from muxmesh.clock import Clock, SystemClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import Endpoint, MeshRuntime, ProcessKey
from muxmesh.engine.api import Engine
from muxmesh.engine.native.kernel_cache import kernel_cache_dir
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.errors import ConfigError
from muxmesh.file_lock import only_process
from muxmesh.lifecycle import Stop, configure_logging, run_service, service_arguments
from muxmesh.machine_limits import MemoryLimit, memory_limit
from muxmesh.metrics.monitor import Monitor
from muxmesh.models.host_memory import worker_problem
from muxmesh.models.model_spec import KvShape
from muxmesh.models.prepared_model import kv_identity, model_spec
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.internal_tls import internal_server_credentials
from muxmesh.rpc.server import MeshServer, Register
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.service_registration import registered_service
from muxmesh.types import EngineRequest, Lease, Role
from worker.attachment import Attachment, attach, open_worker_device
from worker.compute_grant import ComputeGrant
from worker.engine_builder import build_engine, build_pacer, num_threads
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient
from worker.worker_metrics import WorkerCounters, WorkerMetrics

_log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0001
"""How long the engine's thread, back from the device, waits for the interpreter while the event loop computes.

Python's own value, 5 ms, is longer than several decode steps on a GPU.
"""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The parts of a worker that the services of its phase use."""

    engine: Engine
    leases: LeaseClient
    progress: ProgressPage
    config: ModelConfig
    identity: KvIdentity
    swapper: KvSwapper | None
    """None if the unit has no swap region."""
    clock: Clock
    counters: WorkerCounters
    give_up: Callable[[str], None]
    """Logs the reason and stops this process, which cannot continue to serve and has to be started again."""
    policy: SchedulingPolicy = FCFS
    traces_decisions: bool = False
    """Whether pre-emptions are logged."""

    def sequence(self, request: EngineRequest, lease: Lease) -> SequenceRecord:
        """Returns the record of a request's sequence, whose ``lease`` this worker has. Raises ValueError, see there."""
        return SequenceRecord(
            request,
            self.config.block_size,
            self.identity.root(request.tenant, request.cache_salt),
            lease.block_ids,
            lease.num_computed_tokens,
            lease.sampled_token_ids,
        )


Services = Mapping[ServiceDescriptor, Register]
OpenServices = Callable[[WorkerContext], AbstractAsyncContextManager[Services]]
"""Opens the services of one phase, and closes them at the end of the context."""


def worker_main(role: Role, description: str, open_services: OpenServices) -> None:
    """Parses the command line and runs a worker: the body of its ``__main__``."""
    arguments = service_arguments(description, "unit", "model")
    monitor = Monitor(arguments.metrics)
    key = ProcessKey(role, arguments.unit, arguments.model)

    async def serve(stop: Stop) -> None:
        runtime = MeshRuntime.read(arguments.runtime)
        configure_logging(logging.INFO, runtime.config.log_format, runtime.display_name(key))
        set_up_threads(runtime, key)
        runtime.set_environment(key, os.environ, has_supervisor=arguments.parent is not None)
        check_memory(runtime, key, memory_limit())
        with only_process(runtime.run_dir, runtime.display_name(key)):
            await host_worker(runtime, key, open_services, stop, monitor)

    run_service(serve, key.name, monitor)


def check_memory(runtime: MeshRuntime, key: ProcessKey, limit: MemoryLimit) -> None:
    """Raises ConfigError if the memory limit of this process does not hold the weights and what a worker needs.

    Also if the weights are not there, as in a container that does not mount the cache.
    """
    unit, config = runtime.model(key.unit, key.model)
    image = runtime.prepared_model(key.unit, key.model).image
    try:
        weights_bytes = 0 if image is None else image.stat().st_size
    except OSError as error:
        raise ConfigError(
            f"{runtime.display_name(key)}: the weights cannot be read: {image}: {error.strerror}"
        ) from error
    problem = worker_problem(unit, config, weights_bytes, limit)
    if problem is not None:
        raise ConfigError(f"{runtime.display_name(key)}: {problem}")


async def host_worker(
    runtime: MeshRuntime, key: ProcessKey, open_services: OpenServices, stop: Stop, monitor: Monitor
) -> None:
    """Serves one phase of one model until ``stop`` is set. Sets it if the unit is lost or the engine is dead."""
    unit, config = runtime.model(key.unit, key.model)
    endpoints, clock = runtime.endpoints(), SystemClock()
    endpoint = endpoints[key]
    prepared = runtime.prepared_model(key.unit, key.model)
    identity = kv_identity(unit, config, prepared)
    attachment = await _attach(runtime, key, endpoint, identity)
    attachment.on_unit_lost(lambda: stop.give_up("the unit is lost"))
    shape = model_spec(prepared.folder).kv_shape(config.block_size, config.kv_dtype)
    role = Role(key.role)
    grant = ComputeGrant(attachment, clock, build_pacer(config, role, unit.is_cuda))
    policy = runtime.config.order.scheduling_policy()
    engine = build_engine(config, prepared, attachment.pool, attachment.weights, grant, policy, grant.count_step, role)
    await engine.start(asleep=attachment.command.engine is not EngineState.AWAKE)
    counters = _measured(monitor, key, attachment, shape, clock)
    async with internal_channel(endpoints[ProcessKey("kvstore", key.unit)].address) as channel:
        leases = LeaseClient(channel, attachment.worker)
        swapper = KvSwapper(attachment, shape, leases, clock, counters) if attachment.pool.has_swap else None
        traces = runtime.config.order.trace
        context = WorkerContext(
            engine,
            leases,
            attachment.progress,
            config,
            identity,
            swapper,
            clock,
            counters,
            stop.give_up,
            policy,
            traces,
        )
        async with (
            background(_watch_engine(engine, stop.give_up), "engine watch", stop.give_up),
            background(_send_heartbeats(attachment), "heartbeat", stop.give_up),
            background(follow_commands(attachment, engine, grant.restart_pacing), "sleep of the engine", stop.give_up),
            open_services(context) as services,
            internal_server_credentials(runtime.config.internal_tls, endpoint, clock, stop.give_up) as credentials,
        ):
            server = MeshServer(services, is_on_network=endpoint.is_on_network, on_health=monitor.report)
            await server.start(endpoint.listen, credentials)
            await server.set_serving()
            attachment.set_ready(True)
            async with registered_service(runtime, endpoint, stop, clock):
                await stop.wait()
                attachment.set_ready(False)  # the unit issues no more credits for this worker
            await server.stop(grace_s=0.5)
        await engine.stop()
        await leases.close()
        if swapper:
            swapper.close()
    attachment.close()


async def _attach(runtime: MeshRuntime, key: ProcessKey, endpoint: Endpoint, identity: KvIdentity) -> Attachment:
    """Attaches to the unit. On a GPU: opens the device first, and proves this process's share of it."""
    unit, config = runtime.model(key.unit, key.model)
    role, path = Role(key.role), runtime.attach_path(key.unit)
    if not unit.is_cuda:
        return await attach(path, role, key.model, endpoint.remote_address, None, identity.text)
    device = open_worker_device(unit.green_share(config, role))
    attachment = await attach(path, role, key.model, endpoint.remote_address, device, identity.text)
    info = device.segments.device
    await attachment.prove_share(info.num_sms, info.is_mps_client)
    return attachment


def _measured(
    monitor: Monitor, key: ProcessKey, attachment: Attachment, shape: KvShape, clock: Clock
) -> WorkerCounters:
    """Adds the worker's metrics to ``monitor``. Returns the counters that its services keep."""
    counters = WorkerCounters()
    page, slot, transport = attachment.page, attachment.slot, attachment.transport
    metrics = WorkerMetrics(
        key.unit, key.model, Role(key.role), transport, page, slot, shape.kv_bytes_per_token, counters, clock
    )
    monitor.add(metrics.families)
    return counters


async def follow_commands(attachment: Attachment, engine: Engine, on_awake: Callable[[], None] = lambda: None) -> None:
    """Lets the engine sleep and wake as the unit tells it. Calls ``on_awake`` each time that it has woken."""
    while True:
        command = await attachment.next_command()
        if command.engine is EngineState.AWAKE:
            await engine.wake()
            on_awake()
        else:
            await engine.sleep(drop_weights=command.engine is EngineState.DROPPED)
        _log.info("the engine is %s", command.engine)
        attachment.report_done(command)


async def _send_heartbeats(attachment: Attachment) -> None:
    while True:
        attachment.beat()
        await asyncio.sleep(BEAT_EVERY_S)


async def _watch_engine(engine: Engine, give_up: Callable[[str], None]) -> None:
    give_up(f"the engine is dead: {await engine.wait_dead()}")


def set_up_threads(runtime: MeshRuntime, key: ProcessKey) -> None:
    """Sets this process's cores, the interpreter's switching, and the variables that libraries read when loaded.

    PASSIVE makes OpenMP's waiting threads sleep: an idle worker takes no time from the others.
    """
    unit, config = runtime.model(key.unit, key.model)
    if unit.cores is not None:
        os.sched_setaffinity(0, unit.cores)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    os.environ.update(
        OMP_NUM_THREADS=str(num_threads(config, None if unit.is_cuda else Role(key.role))),
        OMP_WAIT_POLICY="PASSIVE",
        NUMBA_CACHE_DIR=str(kernel_cache_dir(runtime.cache_dir)),
        TRITON_CACHE_DIR=str(runtime.cache_dir / "triton"),
    )
