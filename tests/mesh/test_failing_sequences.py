"""A mesh of a tiny real model that computes no finite logits after one of its tokens: only its sequences fail."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from muxmesh.errors import SequenceFailed
from muxmesh.models.tokenizer import load_text_model
from tests.support.mesh import RunningMesh, collect, running_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

PROMPT = "The quick brown fox jumps over the lazy dog. " * 3
NOT_FINITE = "the model computed logits that are not finite after the token at position"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights are finite. V of the token of "~" overflows: no other token has anything in the first dimension."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), TinyShape(tied=False))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 0.0
    embedding[bad_token(folder), 0] = 100.0
    weights["model.layers.0.input_layernorm.weight"][0] = 1.0
    weights["model.layers.0.self_attn.v_proj.weight"][:, 0] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def bad_token(folder: Path) -> int:
    (token_id,) = load_text_model(folder).encode("~", False)
    return token_id


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    model = {"name": "m", "source": str(folder), "prefill_token_budget": 48, "threads": 2}
    unit = {"kv_pool": "8MiB", "slab": "256KiB", "models": [model]}
    async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[unit]) as running:
        yield running


async def num_restarts(mesh: RunningMesh) -> int:
    (model,) = (await mesh.client.status()).models
    return model.num_restarts


async def test_a_prompt_with_the_token_fails_by_name_at_once_and_the_others_go_on(mesh: RunningMesh) -> None:
    options: dict[str, Any] = {"model": "m", "max_new_tokens": 60, "temperature": 0.7, "seed": 5, "ignore_eos": True}
    alone = await mesh.client.generate(PROMPT, **options)
    beside = [asyncio.create_task(mesh.client.generate(PROMPT, **options)) for _ in range(3)]
    for position in (135, 20):  # in the last chunk of the prompt, and in its first
        with pytest.raises(SequenceFailed, match=NOT_FINITE):
            await mesh.client.generate(f"{PROMPT[:position]}~{PROMPT[position:]}", **options)
    assert [one.token_ids for one in await asyncio.gather(*beside)] == [alone.token_ids] * 3
    assert await num_restarts(mesh) == 0
    await mesh.until_free()


async def test_nothing_that_was_computed_for_a_failed_prompt_is_shared(mesh: RunningMesh) -> None:
    prompt = "Nothing of this is in the prefix cache so far. " * 3
    with pytest.raises(SequenceFailed):
        await mesh.client.generate(f"{prompt}~", model="m", max_new_tokens=4)
    await mesh.until_free()
    assert (await mesh.client.generate(prompt, model="m", max_new_tokens=4)).prompt.num_cached_tokens == 0


async def test_an_output_with_the_token_fails_after_the_tokens_before_it(mesh: RunningMesh, folder: Path) -> None:
    tokens: list[int] = []
    with pytest.raises(SequenceFailed, match=NOT_FINITE):
        async for delta in mesh.client.stream(
            PROMPT, model="m", max_new_tokens=9, allowed_token_ids=[bad_token(folder)], ignore_eos=True
        ):
            tokens += delta.token_ids
    assert tokens in ([], [bad_token(folder)]), (
        "the token was sampled from finite logits, but the error may overtake it"
    )
    _, after, _ = await collect(mesh.client.stream(PROMPT, model="m", max_new_tokens=9, ignore_eos=True))
    assert len(after) == 9
    assert await num_restarts(mesh) == 0


async def test_a_prompt_is_not_scored_behind_the_token(mesh: RunningMesh) -> None:
    with pytest.raises(SequenceFailed, match=NOT_FINITE):
        await mesh.client.generate("ab~cd", model="m", max_new_tokens=1, prompt_logprobs=1)
    scored = await mesh.client.generate("abcd", model="m", max_new_tokens=1, prompt_logprobs=1)
    assert len(scored.prompt.logprobs) == scored.prompt.num_tokens - 1
