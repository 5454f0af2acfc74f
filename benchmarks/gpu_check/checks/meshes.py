"""Whole meshes on the GPU: the tokens are those of the CPU, swapped or not; the time of a hand-off."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.random_model import RandomModel, write_random_model
from benchmarks.gpu_check.check import Findings
from benchmarks.gpu_check.gpu_mesh import PROMPTS, common_length, control_of, differing, gpu_unit, mesh, write_model
from muxmesh.client import MeshClient

NUM_TOKENS = 32
WIDE = RandomModel(
    num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=64, intermediate_size=96, vocab_size=259,
    context_len=512,
)  # fmt: skip
"""8 KiB of KV for each token: a small pool holds few."""
MIB = 1 << 20


def mesh_tokens(findings: Findings, is_dry_run: bool) -> None:
    """Greedy and seeded tokens of whole meshes in f32: a tiny model and one of SmolLM2's size, CPU against GPU."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        names = ("tiny",) if is_dry_run else ("tiny", "small")
        models = [{"name": name, "source": str(write_model(scratch, name, is_dry_run))} for name in names]
        asyncio.run(_compare_tokens(findings, models, is_dry_run))


async def _compare_tokens(findings: Findings, models: Sequence[dict[str, Any]], is_dry_run: bool) -> None:
    cpu = {"kv_pool": "256MiB", "models": [{**model, "threads": 4} for model in models]}
    gpu = {**gpu_unit(is_dry_run), "mps": "off", "models": models, "require_ipc": True}
    names, count = [model["name"] for model in models], 8 if is_dry_run else NUM_TOKENS
    expected, found = await asyncio.gather(
        _all_tokens({}, cpu, names, count), _all_tokens(findings.figures, gpu, names, count)
    )
    transport = findings.figures["transport"]
    findings.expect("KV is handed over in shared device memory by descriptor", transport == "vmm fd", transport)
    for key, tokens in expected.items():
        same = common_length(tokens, found[key])
        findings.expect(f"{key}: tokens on the GPU equal those on the CPU", found[key] == tokens, f"{same} equal")
        findings.figure(f"{key}: distinct tokens", len(set(tokens)))


async def _all_tokens(
    figures: dict[str, Any], unit: Mapping[str, Any], models: Sequence[str], num_tokens: int
) -> dict[str, list[int]]:
    """Tokens of every prompt, greedy and sampled, all at once. Adds the unit's status to ``figures``."""
    async with mesh({"units": [unit]}) as running:
        status = (await running.client.status()).units[0]
        figures |= {"status of the unit": str(status)[:2000], "transport": status.transport}
        return await _request_all(running.client, models, num_tokens)


async def _request_all(client: MeshClient, models: Sequence[str], num_tokens: int) -> dict[str, list[int]]:
    cases = {
        f"{model}, prompt {index}, temperature {heat}": (model, prompt, heat)
        for model in models
        for index, prompt in enumerate(PROMPTS)
        for heat in (0.0, 0.9)
    }
    completions = await asyncio.gather(
        *(
            client.generate(
                prompt, model=model, max_new_tokens=num_tokens, temperature=heat, seed=7, ignore_eos=True,
                repetition_penalty=1.1 if heat else 1.0,
            )
            for model, prompt, heat in cases.values()
        )
    )  # fmt: skip
    return {name: list(one.token_ids) for name, one in zip(cases, completions, strict=True)}


def swap(findings: Findings, is_dry_run: bool) -> None:
    """Outputs that do not fit into the pool together are swapped to pinned memory and back, and no token changes."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        folder = write_random_model(Path(scratch) / "wide", WIDE, "float32")
        model = {"name": "wide", "source": str(folder), "kv_answer_tokens": 64, "max_num_seqs": 8}
        unit = {
            **gpu_unit(is_dry_run),
            "mps": "off",
            "kv_pool": 4 * MIB,
            "slab": "256KiB",
            "kv_swap": 64 * MIB,
            "preemption_mode": "swap",
            "models": [model],
        }
        asyncio.run(_swap(findings, unit))


async def _swap(findings: Findings, unit: Mapping[str, Any]) -> None:
    async with mesh({"units": [unit]}) as running:
        options: dict[str, Any] = {
            "max_new_tokens": 340, "temperature": 1.0, "ignore_eos": True, "bypass_prefix_cache": True,
        }  # fmt: skip
        prompts = [[3 + seed, 5, 8] for seed in range(5)]
        generate = running.client.generate
        alone = [await generate(prompt, seed=at, **options) for at, prompt in enumerate(prompts)]
        together = await asyncio.gather(*(generate(prompt, seed=at, **options) for at, prompt in enumerate(prompts)))
        expected, found = ([list(one.token_ids) for one in outputs] for outputs in (alone, together))
        findings.expect("no token changes", found == expected, differing(found, expected))
        (decode,) = (w for w in (await running.client.status()).units[0].workers if w.role == "decode")
        findings.expect("sequences were swapped", decode.swap_out_bytes > 0, decode.swap_out_bytes)
        is_complete = decode.swap_in_bytes == decode.swap_out_bytes
        findings.expect("all of them were swapped in again", is_complete, decode.swap_in_bytes)
        findings.figure("swap_gb_s", (decode.swap_out_bytes + decode.swap_in_bytes) / max(decode.swap_s, 1e-9) / 1e9)


def hand_off(findings: Findings, is_dry_run: bool) -> None:
    """Time from the first to the second token on an idle mesh, less that of a step; the pool is outside MPS."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        model = {"name": "tiny", "source": str(write_model(scratch, "tiny", is_dry_run)), "continuous_decode_steps": 1}
        unit = {**gpu_unit(is_dry_run), "mps": "on", "models": [model]}
        asyncio.run(_time_hand_offs(findings, unit, 3 if is_dry_run else 100))


async def _time_hand_offs(findings: Findings, unit: Mapping[str, Any], count: int) -> None:
    async with mesh({"units": [unit]}) as running:
        kvstore = running.pid_of("kvstore")
        servers = await control_of(running.pid_of("decode_svc")).servers()
        clients = sorted(pid for server in servers for pid in server.clients)
        findings.expect(
            "kvstore, which owns the pool, is no MPS client", bool(clients) and kvstore not in clients, clients
        )
        gaps, steps = [], []
        for number in range(3, 3 + count):
            stream = running.client.stream([number, *range(3, 40)], max_new_tokens=8, temperature=0, ignore_eos=True)
            times = [time.perf_counter() async for delta in stream if delta.token_ids]
            between = [later - earlier for earlier, later in itertools.pairwise(times)]
            gaps.append(between[0])
            steps += between[1:]
        gap_s, step_s = statistics.median(gaps[count // 10 :]), statistics.median(steps)
        findings.figure("first_to_second_token_ms", 1e3 * gap_s)
        findings.figure("step_ms", 1e3 * step_s)
        ms = 1e3 * (gap_s - step_s)
        findings.aim("the hand-off and its messages take under 1 ms more than a decode step", ms < 1, ms)
