"""A whole mesh with a unit on a fake GPU: memory by fd, MPS shares and interpreted kernels, against transformers."""

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio

from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc
from muxmesh.rpc.channels import internal_channel
from tests.support.fake_driver import UUID
from tests.support.gpu_machine import gpu_machine, maps
from tests.support.mesh import RunningMesh, collect, running_mesh
from tests.support.tiny import TinyShape, greedy_tokens, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

SHAPE = TinyShape(num_heads=2, num_kv_heads=1, head_dim=32, seed=3)
PROMPTS = ["Hello", "The quick brown fox. "]
TOKENS = 6
WORKERS = ("prefill/tiny", "decode/tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), SHAPE)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which the fake driver logs its calls."""
    return tmp_path_factory.mktemp("driver") / "calls"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(folder: Path, calls: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    model = {
        "name": "tiny", "source": str(folder), "max_num_seqs": 2, "max_model_len": 128, "prefill_token_budget": 16,
        "compute_share": {"prefill": 60, "decode": 40},
    }  # fmt: skip
    unit = {"device": "cuda:0", "require_ipc": True, "kv_pool": "4MiB", "slab": "256KiB", "models": [model]}
    with gpu_machine(FAKE_CUDA_LOG=str(calls)):
        async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[unit]) as running:
            yield running


async def test_greedy_outputs_equal_those_of_transformers(mesh: RunningMesh, folder: Path) -> None:
    completions = await asyncio.gather(
        *(mesh.client.generate(prompt, max_new_tokens=TOKENS, temperature=0) for prompt in PROMPTS)
    )
    assert [list(one.token_ids) for one in completions] == [greedy_tokens(folder, prompt, TOKENS) for prompt in PROMPTS]
    await mesh.until_free()


async def test_a_model_sleeps_and_wakes_and_its_weights_stay_on_the_device(mesh: RunningMesh, folder: Path) -> None:
    async with internal_channel(mesh.mesh.runtime.admin_address("router")) as channel:
        stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="unit0 is on a GPU, where one copy of the weights"):
            await stub.PutModelToSleep(admin_pb2.PutModelToSleepRequest(model="tiny", drop_weights=True))
        await stub.PutModelToSleep(admin_pb2.PutModelToSleepRequest(model="tiny"))
    assert (await mesh.unit()).models[0].state == "asleep"
    completion = await mesh.client.generate(PROMPTS[0], max_new_tokens=TOKENS, temperature=0)
    assert list(completion.token_ids) == greedy_tokens(folder, PROMPTS[0], TOKENS)
    assert (await mesh.unit()).models[0].num_wakes == 1
    await mesh.until_free()


async def test_status_names_the_device_and_how_its_memory_is_shared(mesh: RunningMesh) -> None:
    unit = await mesh.unit()
    assert (unit.device, unit.transport) == ("cuda:0", "vmm fd")
    assert sorted(worker.role for worker in unit.workers) == ["decode", "prefill"]


async def test_workers_map_one_pool_and_one_copy_of_the_weights(mesh: RunningMesh) -> None:
    """Both map the same memory, which kvstore owns and does not map."""
    inodes = [{line.split()[4] for line in maps(mesh.pid(name), "memfd:fake-cuda")} for name in WORKERS]
    assert inodes[0] == inodes[1]
    assert len(inodes[0]) == 2, "the pool and the weights"
    assert maps(mesh.pid("kvstore/unit0"), "memfd:fake-cuda") == []


async def test_no_worker_loads_the_engine_for_cpus(mesh: RunningMesh) -> None:
    """Its kernels are compiled by llvmlite."""
    assert [maps(mesh.pid(name), "llvmlite") for name in WORKERS] == [[], []]
    assert all(maps(mesh.pid(name), "libtriton") for name in WORKERS)
    assert maps(mesh.pid("kvstore/unit0"), "torch") == []


async def test_kv_is_written_into_the_imported_memory_and_no_call_of_the_driver_copies_it(
    mesh: RunningMesh, calls: Path
) -> None:
    await mesh.client.generate("Some prompt of its own", max_new_tokens=2, temperature=0)
    await mesh.until_free()
    pool = max(_device_memory(mesh), key=lambda path: path.stat().st_size)
    assert np.count_nonzero(np.fromfile(pool, dtype=np.uint32))
    pids = {str(mesh.pid(name)): name for name in (*WORKERS, "kvstore/unit0")}
    made = Counter(line.split()[1] for line in calls.read_text().splitlines() if line.split()[0] in pids)
    assert made["cuMemImportFromShareableHandle"] == 4, "pool and weights in two workers"
    assert made["cuMemCreate"] == 2
    assert not [name for name in made if name.startswith("cuMemcpy")]


def _device_memory(mesh: RunningMesh) -> list[Path]:
    descriptors = Path(f"/proc/{mesh.pid('kvstore/unit0')}/fd").iterdir()
    return [path for path in descriptors if re.search("memfd:fake-cuda", os.readlink(path))]


async def test_mps_leaves_the_share_to_green_contexts_where_percentages_make_products_wrong(mesh: RunningMesh) -> None:
    """The fake GPU has compute capability 9.0."""
    assert mesh.mesh.runtime.unit("unit0").limits_by_green_contexts
    for name in WORKERS:
        environment = Path(f"/proc/{mesh.pid(name)}/environ").read_bytes().decode().split("\0")
        assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=100" in environment
        assert f"CUDA_VISIBLE_DEVICES={UUID}" in environment


@pytest.mark.parametrize("name", WORKERS)
async def test_a_killed_worker_loses_no_token(mesh: RunningMesh, folder: Path, name: str) -> None:
    prompt, kvstore, memory = PROMPTS[1], mesh.pid("kvstore/unit0"), _device_memory(mesh)
    stream = mesh.client.stream(prompt, max_new_tokens=TOKENS, temperature=0)
    first = await anext(stream)
    os.kill(mesh.pid(name), signal.SIGKILL)
    _, tokens, _ = await collect(stream)
    assert [*first.token_ids, *tokens] == greedy_tokens(folder, prompt, TOKENS)
    await mesh.until_free()
    assert (mesh.pid("kvstore/unit0"), _device_memory(mesh)) == (kvstore, memory)
