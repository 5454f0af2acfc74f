"""Worker processes, run on this event loop, and a real unit."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import decode_svc.service
import prefill_svc.service
from kvstore.grant_page import Word
from muxmesh.block_hashes import block_hashes
from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.engine.api import EngineJob
from muxmesh.errors import ConfigError
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from muxmesh.lifecycle import Stop
from muxmesh.machine_limits import MemoryLimit, num_usable_cores
from muxmesh.metrics.monitor import Monitor
from muxmesh.models.host_memory import WORKER_BYTES
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.weight_image import ensure_image
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.types import EngineRequest, KvDemand, Lease, LeaseRef, Role, Sampling, SchedulingState, Stopping
from tests.support.engines import running_engine
from tests.support.tiny import TinyShape, write_tiny_model
from tests.support.worker_unit import IDENTITY, RunningUnit, running_unit
from worker.worker_process import OpenServices, Services, WorkerContext, check_memory, host_worker, set_up_threads

OPEN: dict[Role, OpenServices] = {
    Role.PREFILL: prefill_svc.service.open_services,
    Role.DECODE: decode_svc.service.open_services,
}


def make_runtime(directory: Path, **unit: Any) -> MeshRuntime:
    """A mesh of one sim model ``m`` with its sockets in ``directory`` and an unreachable Redis."""
    models = [{"name": "m", "engine": "sim", "block_size": 8, "threads": 3}]
    config = MeshConfig.model_validate({"units": [{"models": models, **unit}]})
    prepared = {"unit0": {"m": PreparedModel(folder=None, image=None, weights_fingerprint="sim")}}
    redis_url = f"unix://{directory}/no-redis.sock"
    return MeshRuntime(
        config=config, run_dir=directory, cache_dir=directory / "cache", redis_url=redis_url, prepared=prepared
    )


def key(role: Role) -> ProcessKey:
    return ProcessKey(role, "unit0", "m")


@asynccontextmanager
async def unit_of(runtime: MeshRuntime, **options: Any) -> AsyncIterator[RunningUnit]:
    """The unit that the runtime's workers attach to."""
    address = runtime.endpoints()[ProcessKey("kvstore", "unit0")].address
    path = runtime.attach_path("unit0")
    async with running_unit(runtime.run_dir, address=address, attach_path=path, **options) as unit:
        yield unit


class RunningWorker:
    """A worker of one role; ``open_services`` None: its role's own."""

    def __init__(self, runtime: MeshRuntime, role: Role, open_services: OpenServices | None = None) -> None:
        self.stop = Stop()
        self.address = runtime.endpoints()[key(role)].address
        work = host_worker(runtime, key(role), open_services or OPEN[role], self.stop, Monitor())
        self.task = asyncio.create_task(work)

    async def end(self) -> None:
        self.stop.set()
        async with asyncio.timeout(20):
            await self.task


def ready(unit: RunningUnit, role: Role) -> bool:
    return bool(unit.state.ready_workers(role, "m"))


async def test_a_request_passes_from_a_prefill_to_a_decode_worker(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path)
    request = EngineRequest("r", "m", tuple(range(40, 60)), Sampling(), Stopping(5), SchedulingState(0, 0.0))
    wire = convert.request_to_wire(request)
    async with unit_of(runtime) as unit:
        workers = {role: RunningWorker(runtime, role) for role in Role}
        await unit.until(lambda: all(ready(unit, role) for role in Role))
        async with (
            internal_channel(workers[Role.PREFILL].address) as prefill_channel,
            internal_channel(workers[Role.DECODE].address) as decode_channel,
        ):
            decode = decode_pb2_grpc.DecodeServiceStub(decode_channel)
            watch = decode.WatchTokens(decode_pb2.WatchTokensRequest(watcher="w"))
            await watch.initial_metadata()
            ref = await unit.credit(KvDemand(25, 25))
            (decoding,) = unit.state.ready_workers(Role.DECODE, "m")
            prefilled = await prefill_pb2_grpc.PrefillServiceStub(prefill_channel).Prefill(
                prefill_pb2.PrefillRequest(request=wire, lease=convert.ref_to_wire(ref), decode_worker=decoding.name)
            )
            finished = await decode.Decode(decode_pb2.DecodeRequest(request=wire, lease_id=ref.lease_id, watcher="w"))
            assert (len(prefilled.token_ids), finished.num_output_tokens) == (1, 5)
            page = unit.service._grants.page
            slots = [unit.service.attach.slot_of(worker) for worker in unit.state.workers if unit.service.attach]
            assert sorted(page.read(slot, Word.NUM_COMPUTED_TOKENS) for slot in slots) == [4, 20]
            watch.cancel()
        for worker in workers.values():
            await worker.end()
        assert unit.is_empty()


