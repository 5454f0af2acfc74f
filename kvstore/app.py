"""The kvstore process of one unit: builds its parts from the configuration and connects them. Decides nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import nullcontext

from kvstore.attach_server import AttachServer
from kvstore.cuda_memory import CudaMemory
from kvstore.device_memory import GPU_IPC, DeviceMemory, HostMemory, new_memfd, reserve
from kvstore.fence import HostFence
from kvstore.grant_table import GrantTable
from kvstore.model_service import ModelService, PlacedModel, PlacedModels
from kvstore.model_states import AwakeLimits
from kvstore.mps_fence import EndGroup, MpsFence
from kvstore.residency_journal import ResidencyJournal
from kvstore.residency_publisher import ResidencyPublisher
from kvstore.service import KvStoreService
from kvstore.share_proof import ShareProver
from kvstore.unit import Unit, first_id
from kvstore.unit_metrics import unit_families
from kvstore.unit_model import UnitModel
from muxmesh.background_task import background
from muxmesh.clock import Clock, SystemClock
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import Endpoint, MeshRuntime, ProcessKey
from muxmesh.config.schema import UnitConfig
from muxmesh.cuda.driver import CudaDriver
from muxmesh.errors import ConfigError, DeviceError
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.lifecycle import Stop
from muxmesh.machine_limits import MemoryLimit, memory_limit
from muxmesh.metrics.monitor import Monitor
from muxmesh.models.host_memory import kvstore_problem
from muxmesh.models.prepared_model import kv_identity, model_spec
from muxmesh.rpc.internal_tls import internal_server_credentials
from muxmesh.rpc.server import MeshServer
from muxmesh.service_registration import registered_service
from muxmesh.types import Role

_log = logging.getLogger(__name__)


async def serve(runtime: MeshRuntime, unit_name: str, stop: Stop, monitor: Monitor) -> None:
    """Serves one unit until ``stop`` is set.

    Raises ConfigError if there is no such unit or its pool exceeds the memory limit of this process; ValueError if a
    slab is too small for a token block of a model; DeviceError if the unit's memory cannot be had as the configuration
    wants it.
    """
    config, clock, limit = runtime.unit(unit_name), SystemClock(), memory_limit()
    if (problem := kvstore_problem(config, limit)) is not None:
        raise ConfigError(f"unit {unit_name}: {problem}")
    models = {model.name: placed_model(runtime, unit_name, model.name) for model in config.models}
    unit, placed = new_unit(runtime, config, models, clock), PlacedModels(models)
    memory = open_memory(runtime, config)
    grants = GrantTable(resolved_arbiter(runtime, config, placed.configs), clock)
    placed.on_changed = lambda: grants.configure(resolved_arbiter(runtime, config, placed.configs))
    swap_fd = new_memfd("muxmesh-kv-swap", config.kv_swap) if config.kv_swap else None
    await reserve_host_memory(memory, swap_fd, limit)
    service = KvStoreService(config, unit, grants, clock, placed.fingerprints, runtime.config.order.trace)

    def end_group(reason: str, device_has_failed: bool) -> None:
        attach.end_group(reason, device_has_failed)

    fence = open_fence(runtime, unit_name, clock, end_group, stop.give_up)
    attach = service.attach = AttachServer(
        runtime.attach_path(unit_name),
        unit,
        memory,
        swap_fd,
        grants,
        fence,
        service.changed,
        prover=share_prover(runtime, unit_name, memory, fence),
        identities=placed.identities,
        share_of=arbiter_shares(runtime, config, placed.configs),
    )
    endpoint = runtime.endpoints()[ProcessKey("kvstore", unit_name)]
    commands = ModelService(
        config, unit, clock, service, lambda name: placed_model(MeshRuntime.read(runtime.path), unit_name, name), placed
    )
    server = _server(service, commands, endpoint, monitor)
    tls = internal_server_credentials(runtime.config.internal_tls, endpoint, clock, stop.give_up)
    async with tls as credentials:
        await server.start(endpoint.listen, credentials)
        attach.start()
        asyncio.get_running_loop().add_reader(grants.doorbell_fd, grants.on_doorbell)
        monitor.add(
            lambda: unit_families(
                config, unit, memory.transport, service.num_overtaken, grants.num_revoked, grants.num_held_up
            )
        )
        await server.set_serving()
        watching = background(fence.run(), "MPS", stop.give_up) if isinstance(fence, MpsFence) else nullcontext()
        publisher = residency_publisher(runtime, unit_name, unit)
        async with watching, registered_service(runtime, endpoint, stop, clock), publisher.published():
            await stop.wait()
        attach.close()
        if isinstance(fence, MpsFence):
            fence.close()
        await server.stop(grace_s=0.5)
        memory.close()


def placed_model(runtime: MeshRuntime, unit: str, model: str) -> PlacedModel:
    """A model of a unit as the runtime has it. Raises ConfigError if it has no such model."""
    config, model_config = runtime.model(unit, model)
    prepared = runtime.prepared_model(unit, model)
    limits = UnitModel.of(config, model_config, model_spec(prepared.folder))
    return PlacedModel(model_config, limits, kv_identity(config, model_config, prepared))


def new_unit(runtime: MeshRuntime, config: UnitConfig, models: Mapping[str, PlacedModel], clock: Clock) -> Unit:
    """The state of a unit that starts. Raises ValueError if a slab is too small for a token block of a model."""
    return Unit(
        config.kv_pool,
        config.slab,
        {name: model.limits for name, model in models.items()},
        first_id(clock.unix_s()),
        config.kv_swap,
        runtime.config.order.scheduling_policy(),
        AwakeLimits(config.max_awake_models, config.idle_sleep_s),
        clock.monotonic_s(),
        config.preemption_mode,
        runtime.config.order.fairness_settings(),
    )


def residency_publisher(runtime: MeshRuntime, name: str, unit: Unit) -> ResidencyPublisher:
    """Publishes what the unit's prefix cache holds, under an incarnation that no earlier kvstore of the unit had."""
    journal = ResidencyJournal(secrets.randbits(64))
    unit.blocks.on_published = journal.note
    return ResidencyPublisher(runtime.redis_url, runtime.config.mesh_id, name, journal, unit.blocks.published)


