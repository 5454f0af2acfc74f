"""Simulates a million requests on one core: `python -m benchmarks.million [COUNT]`."""

from __future__ import annotations

import gc
import resource
import sys

from benchmarks.report import Report
from loadtest.spec import parse_spec
from muxmesh.clock import SystemClock
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from simulator.forecasts import NoisyLengths
from simulator.run import requests_of, simulate, true_length

COUNT = 1_000_000


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
    return 0 if bench.write() else 1


if __name__ == "__main__":
    sys.exit(main())
