"""Compares the scheduling policies in virtual time: `python -m benchmarks.policies FOLDER`, with the public files.

One model with 16 slots. Lengths are those of real outputs (four tasks in one stream). Predictions are those of the
mesh's own predictor, each made before it learned the output. The runs of one load share arrivals, lengths and
predictions.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lengths_data import stream_items
from benchmarks.report import Report
from loadtest.workload import Body, Sketch
from muxmesh.clock import SystemClock
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.predictor.evaluate import replay
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import LengthPrediction
from simulator.forecasts import ForecastInput, Forecasts
from simulator.run import simulate
from simulator.simulated_unit import Decision

SLOTS, STEP_S = 16, 0.02
LOADS = ((0.7, 1.0), (0.9, 3.0), (1.1, 1.0), (1.5, 1.0))
POLICIES: tuple[PolicyName, ...] = ("fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq")
SEEDS = (0, 1, 2)
REQUESTS = 4000
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Lengths:
    """Prompt and output tokens of one request."""

    num_input: int
    num_output: int


@dataclass(frozen=True)
class Outcome:
    """Latencies of a run: mean and p99 in seconds, mean normalized latency in seconds per output token."""

    mean_s: float
    p99_s: float
    normalized_s: float


class Recorded:
    """Forecasts that are predictions made before, in order of arrival."""

    def __init__(self, predictions: Sequence[LengthPrediction]) -> None:
        self._predictions = iter(predictions)

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        return next(self._predictions), "recorded", None

    def observe(self, forecast: object, num_output: int, censored: bool) -> None:
        """Learns nothing."""


def config(unit: Mapping[str, Any] | None = None, **settings: Any) -> MeshConfig:
    """One model with 16 slots, memory for all of them, and steps of 20 ms whatever their batch is.

    ``unit``: further settings of the unit; ``settings``: of the model.
    """
    model = {"name": "m", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S}, "prefill_token_budget":
    2048,
             "max_model_len": 8192, **settings}  # fmt: skip
    return MeshConfig.model_validate({
        "router": {"max_waiting_requests": 10**9},
        "units": [{"kv_pool": "8GiB", "models": [model], **(unit or {})}],
    })  # fmt: skip


def sketches(requests: Sequence[Lengths], rate: float, cv: float, seed: int) -> list[Sketch]:
    """Requests of these lengths that arrive as a gamma process; all at once if the rate is infinite."""
    rng = random.Random(f"{seed}/{cv}")
    at_s, found = 0.0, []
    for index, one in enumerate(requests):
        body = Body(None, one.num_input, one.num_output)
        found.append(Sketch(index, at_s, body, max(one.num_output, 4096), False, 0, None, None, 0))
        at_s += rng.gammavariate(1 / cv**2, cv**2 / rate) if rate < float("inf") else 0.0
    return found


def run(
    requests: Sequence[Sketch], forecasts: Forecasts, policy: PolicyName,
    on_decision: Callable[[Decision], None] | None = None, mesh: MeshConfig | None = None,
) -> Outcome:  # fmt: skip
    """Latencies of one simulation. ``mesh`` None: the default `config`."""
    simulated = simulate(mesh or config(), {"m": SIM_SPEC}, requests, forecasts, policy, on_decision)
    records = simulated.run.records
    assert all(record.is_ok for record in records), "every request is served"
    latencies = np.array([record.e2el_s for record in records])
    normalized = float(np.mean([record.normalized_s for record in records]))
    return Outcome(float(latencies.mean()), float(np.percentile(latencies, 99)), normalized)


def capacity(requests: Sequence[Lengths]) -> float:
    """Requests per second while the queue is never empty."""
    waiting = sketches(requests, float("inf"), 1.0, 0)
    simulated = simulate(config(), {"m": SIM_SPEC}, waiting, Recorded([LengthPrediction(1, 1)] * len(waiting)), "fcfs")
    ends = sorted(record.ended_s or 0.0 for record in simulated.run.records)
    first, last = len(ends) // 10, len(ends) * 9 // 10
    return (last - first) / (ends[last] - ends[first])


def mean_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The mean over seeds."""
    return Outcome(*(float(np.mean([getattr(one, name) for one in outcomes])) for name in Outcome.__annotations__))


