"""Useless predictors in the router of a real mesh of sim engines: `python -m benchmarks.adversaries`.

Output lengths are random and cannot be predicted. After enough requests the router does not use the predictor. The
latency of the requests after those is compared with HRRN's under equal forecasts for all outputs. Both meshes get the
same requests at the same time, so changes of the machine's speed affect both; processor time that a predictor wastes is
not measured. The order of requests with equal forecasts changes their mean latency little, so the 99th percentile is
compared too. All figures are medians over the runs.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop

from benchmarks.report import Report
from loadtest.drive import Driver
from loadtest.mesh_target import MeshTarget
from loadtest.spec import parse_spec
from loadtest.workload import plan
from muxmesh.cli.common import cache_dir
from muxmesh.clock import SystemClock
from muxmesh.scheduling_policy import PolicyName
from tests.support.bad_router import BAD
from tests.support.mesh import RunningMesh, running_mesh

UNTIL_TRIPPED = "rate=8 lengths=U(20,60)/(20,240) output=natural cap=240 requests=200 seed=1"
WORKLOAD = "rate=6 lengths=U(20,60)/(20,240) output=natural cap=240 requests=150 seed=2"
SOURCES = {"nan": "failed", "hang": "late", "crash": "failed"}
"""Source of the forecasts if the predictor returns no length. The predictions of the others do not rank: `floor`."""
TEMPERATURE = 1.0
"""Above 0, so that each output has its own seed and its own length."""
NUM_RUNS = 3


class Latency(NamedTuple):
    """Latency of the requests of one run."""

    mean_s: float
    p99_s: float


@asynccontextmanager
async def _mesh(kind: str, policy: PolicyName) -> AsyncIterator[RunningMesh]:
    profile = {"base_s": 0.02, "per_token_s": 0.0001, "output_tokens": 40, "output_lengths": "geometric"}
    model = {"name": "m", "engine": "sim", "max_num_seqs": 8, "sim": profile}
    config = {"order": {"policy": policy}, "units": [{"kv_pool": "64MiB", "models": [model]}]}
    os.environ["BAD_PREDICTOR"] = kind  # read in the router's process
    with tempfile.TemporaryDirectory(prefix="mm-") as state_dir:
        async with running_mesh(Path(state_dir), modules={"router": "tests.support.bad_router"}, **config) as mesh:
            yield mesh


async def _drive(mesh: RunningMesh, workload: str, source: str) -> Latency:
    """Latency of the workload's requests. Checks that forecasts come from ``source`` afterwards."""
    target = MeshTarget(mesh.address, TEMPERATURE, None)
    try:
        (served,) = await target.models()
        requests = plan(parse_spec(workload), served.vocabulary)
        records = (await Driver(target, requests, SystemClock()).run()).records
    finally:
        await target.close()
    assert all(record.is_ok for record in records), "a request is refused or lost"
    asked = await mesh.client.generate("x", max_new_tokens=2, explain_scheduling=True)
    assert asked.prompt.scheduling is not None
    assert asked.prompt.scheduling.source == source, "the predictor is used"
    latencies = [record.e2el_s for record in records]
    return Latency(statistics.fmean(latencies), float(np.percentile(latencies, 99)))


async def _compare(kind: str) -> tuple[Latency, Latency]:
    """Latency of HRRN and with the predictor, after its predictions were found not to rank."""
    os.environ["MUXMESH_CACHE_DIR"] = str(cache_dir())
    async with _mesh("one", "hrrn") as reference, _mesh(kind, "srtf-aged") as mesh:
        for workload in (UNTIL_TRIPPED, WORKLOAD):
            async with asyncio.TaskGroup() as both:
                hrrn = both.create_task(_drive(reference, workload, "floor"))
                bad = both.create_task(_drive(mesh, workload, SOURCES.get(kind, "floor")))
    return hrrn.result(), bad.result()


def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    bench = Report("adversaries")
    runs: dict[str, list[tuple[Latency, Latency]]] = {kind: [] for kind in BAD}
    for _ in range(NUM_RUNS):
        for kind, found in runs.items():
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                hrrn, bad = runner.run(_compare(kind))
            found.append((hrrn, bad))
            print(f"{kind}: mean {bad.mean_s:.3f} s, hrrn's {hrrn.mean_s:.3f} s", flush=True)
    bench.figures = {
        kind: [{"hrrn": hrrn._asdict(), "bad": bad._asdict()} for hrrn, bad in found] for kind, found in runs.items()
    }
    reference = [hrrn.mean_s for found in runs.values() for hrrn, _ in found]
    bench.bar("hrrn: mean latency, s", statistics.median(reference))
    spread = (max(reference) - min(reference)) / statistics.median(reference)
    bench.bar("hrrn: (most - least) / median of the runs", spread)
    for kind, found in runs.items():
        ratio = statistics.median(bad.mean_s / hrrn.mean_s for hrrn, bad in found)
        bench.bar(f"{kind}: mean latency / hrrn's", ratio, "within 5 %", abs(ratio - 1) <= 0.05)
        ratio = statistics.median(bad.p99_s / hrrn.p99_s for hrrn, bad in found)
        bench.bar(f"{kind}: p99 latency / hrrn's", ratio, "within 5 %", abs(ratio - 1) <= 0.05)
    return 0 if bench.write() else 1


if __name__ == "__main__":
    sys.exit(main())
