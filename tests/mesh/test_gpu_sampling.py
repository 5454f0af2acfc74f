"""Sampling and swap of a unit on a fake GPU, compared with a unit on the CPU that serves the same model."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from muxmesh.client import Completion
from muxmesh.types import KvFormat
from tests.support.gpu_machine import gpu_machine
from tests.support.mesh import RunningMesh, running_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

POOL_BLOCKS = 8
PROMPTS = [list(range(first, first + 50)) for first in (5, 60)]
"""Each takes four token blocks, and a fifth with its output, so that both outputs do not fit in the GPU's pool."""
OUTPUT: dict[str, Any] = {"max_new_tokens": 22, "temperature": 1.0, "ignore_eos": True, "bypass_prefix_cache": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    shape = TinyShape(num_heads=2, num_kv_heads=2, head_dim=256, seed=3)
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), shape)
    model = {"source": str(folder), "max_num_seqs": 2, "max_model_len": 128, "kv_answer_tokens": 8}
    cpu = {"name": "host", "kv_pool": "4MiB", "slab": "256KiB", "models": [{"name": "cpu", "threads": 1, **model}]}
    slab = 2 * 2 * 2 * 16 * 256 * 4  # one token block: two layers, two heads, K and V
    gpu = {
        "name": "device", "device": "cuda:0", "kv_pool": POOL_BLOCKS * slab, "slab": slab, "kv_swap": "4MiB",
        "preemption_mode": "swap", "models": [{"name": "gpu", **model}],
    }  # fmt: skip
    with gpu_machine():
        async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[cpu, gpu]) as running:
            yield running


async def both(mesh: RunningMesh, prompt: str, **options: Any) -> tuple[Completion, Completion]:
    """The output of the GPU, then of the CPU."""
    gpu, cpu = await asyncio.gather(*(mesh.client.generate(prompt, model=name, **options) for name in ("gpu", "cpu")))
    return gpu, cpu


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.5, "seed": 8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"temperature": 1.0, "seed": 9, "logit_bias": {40: 5.0}, "min_new_tokens": 5, "logprobs": 3},
        {"temperature": 0, "allowed_token_ids": [5, 9, 40, 41], "prompt_logprobs": 2, "logprobs": 1},
    ],
)
async def test_the_gpu_samples_and_scores_as_the_cpu(mesh: RunningMesh, options: dict[str, Any]) -> None:
    gpu, cpu = await both(mesh, "The quick brown", max_new_tokens=8, **options)
    assert gpu.token_ids == cpu.token_ids
    assert len(gpu.logprobs) == len(cpu.logprobs)
    for ours, expected in zip(gpu.logprobs, cpu.logprobs, strict=True):
        assert [one.token_id for one in ours.top] == [one.token_id for one in expected.top]
        assert ours.chosen.logprob == pytest.approx(expected.chosen.logprob, abs=1e-4)


@pytest.mark.parametrize("kv_format", ["raw", pytest.param("int8", marks=pytest.mark.long)])
async def test_sequences_that_do_not_fit_are_swapped_and_continue(mesh: RunningMesh, kv_format: KvFormat) -> None:
    before = await swapped_bytes(mesh)
    outputs = await asyncio.gather(
        *(mesh.client.generate(prompt, model="gpu", seed=3, kv_swap_format=kv_format, **OUTPUT) for prompt in PROMPTS)
    )
    expected = [await mesh.client.generate(prompt, model="cpu", seed=3, **OUTPUT) for prompt in PROMPTS]
    assert sum(one.timings.num_restarts for one in outputs) == 0
    assert await swapped_bytes(mesh) > before
    assert [len(one.token_ids) for one in outputs] == [22, 22]
    if kv_format == "raw":
        assert [one.token_ids for one in outputs] == [one.token_ids for one in expected]


async def swapped_bytes(mesh: RunningMesh) -> int:
    """Bytes that the decode worker on the GPU copied out; all of them were copied back."""
    (unit,) = (unit for unit in (await mesh.client.status()).units if unit.device == "cuda:0")
    (decode,) = (worker for worker in unit.workers if worker.role == "decode")
    assert decode.swap_out_bytes == decode.swap_in_bytes
    return decode.swap_out_bytes
