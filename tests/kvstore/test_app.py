"""A kvstore process, run inside this one: its sockets serve while it runs and are gone after its end."""

import asyncio
import functools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.app import check_transport, open_memory, reserve_host_memory, resolved_arbiter, serve
from kvstore.device_memory import CUDA, HostMemory, Transport, new_memfd
from muxmesh.clock import SystemClock
from muxmesh.config.arbiter_config import MAX_OVERTAKES_WITH_SLOS
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.config.slo_config import SloConfig
from muxmesh.cuda.driver import CudaDriver
from muxmesh.engine.api import ComputeDemand
from muxmesh.errors import ConfigError, DeviceError, Overloaded
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.lifecycle import Stop
from muxmesh.machine_limits import MemoryLimit
from muxmesh.metrics.monitor import Monitor
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, QueuedRequest, Role, SchedulingState
from tests.support.cuda_unit import cuda_runtime
from tests.support.fake_driver import OTHER_UUID, UUID, fake_driver_library
from worker.attachment import attach
from worker.compute_grant import ComputeGrant
from worker.lease_client import LeaseClient

MIB = 1 << 20
SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"].full_name


def runtime_of(folder: Path, **unit: Any) -> MeshRuntime:
    """The runtime of a mesh with one unit that serves a simulated model; no Redis answers."""
    model = {"name": "m", "engine": "sim", "max_num_seqs": 2, "max_model_len": 320, "kv_guaranteed": "1MiB"}
    config = {"name": "u", "kv_pool": "4MiB", "slab": "1MiB", "models": [model], **unit}
    return MeshRuntime(
        config=MeshConfig.model_validate({"units": [config]}),
        run_dir=folder,
        cache_dir=folder,
        redis_url=f"unix://{folder}/no-redis.sock",
        prepared={"u": {"m": PreparedModel(folder=None, image=None, weights_fingerprint="w")}},
    )


@asynccontextmanager
async def serving(runtime: MeshRuntime) -> AsyncIterator[Any]:
    """Runs the unit until the block ends; a channel to it."""
    stop = Stop()
    running = asyncio.create_task(stop.run(functools.partial(serve, runtime, "u", monitor=Monitor())))
    async with internal_channel(address_of(runtime)) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, wait_for_ready=True)
        try:
            async with asyncio.timeout(20):
                while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                    pass
                yield channel
        finally:
            watch.cancel()
            stop.set()
            assert await running


def address_of(runtime: MeshRuntime) -> str:
    return runtime.endpoints()[ProcessKey("kvstore", "u")].address


async def test_a_unit_serves_what_its_configuration_names(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path, kv_swap=4 * SWAP_PAGE_BYTES)
    async with serving(runtime) as channel:
        response = await kvstore_pb2_grpc.KvStoreServiceStub(channel).GetUnitStatus(kvstore_pb2.GetUnitStatusRequest())
        status = response.unit
        assert (status.unit, status.device) == ("u", "cpu")
        assert (status.pool.pool_bytes, status.pool.slab_bytes, status.pool.swap_bytes) == (
            4 * MIB,
            MIB,
            4 * SWAP_PAGE_BYTES,
        )
        assert [(model.model, model.max_num_seqs, model.quota_bytes) for model in status.models] == [("m", 2, 4 * MIB)]


@pytest.mark.parametrize("has_swap", [False, True])
async def test_workers_that_attach_get_the_swap_region_that_is_configured(tmp_path: Path, has_swap: bool) -> None:
    runtime = runtime_of(tmp_path, kv_swap=2 * SWAP_PAGE_BYTES * has_swap)
    async with serving(runtime):
        attachment = await attach(runtime.attach_path("u"), Role.DECODE, "m", "unix:x")
        assert attachment.pool.has_swap == has_swap
    attachment.close()


async def test_a_request_passes_from_the_router_to_the_workers(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path)
    async with serving(runtime) as channel:
        attached = [await attach(runtime.attach_path("u"), role, "m", f"unix:{role}") for role in Role]
        for attachment in attached:
            attachment.set_ready(True)
        stub: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        router = stub.Admit()
        await router.write(kvstore_pb2.AdmitRequest(hello=kvstore_pb2.RouterHello(router="r")))
        request = QueuedRequest(1, "m", SchedulingState(0, 0.0), KvDemand(16, 64))
        await router.write(kvstore_pb2.AdmitRequest(offer=convert.queued_to_wire(request)))
        while (response := await router.read()).WhichOneof("message") != "credit":
            pass
        assert response.credit.prefill.name == attached[0].worker
        prefill, decode = (LeaseClient(channel, attachment.worker) for attachment in attached)
        lease = await prefill.acquire(convert.ref_from_wire(response.credit.lease))
        await prefill.move(lease.ref, attached[1].worker, 16, (3,))
        watch = stub.WatchLeases(kvstore_pb2.WatchLeasesRequest(owner=attached[1].worker))
        moved = convert.lease_from_wire((await watch.read()).arrived)
        with pytest.raises(Overloaded, match="the swap region has fewer than 1 free bytes"):
            await decode.begin_swap_out(moved.ref, 1)
        router.cancel()
        watch.cancel()
    for attachment in attached:
        attachment.close()


