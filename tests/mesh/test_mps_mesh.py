"""A whole mesh under MPS, with a fake GPU and a fake control program: faults of the device and of the daemon."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from muxmesh.cuda.mps import ServerStatus
from muxmesh.process_state import has_ended
from tests.support.fake_driver import device_resources
from tests.support.gpu_machine import gpu_machine
from tests.support.mesh import RunningMesh, collect, running_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

PROMPT = "The quick brown fox. "
TOKENS = 6
DAEMON = "mps-fa4ecada"
WORKERS = ("prefill/tiny", "decode/tiny")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), TinyShape(num_heads=2, num_kv_heads=1, head_dim=32))
    model = {
        "name": "tiny", "source": str(folder), "max_num_seqs": 2, "max_model_len": 128, "prefill_token_budget": 16,
        "compute_share": {"prefill": 60, "decode": 40},
    }  # fmt: skip
    unit = {
        "device": "cuda:0", "mps": "on", "green_contexts": False, "kv_pool": "4MiB", "slab": "256KiB",
        "models": [model],
    }  # fmt: skip
    with gpu_machine():
        async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[unit]) as running:
            yield running


def pool_of(mesh: RunningMesh) -> tuple[int, Counter[str]]:
    """The kvstore process and the device memory that it owns."""
    pid = mesh.pid("kvstore/unit0")
    return pid, device_resources(pid)


def workers_of(mesh: RunningMesh) -> set[int | None]:
    return {mesh.process(name).pid for name in WORKERS}


async def until_others_serve(mesh: RunningMesh, before: set[int | None]) -> None:
    """Waits until none of the processes ``before`` is left, and two workers are ready."""

    async def others_serve() -> bool:
        ready = sum(worker.ready for worker in (await mesh.unit()).workers)
        return not workers_of(mesh) & before and ready == len(WORKERS)

    async with asyncio.timeout(100):
        while not await others_serve():
            await asyncio.sleep(0.1)


@pytest_asyncio.fixture(loop_scope="module")
async def expected(mesh: RunningMesh) -> list[int]:
    completion = await mesh.client.generate(PROMPT, max_new_tokens=TOKENS, temperature=0)
    return list(completion.token_ids)


async def test_workers_are_clients_of_the_daemon_with_their_share_of_the_device(mesh: RunningMesh) -> None:
    for name, share in zip(WORKERS, ("60", "40"), strict=True):
        environment = Path(f"/proc/{mesh.process(name).pid}/environ").read_bytes().decode().split("\0")
        assert f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE={share}" in environment
    control = mesh.mesh.runtime.mps_control("unit0")
    (server,) = await control.servers()
    assert server.status is ServerStatus.ACTIVE
    assert server.clients == workers_of(mesh)


async def test_after_a_fault_all_workers_restart_on_the_same_pool_and_no_token_is_lost(
    mesh: RunningMesh, expected: list[int]
) -> None:
    pool, workers = pool_of(mesh), workers_of(mesh)
    stream = mesh.client.stream(PROMPT, max_new_tokens=TOKENS, temperature=0)
    first = await anext(stream)
    (mesh.mesh.runtime.mps_control("unit0").pipe_dir / "fake.fault").touch()
    _, tokens, _ = await collect(stream)
    assert [*first.token_ids, *tokens] == expected
    await until_others_serve(mesh, workers)
    assert pool_of(mesh) == pool
    await mesh.until_free()


async def test_after_the_end_of_its_daemon_all_workers_restart_under_another_one(
    mesh: RunningMesh, expected: list[int]
) -> None:
    pool, workers = pool_of(mesh), workers_of(mesh)
    control = mesh.mesh.runtime.mps_control("unit0")
    (server,) = await control.server_pids()
    mesh.process(DAEMON).signal(signal.SIGKILL)
    await until_others_serve(mesh, workers)
    assert has_ended(server)
    (other,) = await control.servers()
    assert other.clients == workers_of(mesh)
    assert pool_of(mesh) == pool
    completion = await mesh.client.generate(PROMPT, max_new_tokens=TOKENS, temperature=0)
    assert list(completion.token_ids) == expected
    await mesh.until_free()