def real_stream(folder: Path, each: int, seed: int) -> tuple[list[Lengths], list[LengthPrediction]]:
    """Lengths and predictions of requests, sampled from the later half of the stream."""
    outcomes = replay(stream_items(folder, each, seed), SystemClock())
    sampled = random.Random(seed).choices(outcomes[len(outcomes) // 2 :], k=REQUESTS)
    requests = [Lengths(max(1, len(one.item.prompt) // _BYTES_PER_TOKEN), one.item.num_tokens) for one in sampled]
    return requests, [one.checked.prediction for one in sampled]


def main() -> int:
    """Tables and controls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=1100, help="prompts taken from each task")
    arguments = parser.parse_args()
    bench = Report("policies")
    streams = [real_stream(arguments.folder, arguments.each, seed) for seed in SEEDS]
    for load, cv in LOADS:
        _one_load(bench, streams, load, cv)
    _constant_is_fcfs(bench, streams[0])
    return 0 if bench.write() else 1


def _one_load(
    bench: Report, streams: Sequence[tuple[list[Lengths], list[LengthPrediction]]], load: float, cv: float
) -> None:
    table: dict[str, Outcome] = {}
    arrivals = [sketches(requests, load * capacity(requests), cv, seed) for seed, (requests, _) in enumerate(streams)]
    for policy in POLICIES:
        runs = [
            run(arriving, Recorded(predictions), policy)
            for arriving, (_, predictions) in zip(arrivals, streams, strict=True)
        ]
        table[policy] = mean_of(runs)
    shuffled = []
    for seed, (arriving, (_, predictions)) in enumerate(zip(arrivals, streams, strict=True)):
        mixed = random.Random(seed).sample(predictions, len(predictions))
        shuffled.append(run(arriving, Recorded(mixed), "srtf-aged"))
    table["srtf-aged, shuffled"] = mean_of(shuffled)
    perfect = []
    for arriving, (requests, _) in zip(arrivals, streams, strict=True):
        truth = [LengthPrediction(one.num_output, one.num_output) for one in requests]
        perfect.append(run(arriving, Recorded(truth), "srtf-aged"))
    table["srtf-aged, perfect"] = mean_of(perfect)
    fcfs = table["fcfs"]
    print(f"\nload {load}, CV {cv:g}: mean s / p99 s / normalized s per token")
    for name, one in table.items():
        tail, gain = one.p99_s / fcfs.p99_s, fcfs.normalized_s / one.normalized_s
        shown = f"{one.mean_s:7.1f} {one.p99_s:7.0f} {one.normalized_s:7.3f}"
        print(f"  {name:22} {shown}   p99 / fcfs {tail:.2f}, normalized fcfs / this {gain:.2f}")
    bench.figures[f"load {load}"] = {name: vars(one) for name, one in table.items()}
    _bars(bench, load, table)


def _bars(bench: Report, load: float, table: Mapping[str, Outcome]) -> None:
    fcfs, ours, mixed = table["fcfs"], table["srtf-aged"], table["srtf-aged, shuffled"]
    tail = ours.p99_s / fcfs.p99_s
    if load == 0.7:
        for name in ("mean_s", "p99_s"):
            ratio = getattr(ours, name) / getattr(fcfs, name)
            bench.bar(f"{load}: {name} / fcfs", ratio, "within 2 % (or less)", ratio <= 1.02)
        return
    if load == 0.9:
        gain = fcfs.normalized_s / ours.normalized_s
        bench.bar("0.9: normalized latency, fcfs / ours", gain, "at least 4", gain >= 4)
        bench.bar("0.9: p99 / fcfs", tail, "at most 1.7", tail <= 1.7, "at most 1", tail <= 1)
    else:
        bench.bar(f"{load}: p99 / fcfs", tail, "at most 1.6", tail <= 1.6, "at most 1", tail <= 1)
    change = mixed.mean_s / fcfs.mean_s
    bench.bar(f"{load}: shuffled predictions, mean / fcfs", change, "within 5 %", abs(change - 1) <= 0.05)


def _constant_is_fcfs(bench: Report, stream: tuple[list[Lengths], list[LengthPrediction]]) -> None:
    """HRRN with equal work for all requests is order of arrival. The prompts are equally long."""
    requests = [Lengths(64, one.num_output) for one in stream[0]]
    arriving = sketches(requests, 0.9 * capacity(requests), 3.0, 0)
    orders: list[list[int]] = []
    both: tuple[PolicyName, ...] = ("fcfs", "hrrn")
    for policy in both:
        decided: list[int] = []
        same = Recorded([LengthPrediction(100, 200)] * len(requests))
        run(arriving, same, policy, on_decision=_into(decided))
        orders.append(decided)
    different = sum(a != b for a, b in zip(*orders, strict=True))
    bench.bar("decisions of hrrn with constant work that are not fcfs's", different, "0", different == 0)


def _into(decided: list[int]) -> Callable[[Decision], None]:
    return lambda decision: decided.append(decision.index)


if __name__ == "__main__":
    sys.exit(main())
