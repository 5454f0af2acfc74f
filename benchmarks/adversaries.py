"""Predictors that are of no use, in a router of a real mesh of sim engines: `python -m benchmarks.adversaries`.

The lengths of the answers cannot be told in advance. First come enough requests for the floor to trip; the mean latency
of those after them is set beside HRRN's, where every answer is expected to be equally long. By turns, medians.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path

import uvloop

from benchmarks.report import Report
from loadtest.drive import Driver
from loadtest.mesh_target import MeshTarget
from loadtest.record import Record
from loadtest.spec import parse_spec
from loadtest.workload import plan
from muxmesh.cli.common import cache_dir
from muxmesh.clock import SystemClock
from muxmesh.order import Policy
from tests.support.bad_router import BAD
from tests.support.mesh import running_mesh

UNTIL_TRIPPED = "rate=8 lengths=U(20,60)/(20,240) output=natural cap=240 requests=200 seed=1"
WORKLOAD = "rate=6 lengths=U(20,60)/(20,240) output=natural cap=240 requests=150 seed=2"
SOURCES = {"nan": "failed", "hang": "late", "crash": "failed"}
"""Of the forecasts of predictors that say nothing; the others are found not to rank."""
TEMPERATURE = 1.0
"""Each answer has a seed, and so a length, of its own."""
NUM_RUNS = 3


async def _run(kind: str, policy: Policy) -> list[Record]:
    profile = {"base_s": 0.02, "per_token_s": 0.0001, "output_tokens": 40, "output_lengths": "geometric"}
    model = {"name": "m", "engine": "sim", "max_num_seqs": 8, "sim": profile}
    config = {"order": {"policy": policy}, "units": [{"kv_pool": "64MiB", "models": [model]}]}
    os.environ["BAD_PREDICTOR"] = kind  # read in the router's process
    os.environ["MUXMESH_CACHE_DIR"] = str(cache_dir())
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="mm-") as state_dir:
        async with running_mesh(Path(state_dir), modules={"router": "tests.support.bad_router"}, **config) as mesh:
            target = MeshTarget(mesh.address, TEMPERATURE, None)
            try:
                (served,) = await target.models()
                for workload in (UNTIL_TRIPPED, WORKLOAD):
                    requests = plan(parse_spec(workload), served.vocabulary)
                    records = (await Driver(target, requests, SystemClock()).run()).records
                    assert all(record.is_ok for record in records), "nobody is refused or lost"
                    asked = await mesh.client.generate("x", max_new_tokens=2, explain_scheduling=True)
                    assert asked.prompt.scheduling is not None
                    assert asked.prompt.scheduling.source == SOURCES.get(kind, "floor"), "it is not used"
            finally:
                await target.close()
    return records


def mean_s(kind: str, policy: Policy) -> float:
    """Mean latency on a mesh of its own, after the floor has tripped."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return statistics.fmean(record.e2el_s for record in runner.run(_run(kind, policy)))


def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    bench = Report("adversaries")
    reference: list[float] = []
    means: dict[str, list[float]] = {kind: [] for kind in BAD}
    for _ in range(NUM_RUNS):
        reference.append(mean_s("one", "hrrn"))
        for kind, found in means.items():
            found.append(mean_s(kind, "srtf-aged"))
            print(f"{kind}: {found[-1]:.3f} s, hrrn {reference[-1]:.3f} s", flush=True)
    bench.figures = {"hrrn": reference, **means}
    middle = statistics.median(reference)
    spread = (max(reference) - min(reference)) / middle
    bench.bar("hrrn: mean latency, s", middle, "printed", True)
    bench.bar("hrrn: (most - least) / median of the runs", spread, "printed", True)
    for kind, found in means.items():
        ratio = statistics.median(found) / middle
        bench.bar(f"{kind}: mean latency / hrrn's", ratio, "within 5 %", abs(ratio - 1) <= 0.05)
    return 0 if bench.write() else 1


if __name__ == "__main__":
    sys.exit(main())
