"""Three models on one device in virtual time: `adbs` against a third of the device for each model, and `temporal`.

Two cores cannot be divided among three models, so this is not measured with real engines. Step times are those of
SmolLM2, its 26-layer cut and a small random model in `benchmarks.shared_device` on two cores, where half of the cores
makes a prefill 1.9 and a decode 1.3 times as long (`make bench-profile`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Report
from benchmarks.shared_device.loads import planned, rates_of, streams
from benchmarks.shared_device.outcome import SCALES, Outcome, median_of, median_ratio, outcome
from benchmarks.shared_device.systems import sim_config
from benchmarks.shared_device.virtual_time import run_in_virtual_time, unloaded_in_virtual_time
from loadtest.slo import Unloaded

SYSTEMS = ("adbs", "spatial", "temporal")
RATES = {2.1: (2.0, 2.6, 3.2, 4.0), 0.9: (2.6, 3.4, 4.2, 5.2)}
"""Alpha → requests per second of all models: from two thirds of the device's capacity to a third above it."""
MUST_ALPHA, LEAST_GAIN, AIM = 2.1, 1.2, 1.8
"""The gain over `spatial` is required at this alpha."""
_STEPS = {
    "full": {"base_s": 0.020, "per_token_s": 0.0010, "per_context_s": 4e-6},
    "cut": {"base_s": 0.017, "per_token_s": 0.00085, "per_context_s": 3.5e-6},
    "small": {"base_s": 0.005, "per_token_s": 0.0002, "per_context_s": 1e-6},
}  # fmt: skip
_SCALINGS = {"prefill_scaling": 0.9, "decode_scaling": 0.3}
_CONTENTS = dict.fromkeys(_STEPS, "lengths=U(50,150)/(60,128)")
_VOCABULARY = range(40, 200)
_MAX_NUM_SEQS = 48
_KV_MIB = 768
"""Of all models together."""
_SLO_SCALE = 8
_DURATION_S, _WARM_UP_S = 120.0, 30.0
_SEEDS = (19, 20, 21)


def config(system: str) -> dict[str, Any]:
    """The configuration of a system. `spatial`: a device of a third of the size, and of the memory, for each model."""
    share = 100 // len(_STEPS) if system == "spatial" else 100
    entries = [
        {
            "name": name, "engine": "sim", "max_num_seqs": _MAX_NUM_SEQS, "max_model_len": 1024,
            "sim": {**steps, **_SCALINGS}, "slo": {"scale": _SLO_SCALE}, "compute_share": share,
        }
        for name, steps in _STEPS.items()
    ]  # fmt: skip
    return sim_config(system, entries, _KV_MIB)


def outcomes(alpha: float, rate: float, unloaded: dict[str, Unloaded], seeds: Sequence[int] = _SEEDS) -> list[Outcome]:
    """All systems with the same requests, for each seed."""
    found = []
    for seed in seeds:
        requests = planned(streams(_CONTENTS, alpha, rate), _DURATION_S, seed, _VOCABULARY)
        rates = rates_of(requests, _DURATION_S)
        for system in SYSTEMS:
            run = run_in_virtual_time(config(system), requests)
            found.append(outcome(system, run, rates, unloaded, (_WARM_UP_S, _DURATION_S)))
    return found


def add_three(report: Report) -> None:
    """All systems at all loads. The bars are on the best load over `spatial`, and on the median one over `temporal`."""
    unloaded = unloaded_in_virtual_time(config("temporal"), _CONTENTS, 1, _VOCABULARY)
    for alpha, rates in RATES.items():
        gains, kept, tails = [], [], []
        for rate in rates:
            found = outcomes(alpha, rate, unloaded)
            report.figures[f"three, virtual, alpha {alpha}, {rate:g} requests/s"] = [one.as_json() for one in found]
            for system in SYSTEMS:
                attained = " ".join(f"{s}:{median_of(found, system, f'attainment@{s}'):.2f}" for s in SCALES)
                print(
                    f"  three, virtual, alpha {alpha}, {rate:g} requests/s: {system:9} "
                    f"weighted {median_of(found, system, 'throughput'):.3f} req/s, "
                    f"p99 TPOT {1000 * median_of(found, system, 'p99_tpot_s'):.0f} ms, attained {attained}",
                    flush=True,
                )
            gains.append(median_ratio(found, "adbs", "spatial", "throughput"))
            kept.append(median_ratio(found, "adbs", "temporal", "throughput"))
            tails.append(median_ratio(found, "adbs", "temporal", "p99_tpot_s"))
        name, best = f"three, virtual, alpha {alpha}: adbs", max(gains)
        target, ok = (f"at least {LEAST_GAIN}", best >= LEAST_GAIN) if alpha == MUST_ALPHA else ("", None)
        gain = f"{name} / spatial, rate-weighted requests/s, best load"
        report.bar(gain, best, target, ok, aim=f"at least {AIM}", is_reached=best >= AIM)
        report.bar(f"{name} / temporal, rate-weighted requests/s, median load", statistics.median(kept))
        report.bar(f"{name} / temporal, p99 TPOT, median load", statistics.median(tails))
