"""Simulates a million requests on one core: `python -m benchmarks.million [COUNT]`.

Also four models that share a device, at 50 requests/s and with about the step times of a 7B model on four A100.
"""

from __future__ import annotations

import gc
import resource
import sys

from benchmarks.report import Report
from loadtest.spec import parse_spec
from muxmesh.clock import SystemClock
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from simulator.forecasts import NoisyLengths, TrueLengths
from simulator.run import requests_of, simulate, true_length

COUNT = 1_000_000
SHARED_RATE, SHARED_S = 50, 120
"""Requests per second of all four models, and for how long."""


def main() -> int:
    """Generates the workload, simulates, reports."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    model = {"name": "m", "engine": "sim", "max_num_seqs": 16, "sim": {"base_s": 0.02, "per_token_s": 0.0001}}
    config = MeshConfig.model_validate({"units": [{"kv_pool": "1GiB", "models": [model]}]})
    clock = SystemClock()
    began_at_s = clock.monotonic_s()
    sketches = requests_of(parse_spec(f"rate=5 lengths=N(200,100)/(100,60) output=natural requests={count} seed=1"))
    gc.freeze()  # else the collector scans millions of live objects repeatedly
    generated_at_s = clock.monotonic_s()
    simulated = simulate(
        config, {"m": SIM_SPEC}, sketches, NoisyLengths(0.5, [true_length(one) for one in sketches], 1)
    )
    took_s = clock.monotonic_s() - generated_at_s
    assert all(record.is_ok for record in simulated.run.records)
    bench = Report("simulator")
    bench.figures = {
        "requests": count,
        "virtual_s": simulated.run.duration_s,
        "num_events": simulated.num_events,
        "draw_s": generated_at_s - began_at_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    bench.bar("seconds of simulation", took_s, "minutes for a million", took_s <= 900 * count / COUNT)
    bench.bar("microseconds for a request", took_s / count * 1e6)
    bench.bar("virtual seconds in a second", simulated.run.duration_s / took_s)
    speed, num_events = _four_models(clock)
    bench.figures["shared_events"] = num_events
    bench.bar("four models, virtual seconds in a second", speed)
    return 0 if bench.write() else 1


def _four_models(clock: SystemClock) -> tuple[float, int]:
    """Virtual seconds that are simulated in one second under adbs, and the events in all."""
    rates = {"a": 25, "b": 12, "c": 8, "d": 5}
    sim = {"base_s": 0.0125, "per_token_s": 0.00002, "per_context_s": 7e-8, "decode_scaling": 0.3}
    models = [
        {
            "name": name,
            "engine": "sim",
            "max_num_seqs": 256,
            "max_model_len": 4096,
            "prefill_token_budget": 2048,
            "compute_share": {"prefill": 80, "decode": 40},
            "sim": sim,
        }
        for name in rates
    ]
    unit = {"kv_pool": "20GiB", "slab": "64MiB", "arbiter": {"mode": "adbs", "over_subscription": 20}, "models": models}
    config = MeshConfig.model_validate({"order": {"policy": "fcfs"}, "units": [unit]})
    popularity = ",".join(f"{name}:{rate}" for name, rate in rates.items())
    count = SHARED_RATE * SHARED_S
    sketches = requests_of(
        parse_spec(f"rate={SHARED_RATE} lengths=N(161,100)/(338,200) requests={count} seed=1 models={popularity}")
    )
    gc.freeze()
    began_at_s = clock.monotonic_s()
    simulated = simulate(config, dict.fromkeys(rates, SIM_SPEC), sketches, TrueLengths())
    took_s = clock.monotonic_s() - began_at_s
    assert all(record.is_ok for record in simulated.run.records)
    return simulated.run.duration_s / took_s, simulated.num_events


if __name__ == "__main__":
    sys.exit(main())
