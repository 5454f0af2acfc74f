"""ALISE's own setting, and the share of each part, in virtual time: `python -m benchmarks.alise_virtual FOLDER`.

One model with 16 slots, Poisson arrivals. The figure is the request rate at which the mean normalized latency reaches a
level, compared with `fcfs` on the same engine (ALISE, Zhao et al. 2024, publishes 1.8 for Alpaca and 2.1 for ShareGPT
over vLLM, which serves in order of arrival). These two files have lengths without texts: predictions have injected
errors, with the rank correlation tau. Mixed prompts (four tasks in one stream) have the predictions of the mesh's own
predictor. Parts are switched off one at a time: prediction (`mlfq`, and predictions of other requests), pre-emption,
aging (`srtf`). Swap needs a lack of memory: with and without it in a pool that holds 8,192 tokens, less than half of
what 16 running and 16 paused sequences of ShareGPT need.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import csv
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.latency_curve import rate_at
from benchmarks.policies import SLOTS, Lengths, Outcome, Recorded, capacity, config, real_stream, run, sketches
from benchmarks.report import Report
from loadtest.files import read_lines
from loadtest.lengths import parse_lengths
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import LengthPrediction
from simulator.forecasts import ForecastInput, Forecasts, NoisyLengths

LOADS = (0.7, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Rates as fractions of the capacity."""
LEVELS_S = (0.1, 0.2, 0.5, 1.0)
MAIN_LEVEL_S = 0.5
REQUIRED = {"ShareGPT": 2.6, "Alpaca": 2.4}
"""Of the ratio at `MAIN_LEVEL_S` with errors at the measured tau."""
MEASURED_TAU = 0.6
"""Of the predictor on mixed prompts (`make bench-predictor`)."""
FILES = {"ShareGPT": "sharegpt_lengths.csv.gz", "Alpaca": "alpaca_lengths.csv.gz"}
MIXED = "mixed prompts"


@dataclass(frozen=True, slots=True)
class Case:
    """One system. ``tau``: of injected errors. ``model`` and ``unit``: other settings of them."""

    name: str
    policy: PolicyName = "srtf-aged"
    tau: float = MEASURED_TAU
    is_shuffled: bool = False
    model: Mapping[str, Any] = field(default_factory=dict, hash=False)
    unit: Mapping[str, Any] = field(default_factory=dict, hash=False)


FCFS = Case("fcfs", "fcfs")
WHOLE = Case("ours")
SMALL_POOL = {"kv_pool": 8192 * SIM_SPEC.kv_shape(16, "float32").kv_bytes_per_token, "slab": "64KiB"}
PARTS = (
    Case("without prediction (mlfq)", "mlfq"),
    Case("with other requests' predictions", is_shuffled=True),
    Case("without pre-emption", model={"max_paused_seqs": 0}),
    Case("without aging (srtf)", "srtf"),
    Case("small pool", unit={**SMALL_POOL, "kv_swap": "1GiB"}),
    Case("small pool, without swap", unit={**SMALL_POOL, "preemption_mode": "recompute"}),
)
TAUS = (Case("ours, tau 0.3", tau=0.3), Case("ours, tau 1", tau=1.0))


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival. ``predictions``: the predictor's own, or None."""

    name: str
    requests: Sequence[Lengths]
    predictions: Sequence[LengthPrediction] | None

    def forecasts(self, case: Case) -> Forecasts:
        """What the router of ``case`` predicts."""
        predictions = self._noisy(case.tau) if self.predictions is None else list(self.predictions)
        return Recorded(random.Random(1).sample(predictions, len(predictions)) if case.is_shuffled else predictions)

    def _noisy(self, tau: float) -> list[LengthPrediction]:
        """Predictions with injected errors, in order of arrival."""
        noisy = NoisyLengths(tau, [one.num_output for one in self.requests], 1)
        return [noisy.forecast(ForecastInput(None, "m", "", one.num_output))[0] for one in self.requests]


