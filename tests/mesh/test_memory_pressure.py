"""A pool of a tenth of the KV that the requests hold without pressure: all complete, with the same tokens.

Two models of different shape share it. They have a swap region for all of their KV, one for a part of it, or none.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from muxmesh.client import Completion
from muxmesh.execution import NO_EXECUTION, PreemptionReason
from muxmesh.types import blocks_for
from tests.support.mesh import RunningMesh, running_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

SHAPES = {
    "mqa": TinyShape(num_heads=6, num_kv_heads=1, head_dim=32, num_layers=3, seed=2),
    "mha": TinyShape(num_heads=4, num_kv_heads=4, head_dim=32),
}
NUM_REQUESTS = 16
"""Of each model. An even one is greedy, an odd one sampled from a seed."""
SLAB_BYTES = 64 << 10
"""Five token blocks of one model, two of the other."""
KV_BYTES_PER_TOKEN = {"mqa": 768, "mha": 2048}
BLOCK_SIZE = 16


def prompt_of(number: int) -> str:
    return f"The story number {number} " + "and so on " * (number % 4)


def num_output_tokens(number: int) -> int:
    return 180 + 4 * number


def peak_slabs() -> int:
    """Slabs that all requests hold at once at their full length. A byte of a prompt is a token."""
    slabs = 0
    for token_bytes in KV_BYTES_PER_TOKEN.values():
        blocks = sum(
            blocks_for(len(prompt_of(number)) + 1 + num_output_tokens(number), BLOCK_SIZE)
            for number in range(NUM_REQUESTS)
        )
        slabs += blocks_for(blocks, SLAB_BYTES // (BLOCK_SIZE * token_bytes))
    return slabs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_model(tmp_path_factory.mktemp(name), shape) for name, shape in SHAPES.items()}


def config_of(folders: dict[str, Path], num_slabs: int, swap: str) -> dict[str, Any]:
    models = [
        {
            "name": name, "source": str(folder), "threads": 1, "kv_answer_tokens": 16, "max_num_seqs": NUM_REQUESTS,
            "block_size": BLOCK_SIZE,
        }
        for name, folder in folders.items()
    ]  # fmt: skip
    pool = {"kv_pool": num_slabs * SLAB_BYTES, "slab": SLAB_BYTES, "kv_swap": swap}
    unit = {**pool, "preemption_mode": "auto" if swap == "0" else "swap", "models": models}
    return {"units": [unit], "metrics": {"listen": "127.0.0.1:0"}}


async def serve_all(mesh: RunningMesh) -> list[Completion]:
    """All requests of both models at once."""
    return list(
        await asyncio.gather(
            *(
                mesh.client.generate(
                    prompt_of(number),
                    model=name,
                    max_new_tokens=num_output_tokens(number),
                    ignore_eos=True,
                    temperature=float(number % 2),
                    seed=number,
                    explain_scheduling=True,
                )
                for number in range(NUM_REQUESTS)
                for name in SHAPES
            )
        )
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[list[tuple[int, ...]]]:
    """The tokens of a run without pressure."""
    config = config_of(folders, num_slabs=4 * peak_slabs(), swap="0")
    async with running_mesh(tmp_path_factory.mktemp("unpressed"), **config) as mesh:
        infos = await mesh.client.list_models()
        assert {one.name: one.kv_bytes_per_token for one in infos} == KV_BYTES_PER_TOKEN
        completions = await serve_all(mesh)
        assert (await mesh.metrics()).value("vllm:num_preemptions_total") == 0
    yield [one.token_ids for one in completions]


@pytest.mark.parametrize(
    "swap",
    [
        pytest.param("16MiB", id="swap", marks=pytest.mark.long),
        pytest.param("384KiB", id="too little swap"),
        pytest.param("0", id="no swap", marks=pytest.mark.long),
    ],
)
async def test_every_request_completes_with_the_tokens_of_a_run_without_pressure(
    folders: dict[str, Path], expected: list[tuple[int, ...]], tmp_path: Path, swap: str
) -> None:
    config = config_of(folders, num_slabs=peak_slabs() // 10, swap=swap)
    async with running_mesh(tmp_path, **config) as mesh:
        completions = await serve_all(mesh)
        assert [one.token_ids for one in completions] == expected
        scrape = await mesh.metrics()
        by_reason = {one: scrape.value("muxmesh_preemptions_total", reason=one) for one in PreemptionReason}
        assert sum(count for reason, count in by_reason.items() if reason.is_memory) > 0
        total = NO_EXECUTION
        for one in completions:
            assert one.execution is not None
            total = total.plus(one.execution)
        assert total.preemptions == {reason: count for reason, count in by_reason.items() if count}
        assert total.num_recomputed == scrape.value("muxmesh_recomputed_sequences_total")
        assert (total.swapped_s > 0, total.recomputed_s > 0) == (swap != "0", total.num_recomputed > 0)
        for direction in ("out", "in"):
            assert (scrape.value("muxmesh_swap_copied_bytes_total", direction=direction) > 0) is (swap != "0")
        if swap != "16MiB":
            assert scrape.value("muxmesh_request_restarts_total") > 0, "none was computed again"
        assert scrape.value("muxmesh_requests_total", code="OK") == 2 * NUM_REQUESTS
        await mesh.until_free()  # each status checks the integrity of the unit
        unit = await mesh.unit()
        assert all(model.num_leased_token_blocks == model.num_leases == 0 for model in unit.models)
        assert all(worker.num_leases == 0 for worker in unit.workers)
        assert unit.pool.swap_used_bytes == unit.pool.num_swapped_leases == 0
        assert unit.pool.leased_bytes == unit.pool.num_leases_orphaned == 0