async def health(address: str) -> Any:
    async with internal_channel(address) as channel:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return response.status


async def test_a_worker_serves_until_it_is_stopped(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path)
    async with unit_of(runtime) as unit:
        worker = RunningWorker(runtime, Role.DECODE)
        await unit.until(lambda: ready(unit, Role.DECODE))
        assert await health(worker.address) == health_pb2.HealthCheckResponse.SERVING
        await worker.end()
        await unit.until(lambda: not ready(unit, Role.DECODE))
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await health(worker.address)


async def test_a_worker_gets_no_new_request_while_it_ends_its_calls(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path)
    async with unit_of(runtime) as unit:
        worker = RunningWorker(runtime, Role.DECODE)
        await unit.until(lambda: ready(unit, Role.DECODE))
        async with internal_channel(worker.address) as channel:
            watch = decode_pb2_grpc.DecodeServiceStub(channel).WatchTokens(decode_pb2.WatchTokensRequest(watcher="w"))
            await watch.initial_metadata()
            worker.stop.set()
            await unit.until(lambda: not ready(unit, Role.DECODE))
            assert not worker.task.done()
            watch.cancel()
        await worker.end()


async def test_a_worker_sends_heartbeats(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path)
    async with unit_of(runtime) as unit:
        worker = RunningWorker(runtime, Role.PREFILL)
        await unit.until(lambda: ready(unit, Role.PREFILL))
        await unit.until(lambda: unit.service._grants.page.read(0, Word.HEARTBEATS) >= 3)
        await worker.end()


async def test_a_worker_that_loses_its_unit_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime = make_runtime(tmp_path)
    async with unit_of(runtime) as unit:
        worker = RunningWorker(runtime, Role.PREFILL)
        await unit.until(lambda: ready(unit, Role.PREFILL))
    async with asyncio.timeout(20):
        await worker.task
    assert "giving up: the unit is lost" in caplog.text


async def test_a_worker_whose_engine_is_dead_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The engine's loop fails at a job that has no place in the order."""
    request = EngineRequest("r", "m", tuple(range(20)), Sampling(), Stopping(9), SchedulingState(0, 0.0))
    contexts: list[WorkerContext] = []

    @asynccontextmanager
    async def no_services(context: WorkerContext) -> AsyncIterator[Services]:
        contexts.append(context)
        yield {}

    runtime = make_runtime(tmp_path)
    async with unit_of(runtime) as unit:
        worker = RunningWorker(runtime, Role.DECODE, no_services)
        await unit.until(lambda: ready(unit, Role.DECODE))
        sequence = contexts[0].sequence(request, Lease(LeaseRef(1, 1), "m", (0, 1, 2)))
        contexts[0].engine.submit(EngineJob(1, sequence))
        sequence.work.state = None  # type: ignore[assignment]
        async with asyncio.timeout(20):
            await worker.task
    assert "giving up: the engine is dead: AttributeError: 'NoneType' object" in caplog.text


