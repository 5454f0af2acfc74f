"""A pool that is too small for all outputs: KV is swapped out to host memory and back, and no token changes."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from muxmesh.client import Completion
from muxmesh.models.tokenizer import load_text_model
from tests.support.mesh import RunningMesh, running_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = pytest.mark.mesh

POOL_BYTES = 1 << 20
NUM_OUTPUTS = 5


def unit_of(folder: Path, swap: str, **model: Any) -> dict[str, Any]:
    """A unit whose pool holds the KV of one and a half outputs of `options_of`, and that swaps whatever it costs."""
    served = {"name": "tiny", "source": str(folder), "threads": 1, "kv_answer_tokens": 64, "max_num_seqs": 8, **model}
    unit = {"name": "unit0", "kv_pool": POOL_BYTES, "slab": "64KiB", "kv_swap": swap, "preemption_mode": "swap"}
    return {**unit, "models": [served]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(num_heads=4, num_kv_heads=4, head_dim=32)
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), shape)


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same KV for each token, but a step takes some 10 ms: sequences stay swapped out for seconds."""
    shape = TinyShape(num_heads=4, num_kv_heads=4, head_dim=32, hidden_size=2048)
    return write_tiny_model(tmp_path_factory.mktemp("slow"), shape)


async def options_of(mesh: RunningMesh) -> dict[str, Any]:
    """Options for outputs that take two thirds of the pool each."""
    (model,) = (await mesh.unit()).models
    num_tokens = model.num_free_token_blocks * 16 * 2 // 3
    return {"max_new_tokens": num_tokens, "temperature": 1.0, "ignore_eos": True, "bypass_prefix_cache": True}


async def together(mesh: RunningMesh, **options: Any) -> list[Completion]:
    prompts = (f"The story number {seed}" for seed in range(NUM_OUTPUTS))
    return list(
        await asyncio.gather(
            *(mesh.client.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(prompts))
        )
    )


async def alone(mesh: RunningMesh, **options: Any) -> list[Completion]:
    return [await mesh.client.generate(f"The story number {seed}", seed=seed, **options) for seed in range(NUM_OUTPUTS)]


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def num_restarts(completions: list[Completion]) -> int:
    return sum(completion.timings.num_restarts for completion in completions)


