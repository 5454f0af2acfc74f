"""What becomes of the KV of pre-empted sequences, in virtual time: `python -m benchmarks.preemption_modes LENGTHS`.

Requests with the lengths of real outputs (ShareGPT) go to one model with 16 slots whose pool holds too few of them.
Each case has speeds of copies and of prefill. At each choice the costs of the three ways are computed twice, with
predicted lengths (of a measured rank correlation) and with the true ones. The cost of a strategy is the sum of the
true costs of its ways over the same choices: `auto` takes the way with the least expected cost, hindsight that with the
least true one, the others always the same. Latencies of whole runs in each `preemption_mode` are printed beside it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.policies import Lengths, capacity, sketches
from benchmarks.report import Report
from loadtest.lengths import parse_lengths
from loadtest.workload import Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.types import PreemptionMode
from simulator.forecasts import Forecasts, NoisyLengths
from simulator.run import simulate
from simulator.simulated_unit import KvChoice
from simulator.timeline import NO_DELAYS

MODES: tuple[PreemptionMode, ...] = ("auto", "keep", "swap", "recompute")
TAU = 0.6
STEP_S = 0.02
LOAD = 0.9
POOL_TOKENS = 6_000
"""About a third of what 16 sequences and 16 paused ones of ShareGPT's lengths take."""


@dataclass(frozen=True)
class Case:
    """Seconds to copy the KV of 1,000 tokens in one direction, and to prefill them in a short context."""

    copy_s: float
    prefill_s: float


CASES: Mapping[str, Case] = {
    "8B, H100, PCIe gen5": Case(0.0026, 0.04),
    "8B, H100, PCIe gen4": Case(0.0052, 0.04),
    "8B, H100, 2 GB/s": Case(0.065, 0.04),
    "8B, H100, 0.4 GB/s": Case(0.33, 0.04),
    "SmolLM2, two cores": Case(0.02, 1.0),
    "small model, slow disk": Case(1.0, 0.01),
}
"""8B: 131,072 bytes of KV per token (Llama 3.1 8B, bf16), 25,000 prompt tokens/s. SmolLM2: `make bench-swap`."""


def config(mode: PreemptionMode, case: Case) -> MeshConfig:
    """One model, with swap space for all that its pool does not hold."""
    token_s = case.prefill_s / 1000
    model = {
        "name": "m", "engine": "sim", "max_num_seqs": 16, "max_model_len": 8192, "prefill_token_budget": 2048,
        "sim": {"base_s": STEP_S, "per_token_s": token_s},
    }  # fmt: skip
    block_bytes = SIM_SPEC.kv_shape(16, "float32").token_block_bytes
    pool_bytes = POOL_TOKENS // 16 * block_bytes
    unit = {"kv_pool": pool_bytes, "slab": block_bytes, "kv_swap": "1GiB", "preemption_mode": mode, "models": [model]}
    return MeshConfig.model_validate({"router": {"max_waiting_requests": 10**9}, "units": [unit]})


def strategies(choices: Sequence[KvChoice]) -> dict[str, float]:
    """Strategy → the sum of its true costs in seconds, over the first choice about each pair of sequences."""
    first = {(one.lease_id, one.for_arrival_s): one for one in reversed(choices)}
    counted = [one for one in first.values() if math.isfinite(one.true.keep) and math.isfinite(one.true.swap)]
    return {
        "auto": sum(float(getattr(one.true, one.expected.best)) for one in counted),
        "hindsight": sum(float(getattr(one.true, one.true.best)) for one in counted),
        **{way: sum(float(getattr(one.true, way)) for one in counted) for way in ("keep", "swap", "recompute")},
    }


def outcome(
    arrivals: Sequence[Sketch], forecasts: Forecasts, mode: PreemptionMode, case: Case, choices: list[KvChoice]
) -> dict[str, float]:
    """Figures of one simulation, whose choices are added to ``choices``."""
    token_bytes = SIM_SPEC.kv_shape(16, "float32").token_block_bytes / 16
    delays = replace(NO_DELAYS, swap_bytes_per_s=1000 * token_bytes / case.copy_s)
    simulated = simulate(
        config(mode, case),
        {"m": SIM_SPEC},
        arrivals,
        forecasts,
        "srtf-aged",
        delays=delays,
        on_kv_choice=choices.append,
    )
    records = simulated.run.records
    (use,) = simulated.units.values()
    return {
        "normalized_s": float(np.mean([one.normalized_s for one in records])),
        "mean_s": float(np.mean([one.e2el_s for one in records])),
        "p99_s": float(np.percentile([one.e2el_s for one in records], 99)),
        "num_displaced": use.num_displaced,
        "num_swapped": use.num_swapped,
        "num_requeued": use.num_requeued,
    }


def main() -> int:
    """Runs all cases; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.preemption_modes")
    parser.add_argument("lengths", type=Path, help="csv with prompt and output tokens")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    sample = parse_lengths(str(options.lengths))
    report, totals = Report("preemption_modes"), Counter[str]()
    for name, case in CASES.items():
        choices: list[KvChoice] = []
        runs: dict[str, list[dict[str, float]]] = {}
        for seed in range(options.seeds):
            rng = random.Random(seed)
            requests = [Lengths(*sample(rng)) for _ in range(options.requests)]
            arrivals = sketches(requests, LOAD * capacity(requests), 1.0, seed)
            lengths = [one.num_output for one in requests]
            for mode in MODES:
                seen = choices if mode == "auto" else list[KvChoice]()
                one = outcome(arrivals, NoisyLengths(TAU, lengths, seed), mode, case, seen)
                runs.setdefault(mode, []).append(one)
        costs = strategies(choices)
        means = {
            key: {figure: float(np.mean([one[figure] for one in of])) for figure in of[0]} for key, of in runs.items()
        }
        report.figures[name] = {"costs_s": costs, "runs": means}
        for name_of_mode, one in means.items():
            print(name, name_of_mode, {key: round(value, 3) for key, value in one.items()}, flush=True)
        print(name, "sum of costs", {key: round(value, 2) for key, value in costs.items()}, flush=True)
        totals.update({key: value / costs["hindsight"] for key, value in costs.items()})
        report.bar(f"{name}: auto / hindsight", costs["auto"] / costs["hindsight"])
    mean = {key: value / len(CASES) for key, value in totals.items()}
    report.bar("all cases: auto / hindsight", mean["auto"], "<= 1.1", mean["auto"] <= 1.1)
    for way in ("keep", "swap", "recompute"):
        report.bar(f"all cases: always {way} / auto", mean[way] / mean["auto"], "> 1", mean[way] > mean["auto"])
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
