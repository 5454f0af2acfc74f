"""Compares the scheduling policies in virtual time: `python -m benchmarks.policies FOLDER`, with the public files.

One model with 16 slots. Lengths are those of real outputs (four tasks in one stream). Predictions are those of the
mesh's own predictor, each made before it learned the output. The runs of one load share arrivals, lengths and
predictions.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import csv
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.lengths_data import stream_items
from benchmarks.report import Report
from loadtest.files import read_lines
from loadtest.lengths import parse_lengths
from loadtest.workload import Body, Sketch
from muxmesh.clock import SystemClock
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.predictor.evaluate import replay
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import LengthPrediction
from simulator.forecasts import ForecastInput, Forecasts, NoisyLengths
from simulator.run import simulate
from simulator.simulated_unit import Decision

SLOTS, STEP_S = 16, 0.02
LOADS = ((0.7, 1.0), (0.9, 3.0), (1.1, 1.0))
POLICIES: tuple[PolicyName, ...] = ("fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq")
SEEDS = (0, 1, 2)
REQUESTS = 10_000
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


def config() -> MeshConfig:
    """One model with 16 slots, memory for all of them, and steps of 20 ms whatever their batch is."""
    model = {"name": "m", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S}, "prefill_token_budget":
    2048,
             "max_model_len": 8192}  # fmt: skip
    return MeshConfig.model_validate({
        "router": {"max_waiting_requests": 10**9},
        "units": [{"kv_pool": "8GiB", "models": [model]}],
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
    on_decision: Callable[[Decision], None] | None = None,
) -> Outcome:  # fmt: skip
    """Latencies of one simulation."""
    simulated = simulate(config(), {"m": SIM_SPEC}, requests, forecasts, policy, on_decision)
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
    """Tables, controls and the setting of ALISE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=1100, help="prompts taken from each task")
    arguments = parser.parse_args()
    bench = Report("policies")
    streams = [real_stream(arguments.folder, arguments.each, seed) for seed in SEEDS]
    for load, cv in LOADS:
        _one_load(bench, streams, load, cv)
    _constant_is_fcfs(bench, streams[0])
    _alise(bench, arguments.folder)
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
        bench.bar("1.1: p99 / fcfs", tail, "at most 1.6", tail <= 1.6, "at most 1", tail <= 1)
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


def _alise(bench: Report, folder: Path) -> None:
    """Request rates at which the mean normalized latency reaches given levels, with injected prediction errors."""
    rng = random.Random(3)
    for name, file, aim in (("ShareGPT", "sharegpt_lengths.csv.gz", 2.1), ("Alpaca", "alpaca_lengths.csv.gz", 1.8)):
        sample = _pairs(folder / file)
        requests = [Lengths(*sample(rng)) for _ in range(2000)]
        best = capacity(requests)
        rates = [best * part for part in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)]
        curves: dict[str, list[float]] = {}
        lengths = [one.num_output for one in requests]
        arrivals = [sketches(requests, rate, 1.0, 1) for rate in rates]
        orders: tuple[PolicyName, ...] = ("srtf-aged", "srtf")
        cases: list[tuple[str, PolicyName, float]] = [("fcfs", "fcfs", 0.0)]
        cases += [(f"{policy}, tau {tau}", policy, tau) for policy in orders for tau in (0.3, 0.6, 1.0)]
        for label, policy, tau in cases:
            outcomes = [run(arriving, NoisyLengths(tau, lengths, 1), policy) for arriving in arrivals]
            curves[label] = [one.normalized_s for one in outcomes]
        bench.figures[f"alise {name}"] = {"rates": rates, "capacity": best, "normalized_s": curves}
        for level in (0.1, 0.2, 0.5, 1.0):
            reached = {label: rate_at(rates, curve, level) for label, curve in curves.items()}
            for label in list(reached)[1:]:
                ratio = reached[label] / reached["fcfs"]
                figure = f"{name}, {label}: rate at {level} s/token, ours / fcfs"
                if level == 0.5:
                    bench.bar(figure, ratio, aim=f"at least {aim}", is_reached=ratio >= aim)
                else:
                    bench.bar(figure, ratio)


def rate_at(rates: Sequence[float], latencies: Sequence[float], level: float) -> float:
    """The highest rate whose latency is at most ``level``, with linear interpolation between the rates."""
    above = next((index for index, one in enumerate(latencies) if one > level), None)
    if above is None:
        return rates[-1]
    if above == 0:
        return rates[0]
    low, high = latencies[above - 1], latencies[above]
    return rates[above - 1] + (rates[above] - rates[above - 1]) * (level - low) / (high - low)


def _pairs(path: Path) -> Callable[[random.Random], tuple[int, int]]:
    """Samples (prompt, output) tokens. ShareGPT has both. Of Alpaca only Vicuna's outputs at temperature 0.7 are known;
    its prompts are short, and taken to be 20 tokens.
    """
    if "alpaca" not in path.name:
        return parse_lengths(str(path))
    rows = [max(1, int(row["L_t0.7"])) for row in csv.DictReader(read_lines(path))]
    return lambda rng: (20, rng.choice(rows))


if __name__ == "__main__":
    sys.exit(main())