async def test_a_demand_to_compute_is_granted(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path)
    async with serving(runtime):
        attachment = await attach(runtime.attach_path("u"), Role.DECODE, "m", "unix:x")
        grant = ComputeGrant(attachment, SystemClock())
        await grant.acquire(ComputeDemand())
    attachment.close()


def test_the_arbiter_depends_on_the_models_that_the_unit_has_now(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path)
    config = runtime.unit("u")
    (model,) = config.models
    assert resolved_arbiter(runtime, config, {"m": model}).mode == "roundrobin"
    with_slo = ModelConfig(name="n", slo=SloConfig(scale=8))
    more = resolved_arbiter(runtime, config, {"m": model, "n": with_slo})
    assert (more.mode, more.max_overtakes) == ("adbs", MAX_OVERTAKES_WITH_SLOS)


async def test_the_end_of_a_unit_closes_its_connections_and_sockets(tmp_path: Path) -> None:
    runtime, lost = runtime_of(tmp_path), asyncio.Event()
    async with serving(runtime):
        attachment = await attach(runtime.attach_path("u"), Role.DECODE, "m", "unix:x")
        attachment.on_unit_lost(lost.set)
    await lost.wait()
    attachment.close()
    with pytest.raises(OSError, match=r"refused|No such file"):
        await asyncio.open_unix_connection(address_of(runtime).removeprefix("unix:"))


async def test_a_restarted_unit_issues_other_lease_ids_and_worker_names(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path)
    names = []
    for _ in range(2):
        async with serving(runtime):
            attachment = await attach(runtime.attach_path("u"), Role.DECODE, "m", "unix:x")
            names.append(attachment.worker)
        attachment.close()
    assert names[0] != names[1]
    assert all(name.startswith("decode-m#") for name in names)


async def test_a_unit_that_is_not_configured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no unit .*'other'"):
        await serve(runtime_of(tmp_path), "other", Stop(), Monitor())


async def test_a_slab_that_is_too_small_for_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a slab is too small for a token block of m"):
        await serve(runtime_of(tmp_path, slab=4096), "u", Stop(), Monitor())
    assert not runtime_of(tmp_path).attach_path("u").exists()


# Units on a GPU


@pytest.fixture(scope="module")
def fake_driver() -> CudaDriver:
    """Loads the fake driver into this process, where `libcuda.so.1` is it from then on."""
    return CudaDriver(fake_driver_library())


@pytest.mark.parametrize(
    ("settings", "transport"),
    [
        ({}, Transport.VMM_FD),
        ({"require_ipc": True}, Transport.VMM_FD),
        ({"legacy_ipc": True, "require_ipc": True}, Transport.LEGACY_IPC),
    ],
)
def test_the_memory_of_a_unit_on_a_gpu_holds_its_pool_and_the_images_of_its_models(
    tmp_path: Path, fake_driver: CudaDriver, settings: dict[str, Any], transport: Transport
) -> None:
    runtime = cuda_runtime(tmp_path, **settings)
    memory = open_memory(runtime, runtime.unit("u"))
    assert (memory.kind, memory.transport) == (CUDA, transport)
    assert [segment.size_bytes for segment in memory.shards[0].segments] == [4 * MIB]
    weights = memory.weights("m")
    assert weights is not None and weights.segment.size_bytes == 4 * MIB, "3 MiB, rounded up"
    memory.close()


def test_a_unit_is_refused_on_another_gpu_than_its_own(tmp_path: Path, fake_driver: CudaDriver) -> None:
    runtime = cuda_runtime(tmp_path, uuid=OTHER_UUID)
    message = rf"unit u is on {OTHER_UUID}, the first visible GPU of its kvstore is {UUID}: set CUDA_VISIBLE_DEVICES="
    with pytest.raises(DeviceError, match=message):
        open_memory(runtime, runtime.unit("u"))


def test_a_unit_that_requires_gpu_ipc_takes_no_other_transport(tmp_path: Path) -> None:
    config = cuda_runtime(tmp_path, require_ipc=True).unit("u")
    memory = HostMemory(MIB)
    with pytest.raises(DeviceError, match="unit u has require_ipc, but its memory is shared by host shm"):
        check_transport(config, memory)
    check_transport(config.model_copy(update={"require_ipc": False}), memory)
    memory.close()


async def test_the_status_names_the_transport(tmp_path: Path, fake_driver: CudaDriver) -> None:
    for runtime, transport in ((runtime_of(tmp_path), "host shm"), (cuda_runtime(tmp_path), "vmm fd")):
        async with serving(runtime) as channel:
            stub: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel)
            response = await stub.GetUnitStatus(kvstore_pb2.GetUnitStatusRequest())
            assert response.unit.transport == transport


@pytest.mark.parametrize(("file", "is_reserved"), [(None, False), (Path("/sys/fs/cgroup/memory.max"), True)])
async def test_pool_and_swap_are_allocated_at_the_start_under_a_limit_of_a_cgroup(
    file: Path | None, is_reserved: bool
) -> None:
    memory, swap_fd = HostMemory(MIB), new_memfd("swap", MIB)
    await reserve_host_memory(memory, swap_fd, MemoryLimit(1 << 40, file))
    (segment,) = memory.shards[0].segments
    assert segment.fd is not None
    allocated = [os.fstat(fd).st_blocks * 512 for fd in (segment.fd, swap_fd)]
    assert allocated == ([MIB, MIB] if is_reserved else [0, 0])
    memory.close()
    os.close(swap_fd)
