"""What speculation and pre-emption gain over FCFS, ours and vLLM's, at equal latency, with real outputs.

`python -m benchmarks.alise JSONL ...` serves SmolLM2 with 16 slots and sends the prompts as chats; outputs end by
themselves or at 512 tokens. The metric is ALISE's (Zhao et al., ICCAD 2024): the rate of requests at which the mean
normalized latency (seconds per output token) reaches a given level, interpolated between the rates of each system.

First all systems serve a number of requests at once: that gives the capacity of their engine and, for those that
predict, the output lengths to learn from. The rates are fractions (loads) of it. Our systems have one engine, so their
loads are equal rates; vLLM's are fractions of its own capacity. After the first loads, which all systems share, each
system goes on where its own curve crosses the levels. Each run has prompts of its own, the same for all systems: a
system takes as many of them as it has requests at its rate. Above the capacity latency grows with time, so arrivals
last equally long in all runs. A machine that is a tenth slower for one system's run changes its tails by more than
that: with ``--repeats 2`` the rates that our systems share are measured twice, in both orders.

With VLLM_PYTHON, which names an interpreter that has vLLM, its server is a system too. Every system stays up, and only
the measured one is not stopped (SIGSTOP). The report is written after each rate, the report of each load test into
alise_runs.jsonl beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.alise_effort import CAP, MAX_LOAD, SETTLE_S, VLLM, Effort, Speed, expected_s
from benchmarks.alise_outcome import LEVELS_S, MAIN_LEVEL_S, TAILS, Point, judged, table
from benchmarks.latency_curve import arrival_seed, next_load, sustained_requests_per_s
from benchmarks.mesh_process import mesh_target
from benchmarks.prompts import PROMPTS, prompts_of, write_prompts
from benchmarks.report import OUT, Report
from benchmarks.vs_vllm import BATCH_CAP, KV_GIB, MAX_MODEL_LEN, System, measure, openai_system, vllm_server
from loadtest.spec import parse_spec
from loadtest.workload import arrival_times
from muxmesh.cli.common import cache_dir
from muxmesh.client import MeshClient
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import ensure_model

TEMPERATURE = 0.7
LOADS = (1.0, 1.4, 1.8, 2.3)
SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "no pre-emption": {"max_paused_seqs": 0},
    "no aging": {"policy": "srtf"},
    "no prediction": {"policy": "mlfq"},
    "fcfs": {"policy": "fcfs", "max_paused_seqs": 0},
}
"""Name → what differs from the defaults."""
_MOST_OF_A_FILE = 400
_WARM_UP = 4


@dataclass
class Measured:
    """A system, the speed of its engine, and its runs."""

    system: System
    speed: Speed
    points: list[Point] = field(default_factory=list)

    def next_load(self, loads: Sequence[float]) -> float:
        """The load of its next run."""
        if len(self.points) < len(loads):
            return loads[len(self.points)]
        return next_load({one.load: one.normalized_s for one in self.points}, LEVELS_S, MAIN_LEVEL_S, MAX_LOAD)


@dataclass
class OurSystem(System):
    """A mesh. ``tau``: of its predictor (None before 100 outputs), ``is_predicting``: it ranks, so it is used."""

    client: MeshClient
    tau: float | None = None
    is_predicting: bool = True

    async def note_predictor(self) -> None:
        """Reads both from the running mesh."""
        model = (await self.client.status()).models[0]
        self.tau = model.prediction_tau if model.HasField("prediction_tau") else None
        self.is_predicting = model.predictions_used


@asynccontextmanager
async def our_system(name: str) -> AsyncIterator[OurSystem]:
    """A mesh of one of `SYSTEMS`."""
    settings = dict(SYSTEMS[name])
    policy = settings.pop("policy", "srtf-aged")
    model = {"name": DEFAULT_MODEL, "max_num_seqs": BATCH_CAP, "max_model_len": MAX_MODEL_LEN, **settings}
    config = {"order": {"policy": policy}, "units": [{"kv_pool": f"{KV_GIB}GiB", "models": [model]}]}
    async with mesh_target(f"alise_{name.replace(' ', '_')}", config, TEMPERATURE) as (mesh, target):
        system = OurSystem(name, target, [mesh.process.pid], mesh.client)
        try:
            yield system
        finally:
            system.freeze(False)


class Bench:
    """One measurement. The systems are stopped between their runs."""

    def __init__(self, prompts: Sequence[str], effort: Effort) -> None:
        self._prompts = random.Random(1).sample(prompts, len(prompts))
        self._effort = effort
        self._started_s = time.monotonic()
        self._report = Report("alise")
        self._at_once: dict[str, float] = {}
        self._raw = OUT / "alise_runs.jsonl"
        self._raw.write_text("")

    async def run(self, systems: Sequence[System]) -> int:
        """Runs every system at every load, in alternating order; returns the exit status."""
        measured = await self._at_once_runs(systems)
        left_s = sum(one.speed.all_runs_s(one.system.name, self._effort) for one in measured)
        print(f"expected from here: at most {left_s / 60:.0f} minutes", flush=True)
        try:
            for turn in range(self._effort.num_points):
                if not await self._round(turn, measured):
                    break
        except asyncio.CancelledError:
            print("interrupted: the report has the runs so far")
            if all(one.points for one in measured):
                self._conclude(measured, is_complete=False)
                self._print(measured)
            raise
        if not measured[0].points:
            raise SystemExit("no load was measured")
        return 0 if self._print(measured) else 1

    def _print(self, measured: Sequence[Measured]) -> bool:
        print(f"\n{table({one.system.name: one.points for one in measured})}")
        return self._report.write()

    async def _at_once_runs(self, systems: Sequence[System]) -> list[Measured]:
        """The capacity of each engine. Our systems share one: the mean of what they show."""
        warm_up = OUT / "alise_prompts_warm_up.jsonl"
        write_prompts(warm_up, PROMPTS[:_WARM_UP])
        prompts = self._take(max(self._effort.num_at_once(system.name) for system in systems))
        measured = []
        for system in systems:
            count = self._effort.num_at_once(system.name)
            await self._measure(system, f"rate=inf prompts={warm_up} chat=yes cap=16 requests={_WARM_UP} seed=9")
            path = OUT / "alise_prompts_first.jsonl"
            write_prompts(path, prompts[:count])
            one = await self._measure(system, f"rate=inf prompts={path} chat=yes cap={CAP} requests={count} seed=1")
            self._at_once[system.name] = sustained_requests_per_s(one, BATCH_CAP)
            mean_tokens = one["total_output_tokens"] / one["completed"]
            print(f"  sustained {self._at_once[system.name]:.3f} requests/s of {mean_tokens:.0f} tokens", flush=True)
            measured.append(Measured(system, Speed(self._at_once[system.name], mean_tokens)))
        own = [one for one in measured if one.system.name != VLLM]
        shared = statistics.fmean(one.speed.requests_per_s for one in own)
        for one_of_ours in own:
            one_of_ours.speed = replace(one_of_ours.speed, requests_per_s=shared)
        return measured

    async def _round(self, turn: int, measured: Sequence[Measured]) -> bool:
        """One rate of each system; False if there are too few prompts or minutes left for it."""
        arrivals_s = self._effort.arrivals_s
        loads = [one.next_load(self._effort.loads) for one in measured]
        repeats = [self._effort.repeats_of(one.system.name, turn) for one in measured]
        runs_s = sum(
            count * one.speed.run_s(load, arrivals_s) for one, load, count in zip(measured, loads, repeats, strict=True)
        )
        ends_s = time.monotonic() - self._started_s + runs_s
        if self._effort.within_s is not None and ends_s > self._effort.within_s:
            print(f"no time for round {turn + 1}, which would end after {ends_s / 60:.1f} minutes")
            return False
        rates = [load * one.speed.requests_per_s for one, load in zip(measured, loads, strict=True)]
        counts = [max(8, round(rate * arrivals_s)) for rate in rates]
        if len(self._prompts) < (needed := max(repeats) * max(counts)):
            print(f"{len(self._prompts)} prompts are left, {needed} are needed for round {turn + 1}")
            return False
        runs = list(zip(measured, loads, rates, counts, repeats, strict=True))
        found: list[list[Point]] = [[] for _ in runs]
        for repeat in range(max(repeats)):
            number = turn * self._effort.num_repeats + repeat
            prompts = self._take(max(counts))
            seed = arrival_seed(counts, 1000 * number, _arrivals)
            in_order = list(zip(runs, found, strict=True))[:: 1 - 2 * ((turn + repeat) % 2)]
            for (one, load, rate, count, num_runs), points in in_order:
                if repeat >= num_runs:
                    continue
                path = OUT / f"alise_prompts_{number}.jsonl"
                write_prompts(path, prompts[:count])
                text = f"rate={rate:.4f} prompts={path} chat=yes cap={CAP} requests={count} seed={seed}"
                points.append(Point.of(load, rate, await self._measure(one.system, text)))
                _show(points[-1])
        for one, points in zip(measured, found, strict=True):
            one.points.append(Point.mean(points))
        self._conclude(measured, is_complete=turn + 1 == self._effort.num_points)
        return True

    def _take(self, count: int) -> list[str]:
        """The next prompts, which no other run has."""
        taken, self._prompts = self._prompts[:count], self._prompts[count:]
        return taken

    async def _measure(self, system: System, text: str) -> dict[str, Any]:
        system.freeze(False)
        try:
            await asyncio.sleep(SETTLE_S)
            report = await measure(system, [], parse_spec(text), None)
            if isinstance(system, OurSystem):
                await system.note_predictor()
        finally:
            system.freeze(True)
        with self._raw.open("a") as file:
            file.write(json.dumps(report) + "\n")
        return report

    def _conclude(self, measured: Sequence[Measured], is_complete: bool) -> None:
        """Writes the report of the runs so far."""
        about = {
            "is_complete": is_complete,
            "minutes_of_arrivals": self._effort.arrivals_s / 60,
            "sustained_requests_per_s": self._at_once,
            "elapsed_minutes": (time.monotonic() - self._started_s) / 60,
            "predictor_tau": {one.system.name: one.system.tau for one in measured if isinstance(one.system, OurSystem)},
        }
        judged(self._report, {one.system.name: one.points for one in measured}, about)
        mine = measured[0].system
        if isinstance(mine, OurSystem):
            is_used = mine.is_predicting
            self._report.bar(f"predictions are used, {mine.name}", float(is_used), "1", is_used)
        self._report.save()


def _show(point: Point) -> None:
    tails = ", ".join(f"{key} {point.tails_ms[key] / 1000:.1f}" for key in TAILS)
    print(f"  load {point.load:g}: normalized {point.normalized_s:.3f} s/token; in s: {tails}", flush=True)


def _arrivals(seed: int, count: int) -> list[float]:
    """Arrival times at one request per second."""
    return list(itertools.islice(arrival_times(parse_spec(f"rate=1 lengths=D(1,1) requests=1 seed={seed}")), count))


async def bench(prompts: Sequence[str], names: Sequence[str], effort: Effort) -> int:
    """Starts all systems, one after the other, and measures them; returns the exit status."""
    python = os.environ.get("VLLM_PYTHON")
    folder = ensure_model(CATALOG[DEFAULT_MODEL], cache_dir(), lambda what, done, total: None)
    minutes = expected_s([*names, *([VLLM] if python else [])], effort) / 60
    print(f"expected on two cores: at most {minutes:.0f} minutes in all", flush=True)
    runner = Bench(prompts, effort)
    async with AsyncExitStack() as stack:
        systems: list[System] = []
        for name in names:
            systems.append(await stack.enter_async_context(our_system(name)))
            systems[-1].freeze(True)
        if python:
            print("starting vLLM, which takes two minutes ...", flush=True)
            pid = stack.enter_context(vllm_server(python, folder, 8123, KV_GIB, OUT / "vllm.log"))
            systems.append(await openai_system(stack, VLLM, 8123, [pid]))
            systems[-1].freeze(True)
        return await runner.run(systems)


def _loads(text: str) -> list[float]:
    loads = sorted({float(one) for one in text.split(",")})
    if len(loads) < 2 or not 0 < loads[0] <= loads[-1] <= MAX_LOAD:
        raise argparse.ArgumentTypeError(f"must be two or more different numbers above 0, up to {MAX_LOAD:g}")
    return loads


def main() -> int:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--systems", default="ours,fcfs", help=f"of {', '.join(SYSTEMS)}; the first is compared")
    parser.add_argument("--minutes", type=float, default=1.0, help="of arrivals in each run")
    parser.add_argument("--points", type=int, default=6, help="rates of each system")
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of our systems at each of --loads; a point is the mean"
    )
    parser.add_argument(
        "--loads",
        type=_loads,
        default=list(LOADS),
        help="the first rates, as fractions of the capacity; the others follow from the curve (%(default)s)",
    )
    parser.add_argument("--first", type=int, default=96, help="requests at once before, from which lengths are learned")
    parser.add_argument("--within", type=float, help="minutes after which the last round of runs has to end")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.systems.split(",")]
    if unknown := [name for name in names if name not in SYSTEMS]:
        parser.error(f"--systems: {unknown[0]}: is none of {', '.join(SYSTEMS)}")
    for option in ("points", "repeats"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option}: is {getattr(arguments, option)}; at least 1 is needed")
    within_s = None if arguments.within is None else arguments.within * 60
    effort = Effort(
        arguments.loads, arguments.points, arguments.minutes * 60, arguments.first, within_s, arguments.repeats
    )
    prompts = prompts_of(arguments.prompts, _MOST_OF_A_FILE)
    if len(prompts) <= effort.num_first:
        parser.error(f"{len(prompts)} prompts; more than {effort.num_first} are needed")
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(bench(prompts, names, effort))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
