"""Services under MPS that are started one by one, with a fake GPU and a fake control program."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from muxmesh.client import MeshClient
from muxmesh.config.runtime import ProcessKey
from muxmesh.errors import Unavailable
from muxmesh.process_state import has_ended
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.types import Role
from tests.support.gpu_machine import gpu_machine
from tests.support.standalone_mesh import RestartedService, StandaloneMesh, output_of, standalone_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

WORKERS = ("prefill/tiny", "decode/tiny")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> AsyncIterator[StandaloneMesh]:
    """The workers are started before kvstore, and kvstore before the daemon."""
    folder = tmp_path_factory.mktemp("m")
    write_tiny_model(folder / "tiny", TinyShape(num_heads=2, num_kv_heads=1, head_dim=32))
    (folder / "mesh.yaml").write_text(f"""
        mesh_id: standalone-mps
        listen: {free_listen_address("127.0.0.1:0")}
        units:
          - name: gpu0
            device: 'cuda:0'
            mps: on
            kv_pool: 4MiB
            slab: 256KiB
            models:
              - {{name: tiny, source: ./tiny, max_num_seqs: 2, max_model_len: 128, prefill_token_budget: 16,
                 compute_share: {{prefill: 60, decode: 40}}}}
    """)
    with gpu_machine():
        muxmesh = (sys.executable, "-m", "muxmesh", "prepare", "-c", str(folder / "mesh.yaml"))
        await output_of(*muxmesh, "--run-dir", str(folder / "run"), "--redis-url", redis_server)
        async with standalone_mesh(folder / "run" / "runtime.json") as services:
            for role in Role:
                services.start(ProcessKey(role, "gpu0", "tiny"))
            services.start(ProcessKey("kvstore", "gpu0"))
            services.start(ProcessKey("router"), "--name", "router-a", name="router-a")
            daemon = (sys.executable, "-m", "muxmesh.supervisor.mps_daemon", "--unit", "gpu0")
            services.services["mps"] = RestartedService((*daemon, "--runtime", str(services.runtime_file)))
            await services.until_healthy("kvstore/gpu0", *WORKERS, "router-a")
            yield services


async def tokens_of(mesh: StandaloneMesh) -> tuple[int, ...]:
    async with MeshClient(mesh.runtime.config.listen) as client:
        completion = await client.generate("The quick brown fox. ", max_new_tokens=6, temperature=0)
    return completion.token_ids


async def clients_of_the_daemon(mesh: StandaloneMesh) -> set[int]:
    try:
        servers = await mesh.runtime.mps_control("gpu0").servers()
    except Unavailable:
        return set()
    return {pid for server in servers for pid in server.clients}


def workers_of(mesh: StandaloneMesh) -> set[int]:
    return {mesh.services[name].pid for name in WORKERS}


async def until_others_serve(mesh: StandaloneMesh, before: set[int]) -> None:
    """Waits until none of the workers ``before`` is left, and the others are clients of a daemon and healthy."""
    async with asyncio.timeout(100):
        while workers_of(mesh) & before or await clients_of_the_daemon(mesh) != workers_of(mesh):
            await asyncio.sleep(0.1)
    await mesh.until_healthy(*WORKERS)


async def test_workers_set_their_environment_and_become_clients_of_the_daemon(mesh: StandaloneMesh) -> None:
    assert await clients_of_the_daemon(mesh) == workers_of(mesh)
    environment = Path(f"/proc/{mesh.services['decode/tiny'].pid}/environ").read_text()
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in environment, "the environment at the start does not have it"
    assert len(await tokens_of(mesh)) == 6


@pytest.mark.long
async def test_a_fault_of_the_gpu_needs_no_more_than_that_workers_that_exit_are_started_again(
    mesh: StandaloneMesh,
) -> None:
    expected, workers, kvstore = await tokens_of(mesh), workers_of(mesh), mesh.services["kvstore/gpu0"].pid
    (mesh.runtime.mps_control("gpu0").pipe_dir / "fake.fault").touch()
    await until_others_serve(mesh, workers)
    assert await tokens_of(mesh) == expected
    assert mesh.services["kvstore/gpu0"].pid == kvstore


@pytest.mark.parametrize("victim", ["the daemon", pytest.param("its keeper", marks=pytest.mark.long)])
async def test_a_killed_daemon_needs_no_more_than_that_what_exits_is_started_again(
    mesh: StandaloneMesh, victim: str
) -> None:
    expected, workers = await tokens_of(mesh), workers_of(mesh)
    control = mesh.runtime.mps_control("gpu0")
    (server,) = await control.server_pids()
    daemon = int((control.pipe_dir / "nvidia-cuda-mps-control.pid").read_text())
    os.kill(daemon if victim == "the daemon" else mesh.services["mps"].pid, signal.SIGKILL)
    await until_others_serve(mesh, workers)
    assert has_ended(server) and has_ended(daemon)
    assert await tokens_of(mesh) == expected


@pytest.mark.long
async def test_a_killed_kvstore_takes_its_workers_along_and_all_serve_again(mesh: StandaloneMesh) -> None:
    expected, workers = await tokens_of(mesh), workers_of(mesh)
    mesh.services["kvstore/gpu0"].kill()
    await until_others_serve(mesh, workers)
    assert await tokens_of(mesh) == expected


async def test_all_services_end_in_order_with_code_0(mesh: StandaloneMesh) -> None:
    """The last test of this mesh."""
    order = ("router-a", *WORKERS, "kvstore/gpu0", "mps")
    assert [await mesh.services[name].stop() for name in order] == [0] * len(order)
    assert not await clients_of_the_daemon(mesh)