def _server(service: KvStoreService, models: ModelService, endpoint: Endpoint, monitor: Monitor) -> MeshServer:
    by_name = kvstore_pb2.DESCRIPTOR.services_by_name
    services = {
        by_name["KvStoreService"]: functools.partial(kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, service),
        by_name["UnitModelService"]: functools.partial(kvstore_pb2_grpc.add_UnitModelServiceServicer_to_server, models),
    }
    return MeshServer(services, is_on_network=endpoint.is_on_network, on_health=monitor.report)


def open_fence(
    runtime: MeshRuntime, unit: str, clock: Clock, end_group: EndGroup, give_up: Callable[[str], None]
) -> HostFence | MpsFence:
    """The fence of a unit's workers: through the MPS daemon if they are its clients."""
    if not runtime.uses_mps(unit):
        return HostFence()
    return MpsFence(runtime.mps_control(unit), clock, end_group, give_up)


def share_prover(
    runtime: MeshRuntime, unit: str, memory: DeviceMemory, fence: HostFence | MpsFence
) -> ShareProver | None:
    """Checks the shares of a unit's workers; None on a CPU."""
    if not runtime.unit(unit).is_cuda:
        return None

    def share_of(role: Role, model: str) -> int:
        return runtime.share_of(ProcessKey(role, unit, model))

    if isinstance(fence, MpsFence):
        return ShareProver(share_of, memory.num_sms, str(fence.pipe_dir), fence.is_client)
    return ShareProver(share_of, memory.num_sms, "", None)


def resolved_arbiter(runtime: MeshRuntime, config: UnitConfig, models: Mapping[str, ModelConfig]) -> ArbiterConfig:
    """The settings of the arbiter while the unit has ``models``: what they leave open depends on these."""
    return config.model_copy(update={"models": tuple(models.values())}).resolved_arbiter(runtime.uses_mps(config.name))


def arbiter_shares(
    runtime: MeshRuntime, config: UnitConfig, models: Mapping[str, ModelConfig]
) -> Callable[[Role, str], float]:
    """The part of the device that a worker of a role and model uses, as the arbiter counts it."""
    uses_mps = runtime.uses_mps(config.name)
    return lambda role, model: config.arbiter_share(models[model], role, uses_mps)


def open_memory(runtime: MeshRuntime, config: UnitConfig) -> DeviceMemory:
    """Allocates a unit's memory on its device.

    Raises DeviceError if it cannot be had, the GPU is not the unit's, or the transport is not one that it requires.
    """
    if not config.is_cuda:
        return HostMemory(config.kv_pool)
    driver, uuid = CudaDriver(), runtime.device_uuids[config.name]
    device = driver.device(0)
    if device.uuid != uuid:
        raise DeviceError(
            f"unit {config.name} is on {uuid}, the first visible GPU of its kvstore is {device.uuid}: "
            f"set CUDA_VISIBLE_DEVICES={uuid}"
        )
    images = {model.name: runtime.prepared_model(config.name, model.name).image for model in config.models}
    weights_bytes = {name: image.stat().st_size for name, image in images.items() if image is not None}
    memory = CudaMemory(driver, device.index, config.kv_pool, weights_bytes, config.legacy_ipc)
    _log.info("unit %s: memory on %s (%s), shared by %s", config.name, device.name, uuid, memory.transport)
    check_transport(config, memory)
    return memory


async def reserve_host_memory(memory: DeviceMemory, swap_fd: int | None, limit: MemoryLimit) -> None:
    """Under a limit of a cgroup: allocates pool and swap region now.

    They count to this process's container, for which they were checked, and not to that of the first worker to write a
    page. Raises DeviceError if there is not enough.
    """
    segments = [segment for shard in memory.shards for segment in shard.segments if not segment.device_uuid]
    pool_fds = [fd for segment in segments for fd in segment.fds]
    if limit.is_of_cgroup:
        await asyncio.to_thread(reserve, pool_fds if swap_fd is None else [*pool_fds, swap_fd])


def check_transport(config: UnitConfig, memory: DeviceMemory) -> None:
    """Raises DeviceError if the unit requires GPU IPC, and its memory is shared in another way."""
    if config.require_ipc and memory.transport not in GPU_IPC:
        raise DeviceError(f"unit {config.name} has require_ipc, but its memory is shared by {memory.transport}")