async def test_raw_swap_changes_no_token_and_restarts_no_request(folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(folder, "8MiB")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        completions = await together(mesh, **options)
        assert tokens(completions) == tokens(expected)
        assert num_restarts(completions) == 0
        unit = await mesh.unit()
        (decode,) = (worker for worker in unit.workers if worker.role == "decode")
        assert decode.swap_out_bytes == decode.swap_in_bytes > 0
        assert decode.swap_s > 0
        assert decode.swap_out_bytes % (16 * (await mesh.client.list_models())[0].kv_bytes_per_token) == 0
        await mesh.until_free()
        assert (await mesh.unit()).pool.swap_used_bytes == 0


async def test_int8_is_set_by_model_or_request_and_stays_out_of_the_prefix_cache(folder: Path, tmp_path: Path) -> None:
    """The swap space holds the KV of all outputs as int8, or of one and a half as raw."""
    async with running_mesh(tmp_path, units=[unit_of(folder, "1MiB", kv_swap_format="int8")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        completions = await together(mesh, **options)
        assert num_restarts(completions) == 0
        assert [len(ids) for ids in tokens(completions)] == [len(ids) for ids in tokens(expected)]
        (decode,) = (worker for worker in (await mesh.unit()).workers if worker.role == "decode")
        block_bytes = 16 * (await mesh.client.list_models())[0].kv_bytes_per_token
        assert decode.swap_out_bytes > 0
        encode = load_text_model(folder).encode
        for seed, completion in enumerate(completions):  # with int8 KV in the cache the logprobs would differ slightly
            prompt = [*encode(f"The story number {seed}", True), *completion.token_ids]
            cached, recomputed = [
                await mesh.client.generate(
                    prompt, max_new_tokens=1, temperature=0, logprobs=5, bypass_prefix_cache=bypass
                )
                for bypass in (False, True)
            ]
            assert cached.logprobs == recomputed.logprobs
        before = decode.swap_out_bytes
        assert tokens(await together(mesh, **options, kv_swap_format="raw")) == tokens(expected)
        (decode,) = (worker for worker in (await mesh.unit()).workers if worker.role == "decode")
        assert decode.swap_out_bytes > before
        assert (decode.swap_out_bytes - before) % block_bytes == 0
        await mesh.until_free()


async def test_a_pre_empted_request_restarts_if_the_swap_space_is_full(folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(folder, "32KiB")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        completions = await together(mesh, **options)
        assert tokens(completions) == tokens(expected)
        assert num_restarts(completions) > 0
        await mesh.until_free()
        assert (await mesh.unit()).pool.swap_used_bytes == 0


async def test_a_worker_killed_while_kv_is_swapped_out_changes_no_token(slow_folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(slow_folder, "8MiB")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        running = asyncio.ensure_future(together(mesh, **options))

        async def is_swapped() -> bool:
            return (await mesh.unit()).pool.num_swapped_leases > 0

        await mesh.until(is_swapped)
        os.kill(mesh.pid("decode/tiny"), signal.SIGKILL)
        completions = await running
        assert tokens(completions) == tokens(expected)
        assert num_restarts(completions) > 0
        await mesh.until_free()
        pool = (await mesh.unit()).pool
        assert pool.swap_used_bytes == 0
        assert pool.num_leases_orphaned > 0


async def test_cancelling_a_swapped_request_frees_its_pages(slow_folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(slow_folder, "8MiB")]) as mesh:
        options = await options_of(mesh)
        running = asyncio.ensure_future(together(mesh, **options))

        async def is_swapped() -> bool:
            return (await mesh.unit()).pool.num_swapped_leases > 0

        await mesh.until(is_swapped)
        running.cancel()
        await mesh.until_free()
        assert (await mesh.unit()).pool.swap_used_bytes == 0


@pytest.mark.parametrize("swap", [pytest.param("0", marks=pytest.mark.long), "8MiB"])
async def test_a_model_reclaims_its_quota_from_long_outputs_of_another(tmp_path: Path, swap: str) -> None:
    greedy = {"name": "greedy", "engine": "sim", "kv_answer_tokens": 1000, "sim": {"base_s": 0.01}}
    modest = {
        "name": "modest", "engine": "sim", "kv_answer_tokens": 1000, "sim": {"output_tokens": 5},
        "kv_guaranteed": "512KiB",
    }  # fmt: skip
    unit = {"kv_pool": POOL_BYTES, "slab": "64KiB", "kv_swap": swap, "preemption_mode": "swap"}
    async with running_mesh(tmp_path, units=[{**unit, "models": [greedy, modest]}]) as mesh:
        info = {model.name: model for model in await mesh.client.list_models()}["greedy"]
        num_tokens = POOL_BYTES // info.kv_bytes_per_token // 4 - 8
        options: dict[str, Any] = {"model": "greedy", "max_new_tokens": num_tokens, "temperature": 0}
        expected = await mesh.client.generate("Hello", **options)
        running = [asyncio.ensure_future(mesh.client.generate("Hello", **options)) for _ in range(4)]

        async def is_full() -> bool:
            status = {model.model: model for model in (await mesh.unit()).models}["modest"]
            return status.num_free_token_blocks * 16 < num_tokens

        await mesh.until(is_full)
        await mesh.client.generate("Hello", model="modest", max_new_tokens=num_tokens - 60, temperature=0)
        assert not any(request.done() for request in running)
        completions = await asyncio.gather(*running)
        assert set(tokens(completions)) == {expected.token_ids}
        assert (num_restarts(completions) == 0) is (swap != "0")
        await mesh.until_free()
