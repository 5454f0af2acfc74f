"""A hash over all decisions and records of several simulations: `python -m benchmarks.decision_hashes [NAME ...]`.

A change that only makes the simulator or kvstore faster leaves every hash as it was: run it before and after. The
cases have pre-emption by order and by memory, swap, small pools, loans between models, deadlines, classes and shared
prefixes.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loadtest.spec import parse_spec
from loadtest.workload import Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from simulator.forecasts import Forecasts, NoisyLengths, TrueLengths
from simulator.run import requests_of, simulate, true_length
from simulator.simulated_unit import Decision, KvChoice
from simulator.timeline import MEASURED, Delays

TOKEN_BLOCK_BYTES = SIM_SPEC.kv_shape(16, "float32").token_block_bytes
SLOW_COPIES = Delays(swap_bytes_per_s=TOKEN_BLOCK_BYTES * 200.0)
"""200 token blocks in a second."""


@dataclass(frozen=True)
class Case:
    """One simulation. ``tau``: rank correlation of the predictions; None: they are exact."""

    workload: str
    unit: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("m",)
    order: Mapping[str, Any] = field(default_factory=dict)
    tau: float | None = 0.5
    delays: Delays = MEASURED
    num_prefixes: int = 0
    """Prompts begin with one of this many prefixes; 0: no two share tokens."""


_BUSY = "lengths=N(200,100)/(100,60) output=natural seed=1"
_SMALL_POOL = {"kv_pool": 400 * TOKEN_BLOCK_BYTES, "slab": 4 * TOKEN_BLOCK_BYTES}
_SWAP = {**_SMALL_POOL, "kv_swap": "64MiB"}
_SLO = {"slo": {"ttft_s": 2.0, "tpot_s": 0.1}}
_SHARED = {"arbiter": {"mode": "adbs", "over_subscription": 20}, "kv_pool": "20GiB", "slab": "64MiB"}
_LARGE = {
    "max_num_seqs": 256, "max_model_len": 4096, "prefill_token_budget": 2048,
    "compute_share": {"prefill": 80, "decode": 40},
    "sim": {"base_s": 0.0125, "per_token_s": 0.00002, "per_context_s": 7e-8, "decode_scaling": 0.3},
}  # fmt: skip
_FOUR_RATES = "models=a:25,b:12,c:8,d:5"
CASES: dict[str, Case] = {
    "16 slots": Case(f"rate=6 requests=1000 {_BUSY}"),
    "bursts": Case(f"rate=6 burstiness=0.1 requests=600 {_BUSY}"),
    "classes": Case(f"rate=8 priorities=0:8,-1,1 requests=600 {_BUSY}", order={"max_wait_s": 30}),
    "fcfs": Case(f"rate=8 requests=400 {_BUSY}", order={"policy": "fcfs"}),
    "srtf": Case(f"rate=8 requests=400 {_BUSY}", order={"policy": "srtf"}),
    "hrrn": Case(f"rate=8 requests=400 {_BUSY}", order={"policy": "hrrn"}),
    "mlfq": Case(f"rate=8 requests=400 {_BUSY}", order={"policy": "mlfq"}),
    "exact lengths": Case(f"rate=8 requests=600 {_BUSY}", tau=None),
    "slo": Case(f"rate=7 requests=500 {_BUSY}", model=_SLO),
    "small pool": Case(f"rate=7 requests=500 {_BUSY}", _SMALL_POOL),
    "swap": Case(f"rate=7 requests=500 {_BUSY}", _SWAP),
    "swap int8, slo": Case(f"rate=7 requests=400 {_BUSY}", _SWAP, {"kv_swap_format": "int8", **_SLO}),
    "slow copies": Case(f"rate=7 requests=400 {_BUSY}", _SWAP, delays=SLOW_COPIES),
    **{
        f"always {mode}": Case(f"rate=7 requests=300 {_BUSY}", {**_SWAP, "preemption_mode": mode}, delays=SLOW_COPIES)
        for mode in ("keep", "swap", "recompute")
    },
    "little swap": Case(f"rate=7 requests=400 {_BUSY}", {**_SMALL_POOL, "kv_swap": "256KiB"}, delays=SLOW_COPIES),
    "prefixes": Case(f"rate=8 requests=500 {_BUSY}", _SWAP, num_prefixes=8),
    "two models": Case(
        f"rate=9 models=a:3,b:1 requests=500 {_BUSY}", {**_SWAP, "kv_pool": 500 * TOKEN_BLOCK_BYTES}, models=("a", "b")
    ),
    "three models, two awake": Case(
        f"rate=4 models=a:3,b:1,c:1 requests=300 {_BUSY}", {"max_awake_models": 2}, models=("a", "b", "c")
    ),
    "256 slots, fcfs": Case(
        f"rate=50 {_FOUR_RATES} requests=700 lengths=N(161,100)/(338,200) seed=1",
        _SHARED, _LARGE, ("a", "b", "c", "d"), {"policy": "fcfs"}, None,
    ),
    "256 slots, a queue": Case(
        f"rate=400 {_FOUR_RATES} requests=1500 lengths=N(161,100)/(338,200) seed=2", _SHARED, _LARGE,
        ("a", "b", "c", "d"),
    ),
}  # fmt: skip


def config(case: Case) -> MeshConfig:
    """One unit with the models of the case."""
    model = {"engine": "sim", "max_num_seqs": 16, "sim": {"base_s": 0.02, "per_token_s": 0.0001}, **case.model}
    models = [{"name": name, **model} for name in case.models]
    unit = {"kv_pool": "1GiB", **case.unit, "models": models}
    return MeshConfig.model_validate(
        {"order": dict(case.order), "router": {"max_waiting_requests": 10**9}, "units": [unit]}
    )


def sketches(case: Case) -> list[Sketch]:
    """The requests of the case."""
    requests = requests_of(parse_spec(case.workload))
    if not case.num_prefixes:
        return requests
    return [
        replace(one, body=replace(one.body, hash_ids=tuple(range(one.index % case.num_prefixes, 40)), hash_tokens=16))
        for one in requests
    ]


def decision_hash(case: Case) -> tuple[str, str]:
    """The hash over decisions, choices of what becomes of KV, records and the use of the unit; and a summary."""
    arrivals = sketches(case)
    lengths = [true_length(one) for one in arrivals]
    forecasts: Forecasts = TrueLengths() if case.tau is None else NoisyLengths(case.tau, lengths, 1)
    decisions: list[Decision] = []
    choices: list[KvChoice] = []
    simulated = simulate(
        config(case), dict.fromkeys(case.models, SIM_SPEC), arrivals, forecasts,
        on_decision=decisions.append, on_kv_choice=choices.append, delays=case.delays,
    )  # fmt: skip
    hashed = hashlib.sha256()
    for one in (*decisions, *choices, *simulated.run.records, *sorted(simulated.units.items())):
        hashed.update(repr(one).encode())
    use = [unit for _, unit in sorted(simulated.units.items())]
    assert all(one.is_ok for one in simulated.run.records)
    summary = (
        f"{len(decisions)} decisions, {len(choices)} choices, {sum(one.num_displaced for one in use)} displaced, "
        f"{sum(one.num_swapped for one in use)} swapped, {simulated.num_requeued} computed again"
    )
    return hashed.hexdigest()[:16], summary


def main() -> int:
    """Prints one line for each case that is named, for all without a name; the last line is the hash of them all."""
    every = hashlib.sha256()
    for name in sys.argv[1:] or CASES:
        found, summary = decision_hash(CASES[name])
        every.update(found.encode())
        print(f"{name:26} {found}  {summary}", flush=True)
    print(f"{'all':26} {every.hexdigest()[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
