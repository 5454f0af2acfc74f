"""A mesh of two tiny random Llama models of different shapes that share one KV pool: exact tokens, no copied KV."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from muxmesh.models.tokenizer import load_text_model
from muxmesh.v1 import inference_pb2
from tests.support.mesh import RunningMesh, collect, running_mesh
from tests.support.tiny import TinyShape, greedy_tokens, reference, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

SHAPES = {"gqa": TinyShape(), "mha": TinyShape(num_heads=3, num_kv_heads=3, head_dim=16, seed=1)}
PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog. " * 4, "x", "äöü 你好 🎉", "1 + 1 = "]
TOKENS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_model(tmp_path_factory.mktemp(name), shape) for name, shape in SHAPES.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    models = [
        {"name": name, "source": str(folder), "prefill_token_budget": 48, "threads": 2}
        for name, folder in folders.items()
    ]
    unit = {"kv_pool": "8MiB", "slab": "256KiB", "models": models}
    metrics = {"listen": "127.0.0.1:0"}
    async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[unit], metrics=metrics) as running:
        yield running


async def test_greedy_outputs_of_both_models_side_by_side_equal_those_of_transformers(
    mesh: RunningMesh, folders: dict[str, Path]
) -> None:
    requests = [(name, prompt) for name in folders for prompt in PROMPTS]
    completions = await asyncio.gather(
        *(mesh.client.generate(prompt, model=name, max_new_tokens=TOKENS, temperature=0) for name, prompt in requests)
    )
    for (name, prompt), completion in zip(requests, completions, strict=True):
        assert list(completion.token_ids) == greedy_tokens(folders[name], prompt, TOKENS), (name, prompt)
    await mesh.until_free()


def pool_of(mesh: RunningMesh) -> np.ndarray:
    """A copy of the unit's pool, read from the shared memory as 32-bit words."""
    pid = mesh.pid("kvstore/unit0")
    descriptors = Path(f"/proc/{pid}/fd").iterdir()
    pool = next(path for path in descriptors if "memfd:muxmesh-kv-pool" in os.readlink(path))
    return np.fromfile(pool, dtype=np.uint32)


async def test_a_hand_off_copies_no_kv_byte(mesh: RunningMesh) -> None:
    """Compares the pool before the request, after prefill and after decode: decode adds KV and changes none."""
    info = {model.name: model for model in await mesh.client.list_models()}["gqa"]
    words_per_token = info.kv_bytes_per_token // 4
    workers = {worker.role: worker for worker in (await mesh.unit()).workers if worker.model == "gqa"}
    handoffs = (await mesh.unit()).pool.num_handoffs
    before = pool_of(mesh)
    stream = mesh.client.stream("Another prompt of some length. " * 6, model="gqa", max_new_tokens=300, ignore_eos=True)
    first = await anext(stream)
    assert first.prompt is not None and first.prompt.num_tokens == 186
    between = pool_of(mesh)
    tokens = [delta async for delta in stream]
    after = pool_of(mesh)

    # A word may be unchanged by chance. A copy of the prompt's KV would double the count.
    changed = np.flatnonzero(before != after)
    num_computed = 186 + 299
    assert len(tokens) >= 299
    assert 0.98 * num_computed * words_per_token < changed.size <= num_computed * words_per_token
    prompt_words = np.flatnonzero(before != between)
    assert prompt_words.size > 0.98 * 186 * words_per_token
    assert np.array_equal(between[prompt_words], after[prompt_words]), "decode wrote into the prompt's KV"

    unit = await mesh.unit()
    assert (unit.pool.num_handoffs, unit.pool.kv_bytes_copied) == (handoffs + 1, 0)
    for worker in (worker for worker in unit.workers if worker.model == "gqa"):
        computed = worker.num_computed_tokens - workers[worker.role].num_computed_tokens
        assert computed == {"prefill": 186, "decode": 299}[worker.role]
        assert worker.kv_bytes_written - workers[worker.role].kv_bytes_written == computed * info.kv_bytes_per_token


