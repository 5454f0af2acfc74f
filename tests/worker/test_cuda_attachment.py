"""Workers of a unit on a GPU, on the fake driver: kvstore, prefill and decode are processes and share device memory."""

import asyncio
import json
import math
import os
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from kvstore.attach_protocol import pool_description
from kvstore.cuda_memory import CudaMemory
from kvstore.device_memory import HostMemory, Shard, new_memfd
from kvstore.unit import Unit
from kvstore.unit_model import UnitModel
from muxmesh.clock import SystemClock
from muxmesh.cuda.driver import CudaDriver
from muxmesh.device.cuda_mapping import CudaSegments
from muxmesh.device.torch_device import InterpretedDevice
from muxmesh.errors import Unavailable
from muxmesh.rpc import convert
from muxmesh.types import KvDemand, Lease, QueuedRequest, Role, SchedulingState
from muxmesh.v1 import mesh_pb2
from tests.support.cuda_unit import (
    CudaUnit,
    WorkerProcess,
    cuda_runtime,
    cuda_unit,
    next_line,
    start_kvstore,
    start_python,
)
from tests.support.cuda_worker_kv import NUM_HEADS, SHAPE, random_kv, random_q
from tests.support.fake_driver import NUM_SMS, OTHER_UUID, UUID, fake_driver_library
from tests.support.processes import ended
from tests.support.served_unit import served
from worker.attachment import WorkerDevice, map_pool
from worker.lease_client import LeaseClient

MIB = 1 << 20
LEGACY = {"legacy_ipc": True}
NUM_TOKENS = 40
"""Of a request: three token blocks."""


@pytest_asyncio.fixture
async def unit(tmp_path: Path) -> AsyncIterator[CudaUnit]:
    async with cuda_unit(tmp_path) as running:
        yield running


async def start_pair(unit: CudaUnit) -> tuple[WorkerProcess, WorkerProcess]:
    """A prefill and a decode worker."""
    prefill, decode = await asyncio.gather(unit.start_worker(Role.PREFILL), unit.start_worker(Role.DECODE))
    await unit.until(lambda status: sum(worker.ready for worker in status.workers) == 2)
    return prefill, decode


async def lease_to(unit: CudaUnit, prefill: WorkerProcess) -> tuple[LeaseClient, Lease]:
    """A lease of the prefill worker, as if the router had sent it a request."""
    router, client = unit.router(), LeaseClient(unit.channel, prefill.name)
    router.offer(QueuedRequest(1, "m", SchedulingState(0, 0.0), KvDemand(NUM_TOKENS, NUM_TOKENS)))
    credit = await router.credit()
    return client, await client.acquire(convert.ref_from_wire(credit.lease))


def num_leases(status: mesh_pb2.UnitStatus) -> int:
    return sum(model.num_leases for model in status.models)


@pytest.mark.parametrize(("settings", "transport"), [({}, "vmm fd"), (LEGACY, "legacy ipc")])
async def test_kv_is_handed_from_process_to_process_without_a_copy(
    tmp_path: Path, settings: dict[str, Any], transport: str
) -> None:
    """A kernel in the prefill process writes KV, and one in the decode process attends to it, both interpreted."""
    calls = tmp_path / "calls"
    async with cuda_unit(tmp_path, {"FAKE_CUDA_LOG": str(calls)}, **settings) as unit:
        prefill, decode = await start_pair(unit)
        for worker in (prefill, decode):
            assert worker.hello["transport"] == transport and worker.hello["device"] == UUID
            assert worker.hello["num_sms"] == [NUM_SMS, NUM_SMS]
            assert worker.hello["weights_bytes"] == 4 * MIB
        assert (await unit.status()).transport == transport
        leases, lease = await lease_to(unit, prefill)
        block_ids = list(lease.block_ids)
        assert len(block_ids) == 3
        assert await decode.run("read", block_ids) == {"bytes": [[0]] * 3}, "new memory is zero"
        await prefill.run("write_kv", block_ids, NUM_TOKENS)
        await leases.move(lease.ref, decode.name, NUM_TOKENS, (3,))
        outputs = (await decode.run("attend", block_ids, NUM_TOKENS))["outputs"]
        for layer, output in enumerate(outputs):
            assert output == pytest.approx(attention(layer), abs=1e-5)
        await prefill.run("write_weights", "packed matrices")
        assert await decode.run("read_weights", 15) == {"text": "packed matrices"}, "one copy for both"
        await leases.close()
    called = [line.split()[1] for line in calls.read_text().splitlines()]
    assert "cuMemMap" in called or "cuIpcOpenMemHandle_v2" in called
    assert not [name for name in called if "Memcpy" in name], "and no byte was copied"


