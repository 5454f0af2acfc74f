"""A pool that is too small: answers go to host memory and come back, and none of them changes."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from muxmesh.client.aio import Completion
from muxmesh.models.tokenizer import load_text_model
from tests.support.mesh import RunningMesh, running_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = pytest.mark.mesh

POOL_BYTES = 1 << 20
NUM_ANSWERS = 5


def unit_of(folder: Path, swap: str, **model: Any) -> dict[str, Any]:
    """A unit whose pool holds one and a half of the answers below."""
    served = {"name": "tiny", "source": str(folder), "threads": 1, "kv_answer_tokens": 64, "max_num_seqs": 8, **model}
    return {"name": "unit0", "kv_pool": POOL_BYTES, "slab": "64KiB", "kv_swap": swap, "models": [served]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(num_heads=4, num_kv_heads=4, head_dim=32)
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), shape)


async def options_of(mesh: RunningMesh) -> dict[str, Any]:
    """Each answer takes two thirds of the pool."""
    (model,) = (await mesh.unit()).models
    num_tokens = model.num_free_token_blocks * 16 * 2 // 3
    return {"max_new_tokens": num_tokens, "temperature": 1.0, "ignore_eos": True, "bypass_prefix_cache": True}


async def together(mesh: RunningMesh, **options: Any) -> list[Completion]:
    prompts = (f"The story number {seed}" for seed in range(NUM_ANSWERS))
    return list(
        await asyncio.gather(
            *(mesh.client.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(prompts))
        )
    )


async def alone(mesh: RunningMesh, **options: Any) -> list[Completion]:
    return [await mesh.client.generate(f"The story number {seed}", seed=seed, **options) for seed in range(NUM_ANSWERS)]


def tokens(answers: list[Completion]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def num_restarts(answers: list[Completion]) -> int:
    return sum(answer.timings.num_restarts for answer in answers)


async def test_raw_swap_changes_no_token_and_begins_nothing_anew(folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(folder, "8MiB")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        answers = await together(mesh, **options)
        assert tokens(answers) == tokens(expected)
        assert num_restarts(answers) == 0
        unit = await mesh.unit()
        (decode,) = (worker for worker in unit.workers if worker.role == "decode")
        assert decode.swap_out_bytes == decode.swap_in_bytes > 0
        assert decode.swap_s > 0
        assert decode.swap_out_bytes % (16 * (await mesh.client.list_models())[0].kv_bytes_per_token) == 0
        await mesh.until_free()
        assert (await mesh.unit()).pool.swap_used_bytes == 0


async def test_int8_is_asked_for_by_model_or_request_and_stays_out_of_the_prefix_cache(
    folder: Path, tmp_path: Path
) -> None:
    """The room is enough for all of the answers as int8, and for one and a half of them as they are."""
    async with running_mesh(tmp_path, units=[unit_of(folder, "1MiB", kv_swap_format="int8")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        answers = await together(mesh, **options)
        assert num_restarts(answers) == 0
        assert [len(answer.token_ids) for answer in answers] == [len(answer.token_ids) for answer in expected]
        (decode,) = (worker for worker in (await mesh.unit()).workers if worker.role == "decode")
        block_bytes = 16 * (await mesh.client.list_models())[0].kv_bytes_per_token
        assert decode.swap_out_bytes > 0
        encode = load_text_model(folder).encode
        for seed, answer in enumerate(answers):  # were anything of int8 cached, the numbers would differ a little
            prompt = [*encode(f"The story number {seed}", True), *answer.token_ids]
            cached, anew = [
                await mesh.client.generate(
                    prompt, max_new_tokens=1, temperature=0, logprobs=5, bypass_prefix_cache=anew
                )
                for anew in (False, True)
            ]
            assert cached.logprobs == anew.logprobs
        before = decode.swap_out_bytes
        assert tokens(await together(mesh, **options, kv_swap_format="raw")) == tokens(expected)
        (decode,) = (worker for worker in (await mesh.unit()).workers if worker.role == "decode")
        assert decode.swap_out_bytes > before
        assert (decode.swap_out_bytes - before) % block_bytes == 0
        await mesh.until_free()


async def test_without_room_to_swap_to_an_answer_begins_anew(folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(folder, "32KiB")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        answers = await together(mesh, **options)
        assert tokens(answers) == tokens(expected)
        assert num_restarts(answers) > 0
        await mesh.until_free()
        assert (await mesh.unit()).pool.swap_used_bytes == 0


async def test_a_worker_killed_while_answers_are_swapped_changes_no_token(folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(folder, "8MiB")]) as mesh:
        options = await options_of(mesh)
        expected = await alone(mesh, **options)
        running = asyncio.ensure_future(together(mesh, **options))

        async def is_swapped() -> bool:
            return (await mesh.unit()).pool.num_swapped_leases > 0

        await mesh.until(is_swapped)
        os.kill(mesh.pid("decode/tiny"), signal.SIGKILL)
        answers = await running
        assert tokens(answers) == tokens(expected)
        assert num_restarts(answers) > 0
        await mesh.until_free()
        pool = (await mesh.unit()).pool
        assert pool.swap_used_bytes == 0
        assert pool.num_leases_orphaned > 0


async def test_a_cancelled_answer_that_is_swapped_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    async with running_mesh(tmp_path, units=[unit_of(folder, "8MiB")]) as mesh:
        options = await options_of(mesh)
        running = asyncio.ensure_future(together(mesh, **options))

        async def is_swapped() -> bool:
            return (await mesh.unit()).pool.num_swapped_leases > 0

        await mesh.until(is_swapped)
        running.cancel()
        await mesh.until_free()
        assert (await mesh.unit()).pool.swap_used_bytes == 0


@pytest.mark.parametrize("swap", ["0", "8MiB"])
async def test_what_is_lent_to_endless_answers_comes_back_to_who_can_claim_it(tmp_path: Path, swap: str) -> None:
    greedy = {"name": "greedy", "engine": "sim", "kv_answer_tokens": 1000, "sim": {"base_s": 0.01}}
    modest = {
        "name": "modest", "engine": "sim", "kv_answer_tokens": 1000, "sim": {"output_tokens": 5},
        "kv_guaranteed": "512KiB",
    }  # fmt: skip
    unit = {"kv_pool": POOL_BYTES, "slab": "64KiB", "kv_swap": swap, "models": [greedy, modest]}
    async with running_mesh(tmp_path, units=[unit]) as mesh:
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
        assert not any(answer.done() for answer in running)
        answers = await asyncio.gather(*running)
        assert {answer.token_ids for answer in answers} == {expected.token_ids}
        assert (sum(answer.timings.num_restarts for answer in answers) == 0) is (swap != "0")
        await mesh.until_free()
