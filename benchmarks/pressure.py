"""Memory pressure on the real model: the pool is cut to a tenth of what a run without pressure holds at its peak.

`python -m benchmarks.pressure` sends 48 chat prompts at once to the default model, in turn greedy and sampled from a
seed, with 48 slots: first with memory for all, then with a tenth of the measured peak and a swap region for all of the
KV, one for a part of it, and none. The tokens must be the same, and nothing may stay leased.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.mesh_process import UpProcess, mesh_target
from benchmarks.prompts import PROMPTS
from benchmarks.report import Report
from muxmesh.client import Completion, Message
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.metrics.scrape import fetch
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.v1 import mesh_pb2

NUM_REQUESTS = 48
NUM_TOKENS = 256
TEMPERATURE = 0.7
PART = 10
"""The pool is cut to one part of so many."""
_MIB = 1 << 20
_SLAB_BYTES = 720 << 10
"""One token block of 16 tokens in f32."""
_UNPRESSED_BYTES = 1536 * _MIB
_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True)
class Run:
    """One run of all requests. ``peak_bytes``: the largest part of the pool that was leased, sampled."""

    seconds: float
    peak_bytes: int
    tokens: Sequence[tuple[int, ...]]
    figures: dict[str, Any]
    is_free: bool


def config_of(pool_bytes: int, swap_bytes: int, metrics: str) -> dict[str, Any]:
    """One unit with the default model. A request reserves little of its output, so that outputs meet a full pool."""
    model = {"name": DEFAULT_MODEL, "max_num_seqs": NUM_REQUESTS, "kv_answer_tokens": 16}
    unit = {"kv_pool": pool_bytes, "slab": _SLAB_BYTES, "kv_swap": swap_bytes, "models": [model]}
    return {"units": [unit], "metrics": {"listen": metrics}}


async def serve(name: str, pool_bytes: int, swap_bytes: int) -> Run:
    """Sends all requests at once to a mesh with this memory."""
    metrics = free_listen_address("127.0.0.1:0")
    config = config_of(pool_bytes, swap_bytes, metrics)
    async with mesh_target(f"pressure_{name.replace(' ', '_')}", config, TEMPERATURE) as (mesh, _):
        await mesh.client.generate("Hello", max_new_tokens=2)  # loads kernels
        peak = _Peak(mesh)
        watch = asyncio.create_task(peak.watch())
        started_at_s = time.monotonic()
        completions = await asyncio.gather(*(_generate(mesh, number) for number in range(NUM_REQUESTS)))
        seconds = time.monotonic() - started_at_s
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        _, scraped = await fetch(metrics, "/metrics", 20.0)
        return Run(
            seconds,
            peak.num_bytes,
            [one.token_ids for one in completions],
            _figures(completions, await unit_of(mesh), seconds, scraped.decode()),
            await _is_free(mesh),
        )


async def unit_of(mesh: UpProcess) -> mesh_pb2.UnitStatus:
    """The only unit; the call checks the integrity of its tables."""
    return (await mesh.client.status()).units[0]


async def _generate(mesh: UpProcess, number: int) -> Completion:
    return await mesh.client.generate(
        [Message("user", PROMPTS[number])],
        max_new_tokens=NUM_TOKENS,
        temperature=TEMPERATURE * (number % 2),
        seed=number,
    )


class _Peak:
    """Owns the largest number of leased bytes that it has seen."""

    def __init__(self, mesh: UpProcess) -> None:
        self._mesh = mesh
        self.num_bytes = 0

    async def watch(self) -> None:
        """Samples the leased bytes until it is cancelled."""
        while True:
            self.num_bytes = max(self.num_bytes, (await unit_of(self._mesh)).pool.leased_bytes)
            await asyncio.sleep(_SAMPLE_EVERY_S)


def sample_of(scraped: str, name: str, label: str) -> float:
    """The sum of the samples of ``name`` with ``label`` in a Prometheus text."""
    lines = (line for line in scraped.splitlines() if line.startswith(name + "{") and label in line)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def _figures(
    completions: Sequence[Completion], unit: mesh_pb2.UnitStatus, seconds: float, scraped: str
) -> dict[str, Any]:
    workers = unit.workers
    num_tokens = sum(len(one.token_ids) for one in completions)
    num_preemptions = int(sample_of(scraped, "muxmesh_preemptions_total", 'reason="kv_'))
    num_recomputed = sum(one.timings.num_restarts for one in completions)
    return {
        "s": seconds,
        "tokens_per_s": num_tokens / seconds,
        "output_tokens": num_tokens,
        "decode_steps": sum(worker.num_steps for worker in workers if worker.role == "decode"),
        "computed_tokens": sum(worker.num_computed_tokens for worker in workers),
        "preemptions_for_memory": num_preemptions,
        "recomputed": num_recomputed,
        "swapped": num_preemptions - num_recomputed,
        "swapped_out_mib": sum(worker.swap_out_bytes for worker in workers) / _MIB,
        "swapped_in_mib": sum(worker.swap_in_bytes for worker in workers) / _MIB,
        "swap_s": sum(worker.swap_s for worker in workers),
    }


async def _is_free(mesh: UpProcess) -> bool:
    """Whether, within 10 s, nothing is leased, queued or swapped any more."""
    for _ in range(100):
        unit = await unit_of(mesh)
        held = sum(one.num_leases + one.num_credits + one.num_queued_requests for one in unit.models)
        if held + unit.pool.leased_bytes + unit.pool.swap_used_bytes + unit.pool.num_swapped_leases == 0:
            return True
        await asyncio.sleep(0.1)
    return False


async def bench() -> int:
    """Runs without pressure, then with each swap region."""
    report = Report("pressure")
    unpressed = await serve("none", _UNPRESSED_BYTES, 0)
    pool_bytes = unpressed.peak_bytes // PART // _SLAB_BYTES * _SLAB_BYTES
    report.figures |= {
        "num_requests": NUM_REQUESTS,
        "peak_mib": unpressed.peak_bytes / _MIB,
        "pool_mib": pool_bytes / _MIB,
        "unpressed": unpressed.figures,
    }
    for name, swap_bytes in {"swap": unpressed.peak_bytes, "too little swap": pool_bytes // 2, "no swap": 0}.items():
        run = await serve(name, pool_bytes, swap_bytes)
        report.figures[name] = run.figures
        print(f"{name}: {run.figures}", flush=True)
        same = sum(one == other for one, other in zip(run.tokens, unpressed.tokens, strict=True))
        report.bar(f"{name}: outputs with the same tokens", same, f"all {NUM_REQUESTS}", same == NUM_REQUESTS)
        report.bar(f"{name}: nothing is leased at the end", run.is_free, "1", run.is_free)
        for what in ("swapped", "recomputed"):
            report.bar(f"{name}: pre-empted and {what}", run.figures[what])
        ratio = run.figures["tokens_per_s"] / unpressed.figures["tokens_per_s"]
        report.bar(f"{name}: tokens/s, of those without pressure", ratio)
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(bench()))