async def test_the_metrics_show_what_was_written_and_that_nothing_was_copied(mesh: RunningMesh) -> None:
    before = await mesh.metrics()
    await mesh.client.generate("Hello", model="gqa", max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
    await mesh.until_free()
    after = await mesh.metrics()
    info = next(one for one in await mesh.client.list_models() if one.name == "gqa")

    def added(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    computed = added("muxmesh_worker_computed_tokens_total", model_name="gqa")
    assert computed >= TOKENS
    assert added("muxmesh_kv_written_bytes_total", model_name="gqa") == computed * info.kv_bytes_per_token
    assert added("muxmesh_handoff_seconds_count", model_name="gqa", transport="host shm") == 1
    assert after.value("muxmesh_kv_copied_bytes_total") == 0


async def test_prefill_and_decode_worker_map_the_same_memory(mesh: RunningMesh) -> None:
    """Pool and weight image are the same file (device and inode) in both workers."""

    def mapped(pid: int, name: str) -> set[tuple[str, str]]:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {(line.split()[3], line.split()[4]) for line in lines if name in line}

    pids = [mesh.pid(f"{role}/gqa") for role in ("prefill", "decode")]
    for name in ("memfd:muxmesh-kv-pool", "-panels-v"):
        first, second = (mapped(pid, name) for pid in pids)
        assert first == second
        assert len(first) == 1


async def _killed_after(
    num_tokens: int, mesh: RunningMesh, prompt: str | list[int], **options: Any
) -> tuple[str, list[int], bool]:
    """Text and tokens of a request during which the decode worker of ``mha`` is killed, and whether that restarted it.

    On a fast or a busy machine the worker may have sent every token before the signal arrives.
    """
    text, tokens, is_killed, is_interrupted = "", list[int](), False, False
    async for delta in mesh.client.stream(prompt, **options):
        text, tokens = text + delta.text, tokens + list(delta.token_ids)
        if len(tokens) >= num_tokens and not is_killed:
            is_killed = True
            os.kill(mesh.pid("decode/mha"), signal.SIGKILL)
        if delta.timings is not None:
            is_interrupted = delta.timings.num_restarts > 0
    return text, tokens, is_interrupted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_a_killed_decode_worker_changes_no_token(mesh: RunningMesh, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": "mha", "max_new_tokens": 200, "temperature": temperature, "seed": 11, "ignore_eos": True,
    }  # fmt: skip
    expected = await collect(mesh.client.stream("Once upon a time", **options))
    is_interrupted = False
    while not is_interrupted:
        text, tokens, is_interrupted = await _killed_after(5, mesh, "Once upon a time", **options)
        assert (text, tokens) == expected[:2]
    await mesh.until_free()


async def test_streamed_text_consists_of_whole_characters(mesh: RunningMesh) -> None:
    """A random model samples random bytes. The deltas together equal the text decoded at once."""
    text, tokens, _ = await collect(
        mesh.client.stream("你好", model="gqa", max_new_tokens=120, temperature=5.0, seed=1, ignore_eos=True)
    )
    whole = load_text_model(Path(str(mesh.mesh.runtime.prepared_model("unit0", "gqa").folder))).decode(tokens, True)
    assert text == whole


async def test_log_probabilities_of_prompt_and_output_equal_those_of_transformers(
    mesh: RunningMesh, folders: dict[str, Path]
) -> None:
    request = inference_pb2.GenerateRequest(
        model="gqa",
        text=PROMPTS[1],  # longer than one step of prefill
        temperature=0.0,
        stopping=inference_pb2.StoppingOptions(max_new_tokens=6, ignore_eos=True),
        response=inference_pb2.ResponseOptions(
            prompt_token_ids=True,
            output_token_ids=True,
            output_logprobs=True,
            output_candidates=inference_pb2.CandidateTokens(top_n=2),
            prompt_logprobs=True,
        ),
    )
    responses = [response async for response in mesh.client.stream_request(request)]
    info = responses[0].prompt_info
    output = [token for response in responses for token in response.outputs.token_ids]
    logprobs = [logprob for response in responses for logprob in response.outputs.logprobs]
    ranks = [rank for response in responses for rank in response.outputs.ranks]
    candidates = [one.tokens for response in responses for one in response.outputs.candidate_tokens]
    sequence = [*info.token_ids, *output]
    with torch.inference_mode():
        logits = reference(folders["gqa"])(torch.tensor([sequence])).logits[0].double()
    expected = torch.log_softmax(logits, -1).numpy()
    for position, (row, token) in enumerate(zip(expected, sequence[1:], strict=False)):
        assert abs([*info.logprobs[1:], *logprobs][position] - row[token]) < 1e-4
    assert (info.logprobs[0], info.ranks[0]) == (0.0, 0)
    assert len(info.logprobs) == len(info.ranks) == len(info.candidate_tokens) == len(info.token_ids)
    assert len(logprobs) == len(output) == 6 and ranks == [1] * 6
    assert [[one.rank for one in others] for others in candidates] == [[2]] * 6, "the first is the token itself"


async def test_only_allowed_tokens_are_sampled_and_a_bias_selects_among_them(mesh: RunningMesh) -> None:
    options: dict[str, Any] = {"model": "mha", "max_new_tokens": 8, "seed": 3, "allowed_token_ids": [40, 41, 42]}
    allowed = await mesh.client.generate("Once", **options)
    assert set(allowed.token_ids) <= {40, 41, 42}
    biased = await mesh.client.generate("Once", **options, logit_bias={41: 100.0}, min_p=0.5)
    assert set(biased.token_ids) == {41}


async def prefilled_tokens(mesh: RunningMesh, model: str) -> int:
    (worker,) = (w for w in (await mesh.unit()).workers if w.model == model and w.role == "prefill")
    return worker.num_computed_tokens


async def test_the_prompt_of_several_sequences_is_computed_once(mesh: RunningMesh) -> None:
    prompt = "One prompt, and several outputs for it. " * 4
    options: dict[str, Any] = {"model": "gqa", "max_new_tokens": 12, "temperature": 1.0, "seed": 9}
    before = await prefilled_tokens(mesh, "gqa")
    completions = await mesh.client.generate_many(prompt, num_sequences=4, **options)
    num_tokens = completions[0].prompt.num_tokens
    num_after_the_last_full_block = num_tokens - (num_tokens - 1) // 16 * 16
    assert await prefilled_tokens(mesh, "gqa") - before == num_tokens + 3 * num_after_the_last_full_block
    assert len({completion.token_ids for completion in completions}) == 4
    recomputed = await mesh.client.generate_many(prompt, num_sequences=4, **options, bypass_prefix_cache=True)
    assert [completion.token_ids for completion in recomputed] == [completion.token_ids for completion in completions]
    await mesh.until_free()


async def test_several_sequences_survive_a_killed_decode_worker(mesh: RunningMesh) -> None:
    options: dict[str, Any] = {
        "model": "mha", "max_new_tokens": 100, "temperature": 0.9, "seed": 5, "ignore_eos": True, "num_sequences": 3,
    }  # fmt: skip
    expected = await mesh.client.generate_many("Three outputs", **options)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    killed = False
    async for delta in mesh.client.stream("Three outputs", **options):
        tokens[delta.index] += delta.token_ids
        if not killed and all(len(output) > 3 for output in tokens.values()):
            killed = True
            os.kill(mesh.pid("decode/mha"), signal.SIGKILL)
    assert killed
    assert [tuple(output) for output in tokens.values()] == [completion.token_ids for completion in expected]
    await mesh.until_free()


async def test_a_second_turn_is_continued_from_the_prefix_cache(mesh: RunningMesh) -> None:
    """The cache has prompt and output of the first turn. Another salt or a bypass finds nothing."""
    first = [int(token) for token in np.random.default_rng(1).integers(3, 259, 50)]
    options: dict[str, Any] = {"model": "gqa", "max_new_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    completion = await mesh.client.generate(first, **options)
    assert completion.prompt.num_cached_tokens == 0
    await mesh.until_free()
    second = [*first, *completion.token_ids, *first[:10]]
    cached = await mesh.client.generate(second, **options)
    recomputed = await mesh.client.generate(second, **options, bypass_prefix_cache=True)
    salted = await mesh.client.generate(second, **options, cache_salt="another tenant")
    assert cached.prompt.num_cached_tokens == 80, "the full blocks of 50 + 39 tokens"
    assert (recomputed.prompt.num_cached_tokens, salted.prompt.num_cached_tokens) == (0, 0)
    assert recomputed.token_ids == salted.token_ids == cached.token_ids
    assert (await mesh.unit()).pool.cached_bytes > 0


async def test_prompt_logprobs_cover_a_cached_prompt(mesh: RunningMesh) -> None:
    prompt = [int(token) for token in np.random.default_rng(2).integers(3, 259, 40)]
    options: dict[str, Any] = {"model": "gqa", "max_new_tokens": 1, "temperature": 0.0}
    await mesh.client.generate(prompt, **options)
    scored = await mesh.client.generate(prompt, **options, prompt_logprobs=0, logprobs=2)
    assert [position.chosen.token_id for position in scored.prompt.logprobs] == prompt[1:]
    assert len(scored.logprobs) == 1 and len(scored.logprobs[0].top) == 2


async def test_kv_of_a_killed_decode_worker_stays_in_the_prefix_cache(mesh: RunningMesh) -> None:
    """Only the tokens after the last full block are computed again."""
    prompt = [int(token) for token in np.random.default_rng(8).integers(3, 259, 150)]
    options: dict[str, Any] = {"model": "mha", "max_new_tokens": 300, "temperature": 0, "ignore_eos": True}
    is_interrupted, attempt = False, 0
    while not is_interrupted:
        attempt += 1
        before = await prefilled_tokens(mesh, "mha")
        _, tokens, is_interrupted = await _killed_after(33, mesh, prompt, **options, cache_salt=f"attempt {attempt}")
    num_recomputed = await prefilled_tokens(mesh, "mha") - before - len(prompt)
    assert 0 < num_recomputed <= 3 * 16, "the cache has the rest of prompt and output"
    recomputed = await mesh.client.generate(prompt, **options, bypass_prefix_cache=True)
    assert tuple(tokens) == recomputed.token_ids
    await mesh.until_free()