def attention(layer: int) -> list[float]:
    """Attention of `random_q` over `random_kv`, in float64."""
    k, v = (kv.double().repeat_interleave(NUM_HEADS // SHAPE.num_kv_heads, 1) for kv in random_kv(layer, NUM_TOKENS))
    scores = torch.einsum("hd,nhd->hn", random_q(layer)[0].double(), k) / math.sqrt(SHAPE.head_dim)
    output: list[float] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v).flatten().tolist()
    return output


@pytest.mark.parametrize("role", list(Role))
async def test_memory_and_neighbours_survive_a_killed_worker(unit: CudaUnit, role: Role) -> None:
    before = unit.resources()
    prefill, decode = await start_pair(unit)
    victim, other = (prefill, decode) if role == Role.PREFILL else (decode, prefill)
    leases, lease = await lease_to(unit, prefill)
    block_ids = list(lease.block_ids)
    await prefill.run("write", block_ids, 9)
    if victim is decode:
        await leases.move(lease.ref, decode.name, NUM_TOKENS, (3,))
    await victim.kill()
    status = await unit.until(lambda status: len(status.workers) == 1)
    assert num_leases(status) == 0 and status.pool.num_leases_orphaned == 1 and status.pool.leased_bytes == 0
    assert await other.run("read", block_ids) == {"bytes": [[9]] * 3}
    successor = await unit.start_worker(role)
    assert await successor.run("read", block_ids) == {"bytes": [[9]] * 3}
    await successor.run("write", block_ids, 10)
    assert await other.run("read", block_ids) == {"bytes": [[10]] * 3}
    for worker in (successor, other):
        await worker.kill()
    await unit.until(lambda status: not status.workers)
    assert unit.resources() == before
    await leases.close()


@pytest.mark.parametrize("settings", [{}, LEGACY], ids=["vmm fd", "legacy ipc"])
async def test_workers_end_when_kvstore_is_killed_and_the_next_one_has_new_memory(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    async with cuda_unit(tmp_path, **settings) as unit:
        workers = await start_pair(unit)
        await workers[0].run("write", [0, 1], 5)
        unit.process.kill()
        for worker in workers:
            assert await next_line(worker.process) == {"lost": True}
            assert await worker.process.wait() == 0
    async with cuda_unit(tmp_path, **settings) as unit:
        worker = await unit.start_worker(Role.PREFILL)
        assert await worker.run("read", [0, 1]) == {"bytes": [[0], [0]]}


async def test_a_worker_on_another_device_is_refused_by_both_uuids_and_leaves_nothing(tmp_path: Path) -> None:
    machine = {"FAKE_CUDA_UUIDS": f"{UUID},{OTHER_UUID}"}
    async with cuda_unit(tmp_path, machine) as unit:
        before = unit.resources()
        worker = await unit.start_worker(Role.DECODE, CUDA_VISIBLE_DEVICES=OTHER_UUID)
        assert worker.hello["error"] == (
            f"DeviceError: the unit's memory is on {UUID}, this process computes on {OTHER_UUID}; "
            "CUDA_VISIBLE_DEVICES must be equal for all processes of the unit"
        )
        assert await worker.process.wait() == 1
        await unit.until(lambda status: not status.workers)
        assert unit.resources() == before
        swapped = await unit.start_worker(Role.DECODE, CUDA_VISIBLE_DEVICES=f"{UUID},{OTHER_UUID}")
        assert swapped.hello["device"] == UUID, "what else is visible does not matter"


@pytest.mark.parametrize(
    ("legacy_ipc", "message"),
    [
        (False, rf"cannot map {8 * MIB} bytes of shared device memory: cuMemMap failed: .* \(801\): the size differs"),
        (True, f"shared device memory has {4 * MIB} bytes, not {8 * MIB}"),
    ],
    ids=["vmm fd", "legacy ipc"],
)
async def test_a_worker_refuses_memory_of_another_size_than_the_unit_says(
    tmp_path: Path, legacy_ipc: bool, message: str
) -> None:
    driver = CudaDriver(fake_driver_library())
    memory = CudaMemory(driver, 0, 4 * MIB, {"m": MIB}, legacy_ipc)
    (segment,) = memory.shards[0].segments
    memory.shards = (Shard((replace(segment, size_bytes=8 * MIB),)),)
    unit = Unit(4 * MIB, MIB, {"m": UnitModel(SHAPE, 4, 512)})
    async with served(tmp_path, unit, SystemClock(), memory=memory) as running:
        arguments = ("-m", "tests.support.cuda_worker", str(running.attach_path), "decode")
        process = await start_python(*arguments, TRITON_INTERPRET="1")
        async with ended(process):
            assert re.match("DeviceError: " + message, (await next_line(process))["error"])
            assert await process.wait() == 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> WorkerDevice:
    """A device of this process: the fake driver, and tensors of the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    driver, interpreted = CudaDriver(fake_driver_library()), InterpretedDevice()
    return WorkerDevice(interpreted, CudaSegments(driver, interpreted.torch_device))


def test_a_worker_on_a_gpu_refuses_host_memory(device: WorkerDevice) -> None:
    memory = HostMemory(MIB)
    description = pool_description(memory, MIB, has_swap=False)
    with pytest.raises(Unavailable, match=r"pool is host memory .*; this worker maps one segment of cuda memory"):
        map_pool(description, [os.dup(fd) for fd in memory.shards[0].segments[0].fds], device)
    memory.close()


@pytest.mark.parametrize("has_swap", [False, True])
def test_a_pool_on_a_gpu_has_swap_if_its_unit_has_a_swap_region(device: WorkerDevice, has_swap: bool) -> None:
    memory = CudaMemory(device.segments.driver, 0, 4 * MIB, {})
    description, swap_fd = pool_description(memory, MIB, has_swap), new_memfd("swap", 4 * MIB)
    fds = [os.dup(fd) for fd in (*memory.shards[0].segments[0].fds, *[swap_fd] * has_swap)]
    pool = map_pool(description, fds, device)
    assert pool.has_swap is has_swap
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    device.segments.close()
    memory.close()
    os.close(swap_fd)


ATTACH_WITH_ERRORS = """
import asyncio, json, os, sys
from pathlib import Path
from muxmesh.errors import MeshError
from muxmesh.types import Role
from tests.support.fake_driver import device_resources
from worker.attachment import attach, open_worker_device
device = open_worker_device(None)
before = device_resources()
results = {}
for function in sys.argv[2].split(","):
    os.environ["FAKE_CUDA_ERRORS"] = f"{function}:304"
    try:
        asyncio.run(attach(Path(sys.argv[1]), Role.DECODE, "m", "unix:x", device))
        results[function] = ["no error", []]
    except MeshError as error:
        del os.environ["FAKE_CUDA_ERRORS"]
        results[function] = [str(error), sorted(device_resources() - before)]
print(json.dumps([results, len(os.listdir("/proc/self/fd"))]), flush=True)
os._exit(0)
"""
"""Attaches once for each function that is to fail, in less time than a detached worker may live."""


@pytest.mark.parametrize(
    ("settings", "functions"),
    [
        (
            {},
            ("cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemImportFromShareableHandle", "cuMemAddressReserve",
             "cuMemMap", "cuMemSetAccess", "cuMemRelease"),
        ),
        (LEGACY, ("cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuIpcOpenMemHandle_v2", "cuMemGetAddressRange_v2")),
    ],
    ids=["vmm fd", "legacy ipc"],
)  # fmt: skip
async def test_an_error_of_any_call_of_a_worker_is_reported_and_leaves_nothing(
    tmp_path: Path, settings: dict[str, Any], functions: tuple[str, ...]
) -> None:
    async with cuda_unit(tmp_path, **settings) as unit:
        before = unit.resources()
        arguments = ("-c", ATTACH_WITH_ERRORS, str(unit.attach_path), ",".join(functions))
        process = await start_python(*arguments, **unit.worker_environment(Role.DECODE))
        async with ended(process), asyncio.timeout(60):
            output, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        results, num_fds = json.loads(output)
        for function, (error, left) in results.items():
            assert f"{function} failed: CUDA_ERROR_OPERATING_SYSTEM (304)" in error
            # The handle that the driver does not take back is the driver's.
            assert len(left) == (function == "cuMemRelease"), left
        assert num_fds < 15
        status = await unit.until(lambda status: not status.workers)
        assert num_leases(status) == 0
        assert unit.resources() == before


@pytest.mark.parametrize(
    ("function", "settings"),
    [("cuInit", {}), ("cuMemCreate", {}), ("cuMemExportToShareableHandle", {}), ("cuMemAlloc_v2", LEGACY)],
)
async def test_a_kvstore_whose_driver_fails_ends_with_one_line(
    tmp_path: Path, function: str, settings: dict[str, Any]
) -> None:
    runtime = cuda_runtime(tmp_path, **settings)
    process = await start_kvstore(runtime, FAKE_CUDA_ERRORS=f"{function}:304")
    async with ended(process), asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode == 1
    (line,) = errors.decode().splitlines()
    assert line.startswith("ERROR muxmesh.lifecycle: cannot serve: ")
    assert f"{function} failed: CUDA_ERROR_OPERATING_SYSTEM (304)" in line
    assert not runtime.attach_path("u").exists()
