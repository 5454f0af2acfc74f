"""What speculation and pre-emption gain over FCFS, ours and vLLM's, at equal latency, with real outputs.

`python -m benchmarks.alise JSONL ...` serves SmolLM2 with 16 slots and sends the prompts as chats; outputs end by
themselves or at 256 tokens. The metric is ALISE's (Zhao et al., ICCAD 2024): the highest rate of requests at which the
mean normalized latency (seconds per output token) is at most a given level. Rates are fractions of the rate that our
mesh serves with all requests at once; each rate has prompts of its own, the same for all systems. Our systems learn
output lengths from the requests of that first run and from each later one.

With VLLM_PYTHON, which names an interpreter that has vLLM, its server is a system too. Every system stays up; all but
the measured one are stopped (SIGSTOP).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.mesh_process import mesh_target
from benchmarks.policies import rate_at
from benchmarks.prompts import prompts_of, write_prompts
from benchmarks.report import OUT, Report
from benchmarks.vs_vllm import BATCH_CAP, KV_GIB, MAX_MODEL_LEN, System, measure, openai_system, vllm_server
from loadtest.spec import parse_spec
from muxmesh.cli.common import cache_dir
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import ensure_model

CAP = 256
TEMPERATURE = 0.7
LOADS = (0.6, 0.8, 0.95, 1.1, 1.35, 1.7)
LEVELS_S = (0.2, 0.5, 1.0)
"""Mean normalized latencies at which rates are compared."""
SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "no pre-emption": {"max_paused_seqs": 0},
    "fcfs": {"policy": "fcfs", "max_paused_seqs": 0},
}
"""Name → what differs from the defaults."""
TAILS = ("p90_ttft_ms", "p99_ttft_ms", "p90_e2el_ms", "p99_e2el_ms")


@asynccontextmanager
async def our_system(name: str) -> AsyncIterator[System]:
    """A mesh of one of `SYSTEMS`."""
    settings = dict(SYSTEMS[name])
    policy = settings.pop("policy", "srtf-aged")
    model = {"name": DEFAULT_MODEL, "max_num_seqs": BATCH_CAP, "max_model_len": MAX_MODEL_LEN, **settings}
    config = {"order": {"policy": policy}, "units": [{"kv_pool": f"{KV_GIB}GiB", "models": [model]}]}
    async with mesh_target(f"alise_{name.replace(' ', '_')}", config, TEMPERATURE) as (mesh, target):
        system = System(name, target, [mesh.process.pid])
        try:
            yield system
        finally:
            system.freeze(False)


def parts(prompts: Sequence[str], num_first: int, counts: Sequence[int], seed: int) -> list[Path]:
    """Files of prompts: of the first run, then of each rate. No prompt is in two of them.

    Raises SystemExit if there are too few.
    """
    needed = num_first + sum(counts)
    if len(prompts) < needed:
        raise SystemExit(f"{len(prompts)} prompts; {needed} are needed for these rates and minutes")
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    files = []
    for number, count in enumerate((num_first, *counts)):
        files.append(OUT / f"alise_prompts_{number}.jsonl")
        write_prompts(files[-1], shuffled[:count])
        del shuffled[:count]
    return files


async def bench(prompts: Sequence[str], names: Sequence[str], minutes: float, num_first: int) -> int:
    """Runs every system at every rate, in alternating order."""
    python = os.environ.get("VLLM_PYTHON")
    folder = ensure_model(CATALOG[DEFAULT_MODEL], cache_dir(), lambda what, done, total: None)
    async with AsyncExitStack() as stack:
        systems: list[System] = []

        def others(system: System) -> list[System]:
            return [other for other in systems if other is not system]

        for name in names:
            systems.append(await stack.enter_async_context(our_system(name)))
            systems[-1].freeze(True)
        if python:
            print("starting vLLM, which takes two minutes ...", flush=True)
            pid = stack.enter_context(vllm_server(python, folder, 8123, KV_GIB, OUT / "vllm.log"))
            systems.append(await openai_system(stack, "vllm", 8123, [pid]))
            systems[-1].freeze(True)
        for system in systems:
            system.freeze(False)
        first = parts(prompts, num_first, [], 1)[0]
        at_once = {}
        for system in systems:
            line = f"rate=inf prompts={first} chat=yes cap={CAP} requests={num_first} seed=1"
            at_once[system.name] = await measure(system, others(system), parse_spec(line), None, 2)
        capacity = at_once[names[0]]["request_throughput"]
        counts = [max(24, round(load * capacity * 60 * minutes)) for load in LOADS]
        files = parts(prompts, num_first, counts, 1)[1:]
        runs: dict[str, list[dict[str, Any]]] = {system.name: [] for system in systems}
        for turn, (load, count, file) in enumerate(zip(LOADS, counts, files, strict=True)):
            text = f"rate={load * capacity:.3f} prompts={file} chat=yes cap={CAP} requests={count} seed={turn}"
            for system in systems[:: 1 if turn % 2 == 0 else -1]:
                runs[system.name].append(await measure(system, others(system), parse_spec(text), None))
                one = runs[system.name][-1]
                tails = ", ".join(f"{key} {one[key] / 1000:.1f}" for key in TAILS)
                print(f"  normalized {one['mean_normalized_latency_s_per_token']:.3f} s/token; {tails}", flush=True)
    return _finish(capacity, at_once, runs, names[0])


def _finish(
    capacity: float,
    at_once: Mapping[str, dict[str, Any]],
    runs: Mapping[str, Sequence[dict[str, Any]]],
    mine: str,
) -> int:
    report = Report("alise")
    rates = [load * capacity for load in LOADS]
    curves = {name: [one["mean_normalized_latency_s_per_token"] for one in of] for name, of in runs.items()}
    report.figures = {
        "rates": rates,
        "requests_per_s_at_once": {name: one["request_throughput"] for name, one in at_once.items()},
        "normalized_s": curves,
        **{key: {name: [one[key] for one in of] for name, of in runs.items()} for key in TAILS},
        "mean_output_tokens": {
            name: [one["total_output_tokens"] / one["completed"] for one in of] for name, of in runs.items()
        },
        "failed": {name: sum(one["failed"] for one in of) for name, of in runs.items()},
    }
    for name in [one for one in runs if one != mine]:
        for level in LEVELS_S:
            ratio = rate_at(rates, curves[mine], level) / rate_at(rates, curves[name], level)
            report.bar(f"rate at {level} s/token, {mine} / {name}", ratio)
        for index, load in enumerate(LOADS):
            ratio = curves[name][index] / curves[mine][index]
            report.bar(f"normalized latency at {load}, {name} / {mine}", ratio)
            for key in TAILS:
                report.bar(f"{key} at {load}, {mine} / {name}", runs[mine][index][key] / runs[name][index][key])
    for name, failed in report.figures["failed"].items():
        report.bar(f"failed requests, {name}", failed, "0", failed == 0)
    return 0 if report.write() else 1


def main() -> int:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--systems", default="ours,fcfs", help=f"of {', '.join(SYSTEMS)}; the first is compared")
    parser.add_argument("--minutes", type=float, default=1.5, help="of arrivals at each rate")
    parser.add_argument(
        "--first", type=int, default=160, help="requests at once before, from which lengths are learned"
    )
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.systems.split(",")]
    if unknown := [name for name in names if name not in SYSTEMS]:
        parser.error(f"--systems: {unknown[0]}: is none of {', '.join(SYSTEMS)}")
    OUT.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bench(prompts_of(arguments.prompts), names, arguments.minutes, arguments.first))


if __name__ == "__main__":
    sys.exit(main())
