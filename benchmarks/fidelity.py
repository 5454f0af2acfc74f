"""The simulator beside the real mesh of sim engines: the same workload, arrivals, lengths and orders.

`python -m benchmarks.fidelity`: mean latencies and the order of first tokens, for each policy. What processes add to a
step differs from machine to machine and from minute to minute, and near saturation a hundredth of a step is a tenth of
the latency. So it is measured in the same run, on another workload, and the load is one that a mesh is run at.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import uvloop

from benchmarks.mesh_process import up
from benchmarks.report import OUT, Report
from loadtest.drive import Driver
from loadtest.mesh_target import MeshTarget
from loadtest.record import Record
from loadtest.spec import parse_spec
from loadtest.workload import plan, sketch
from muxmesh.clock import SystemClock
from muxmesh.config.schema import MeshConfig
from muxmesh.models.spec import SIM_SPEC
from muxmesh.predictor.quality import kendall_tau
from simulator.forecasts import Known
from simulator.run import simulate
from simulator.timeline import MEASURED, Delays

WORKLOAD = "rate=1.7 burstiness=0.25 lengths=U(20,200)/(5,120) requests=100 seed=5"
TOGETHER = "rate=inf lengths=D(20,60) requests=8 seed=4"
POLICIES = ("fcfs", "srtf-aged", "hrrn")
SLOTS = 8
STEP_S, PER_TOKEN_S = 0.05, 0.0001
NUM_RUNS = 3


def config(policy: str) -> dict[str, Any]:
    """One model with a few slots and steps of 50 ms and a little for each token."""
    model = {"name": "m", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S, "per_token_s": PER_TOKEN_S}}
    return {"order": {"policy": policy}, "units": [{"kv_pool": "64MiB", "models": [model]}]}


async def _real(policy: str, workload: str) -> list[Record]:
    """A workload on a mesh of processes."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "fidelity_mesh.yaml"
    path.write_text(json.dumps(config(policy)))
    async with up("-c", str(path)) as mesh:
        target = MeshTarget(mesh.address, 0.0, None)
        try:
            (model,) = await target.models()
            requests = plan(parse_spec(workload), model.vocabulary)
            return (await Driver(target, requests, SystemClock()).run()).records
        finally:
            await target.close()


def real(policy: str, workload: str = WORKLOAD) -> list[Record]:
    """A workload on a mesh of processes of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        records = runner.run(_real(policy, workload))
    assert all(record.is_ok for record in records)
    return records


def simulated(policy: str, delays: Delays) -> list[Record]:
    """The workload in virtual time."""
    parsed = MeshConfig.model_validate(config(policy))
    records = simulate(parsed, {"m": SIM_SPEC}, sketch(parse_spec(WORKLOAD)), Known(), delays=delays).run.records
    assert all(record.is_ok for record in records)
    return records


def measured_delays() -> Delays:
    """What processes add to a step of a full batch now; the rest as it was measured once."""
    tpots_s = [one.tpot_s for _ in range(NUM_RUNS) for one in real("fcfs", TOGETHER) if one.tpot_s is not None]
    return replace(MEASURED, step_s=statistics.median(tpots_s) - STEP_S - SLOTS * PER_TOKEN_S)


def main() -> int:
    """What processes add on this machine, then both, and the bars."""
    bench = Report("fidelity")
    delays = measured_delays()
    bench.figures["step_s"] = delays.step_s
    bench.bar("processes add to a step, ms", delays.step_s * 1000, "printed", True)
    runs: dict[str, list[list[Record]]] = {policy: [] for policy in POLICIES}
    for _ in range(NUM_RUNS):  # by turns: the machine's minutes differ
        for policy in POLICIES:
            runs[policy].append(real(policy))
    for policy, measured in runs.items():
        virtual = simulated(policy, delays)
        errors: dict[str, list[float]] = {}
        for name in ("e2el_s", "ttft_s"):
            said_s = _mean(virtual, name)
            errors[name] = [said_s / _mean(records, name) - 1 for records in measured]
        bench.figures[policy] = {"e2el_s": _mean(virtual, "e2el_s"), **errors}
        error = statistics.median(errors["e2el_s"])
        bench.bar(f"{policy}: mean E2EL, simulated / real - 1", error, "within 5 %", abs(error) <= 0.05)
        bench.bar(f"{policy}: mean TTFT, simulated / real - 1", statistics.median(errors["ttft_s"]), "printed", True)
        firsts = [np.array([one.pieces[0][0] for one in records]) for records in (virtual, *measured)]
        taus = [kendall_tau(firsts[0], one) for one in firsts[1:]]
        bench.bar(f"{policy}: order of first tokens, tau", statistics.median(taus), "printed", True)
    return 0 if bench.write() else 1


def _mean(records: list[Record], name: str) -> float:
    return statistics.fmean(getattr(record, name) for record in records)


if __name__ == "__main__":
    sys.exit(main())