def outcome(workload: Workload, case: Case, rate: float) -> Outcome:
    """One run. ``rate``: requests per second."""
    arriving = sketches(workload.requests, rate, 1.0, 1)
    return run(arriving, workload.forecasts(case), case.policy, mesh=config(case.unit, **case.model))


def workloads(folder: Path, num_requests: int, each: int) -> list[Workload]:
    """ALISE's two, and mixed prompts with the predictor's own predictions."""
    rng, found = random.Random(3), []
    for name, file in FILES.items():
        sample = _pairs(folder / file)
        found.append(Workload(name, [Lengths(*sample(rng)) for _ in range(num_requests)], None))
    requests, predictions = real_stream(folder, each, 0)
    found.append(Workload(MIXED, requests[:num_requests], predictions[:num_requests]))
    return found


def cases_of(workload: Workload) -> list[Case]:
    """The systems that are compared on it, `FCFS` first. Errors are injected only where no predictions are known."""
    return [FCFS, WHOLE, *PARTS, *(TAUS if workload.predictions is None else ())]


def compared(
    bench: Report, workload: Workload, rates: Sequence[float], outcomes: Mapping[str, Sequence[Outcome]]
) -> None:
    """Adds the ratios of the rates at each level, and the tails beside those of FCFS."""
    curves = {name: [one.normalized_s for one in runs] for name, runs in outcomes.items()}
    bench.figures[workload.name] = {
        "rates": list(rates),
        "normalized_s": curves,
        "p99_s": {name: [one.p99_s for one in runs] for name, runs in outcomes.items()},
    }
    for level in LEVELS_S:
        base = rate_at(rates, curves[FCFS.name], level)
        for name, curve in curves.items():
            if name == FCFS.name:
                continue
            ratio = rate_at(rates, curve, level).over(base)
            text = f"{workload.name}, {name}: rate at {level:g} s/token, over fcfs" + (
                f" ({ratio.bound})" if ratio.bound else ""
            )
            required = REQUIRED.get(workload.name)
            if name == WHOLE.name and level == MAIN_LEVEL_S and required is not None:
                bench.bar(text, ratio.value, f"at least {required:g}", bool(ratio.reaches(required)))
            else:
                bench.bar(text, ratio.value)


def table(workload: Workload, loads: Sequence[float], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """A Markdown table: normalized latency in seconds per token, and p99 of latency over that of FCFS, at each load."""
    rows = [f"| {workload.name} | " + " | ".join(f"{load:g}" for load in loads) + " |", "|---" * (len(loads) + 1) + "|"]
    base = outcomes[FCFS.name]
    for name, runs in outcomes.items():
        cells = [
            f"{one.normalized_s:.3f}; {one.p99_s / first.p99_s:.2f}" for one, first in zip(runs, base, strict=True)
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> int:
    """Runs every case at every load, on all cores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=2000, help="of each run")
    parser.add_argument("--each", type=int, default=1100, help="prompts taken from each task of the mixed ones")
    parser.add_argument("--only", default="", help="workloads whose name contains it")
    arguments = parser.parse_args()
    bench = Report("alise_virtual")
    chosen = [
        one
        for one in workloads(arguments.folder, arguments.requests, arguments.each)
        if arguments.only.lower() in one.name.lower()
    ]
    if not chosen:
        parser.error(f"--only {arguments.only}: is in no name of {', '.join([*FILES, MIXED])}")
    with ProcessPoolExecutor() as pool:
        for workload in chosen:
            best = capacity(workload.requests)
            rates = [best * load for load in LOADS]
            cases = cases_of(workload)
            runs = {case: [pool.submit(outcome, workload, case, rate) for rate in rates] for case in cases}
            outcomes = {case.name: [one.result() for one in futures] for case, futures in runs.items()}
            print(f"\n{SLOTS} slots, {arguments.requests} requests; capacity {best:.2f} requests/s")
            print(table(workload, LOADS, outcomes), flush=True)
            compared(bench, workload, rates, outcomes)
    return 0 if bench.write() else 1


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