@pytest.mark.parametrize("num_swap_pages", [0, 1])
async def test_a_worker_has_a_swapper_if_its_unit_has_a_swap_region(tmp_path: Path, num_swap_pages: int) -> None:
    contexts: list[WorkerContext] = []

    @asynccontextmanager
    async def no_services(context: WorkerContext) -> AsyncIterator[Services]:
        contexts.append(context)
        yield {}

    runtime = make_runtime(tmp_path)
    async with unit_of(runtime, num_swap_pages=num_swap_pages) as unit:
        worker = RunningWorker(runtime, Role.DECODE, no_services)
        await unit.until(lambda: ready(unit, Role.DECODE))
        await worker.end()
    assert (contexts[0].swapper is not None) is (num_swap_pages == 1)


async def test_a_record_continues_what_its_lease_says(tmp_path: Path) -> None:
    request = EngineRequest(
        "r", "m", tuple(range(20)), Sampling(), Stopping(9), SchedulingState(0, 0.0),
        resume_token_ids=(50,), tenant="t", cache_salt="salt",
    )  # fmt: skip
    async with running_unit(tmp_path) as unit, running_engine() as engine:
        attachment = await unit.attach(Role.DECODE)
        context = unit.context(attachment, engine, unit.lease_client(attachment))
        record = context.sequence(request, Lease(LeaseRef(1, 1), "m", (4, 5, 6), 21, (51, 52)))
        assert (record.block_size, record.block_ids, record.num_computed_tokens) == (8, (4, 5, 6), 21)
        assert record.output_token_ids == (50, 51, 52)
        assert record.block_hashes(0, 2) == block_hashes(range(16), 8, IDENTITY.root("t", "salt"))
        with pytest.raises(ValueError, match="1 token blocks, needs 3"):
            context.sequence(request, Lease(LeaseRef(1, 1), "m", (4,), 7))


def test_a_worker_runs_on_the_cores_of_its_unit_and_its_threads_sleep_while_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(name, "unset")  # restored after the test
    core = min(os.sched_getaffinity(0))
    cores: list[set[int]] = []

    def set_up() -> None:
        set_up_threads(make_runtime(tmp_path, cores=[core]), key(Role.DECODE))
        cores.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=set_up)  # affinity is a thread's own
    thread.start()
    thread.join()
    assert cores == [{core}]
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")
    assert os.environ["NUMBA_CACHE_DIR"].startswith(str(tmp_path / "cache"))


def test_a_worker_whose_memory_limit_is_too_small_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_model(folder, TinyShape())
    image = ensure_image(folder, read_model_spec(folder), "panels", tmp_path, lambda done, total: None)
    runtime = make_runtime(tmp_path, models=[{"name": "m", "source": str(folder)}])
    runtime.prepared["unit0"]["m"] = PreparedModel(folder=folder, image=image, weights_fingerprint="w")
    enough_bytes, file = image.stat().st_size + WORKER_BYTES, Path("/sys/fs/cgroup/memory.max")
    check_memory(runtime, key(Role.DECODE), MemoryLimit(enough_bytes, file))
    with pytest.raises(ConfigError, match=r"^decode/m: the weights of m are .*; the memory limit of this container"):
        check_memory(runtime, key(Role.DECODE), MemoryLimit(enough_bytes - 1, file))


def test_a_worker_whose_weights_are_not_there_names_the_file(tmp_path: Path) -> None:
    runtime, image = make_runtime(tmp_path), tmp_path / "image.f32"
    runtime.prepared["unit0"]["m"] = PreparedModel(folder=None, image=image, weights_fingerprint="w")
    with pytest.raises(ConfigError) as error:
        check_memory(runtime, key(Role.DECODE), MemoryLimit(1 << 40))
    assert str(error.value) == f"decode/m: the weights cannot be read: {image}: No such file or directory"


def test_the_share_of_a_gpu_limits_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "unset")
    for name in ("OMP_WAIT_POLICY", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "unset")
    models = [{"name": "m", "compute_share": 1}]
    set_up_threads(make_runtime(tmp_path, device="cuda:0", models=models), key(Role.DECODE))
    assert os.environ["OMP_NUM_THREADS"] == str(num_usable_cores())
