"""The simulator beside the real mesh of sim engines: the same workload, arrivals, lengths and orders.

`python -m benchmarks.fidelity`: mean latencies and the order of first tokens, for each policy. What processes add to a
step differs from machine to machine and from minute to minute, and near saturation a hundredth of a step is a tenth of
the latency. So each mesh gets another workload first, on which that is measured, and the load is one that a mesh is run
at.
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
_AFTER_S = 60.0
"""Virtual seconds from one workload to the next; more than the first one takes."""


def config(policy: str) -> dict[str, Any]:
    """One model with a few slots and steps of 50 ms and a little for each token."""
    model = {"name": "m", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S, "per_token_s": PER_TOKEN_S}}
    return {"order": {"policy": policy}, "units": [{"kv_pool": "64MiB", "models": [model]}]}


async def _real(policy: str) -> tuple[list[Record], list[Record]]:
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "fidelity_mesh.yaml"
    path.write_text(json.dumps(config(policy)))
    async with up("-c", str(path)) as mesh:
        target = MeshTarget(mesh.address, 0.0, None)
        try:
            (model,) = await target.models()
            ran = [
                (await Driver(target, plan(parse_spec(text), model.vocabulary), SystemClock()).run()).records
                for text in (TOGETHER, WORKLOAD)
            ]
            return ran[0], ran[1]
        finally:
            await target.close()


def real(policy: str) -> tuple[list[Record], list[Record]]:
    """Both workloads, one after the other, on a mesh of processes of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        first, second = runner.run(_real(policy))
    assert all(record.is_ok for record in (*first, *second))
    return first, second


def simulated(policy: str, delays: Delays) -> list[Record]:
    """The second workload in virtual time, after the first."""
    first, second = sketch(parse_spec(TOGETHER)), sketch(parse_spec(WORKLOAD))
    both = first + [replace(one, index=one.index + len(first), at_s=one.at_s + _AFTER_S) for one in second]
    parsed = MeshConfig.model_validate(config(policy))
    records = simulate(parsed, {"m": SIM_SPEC}, both, Known(), delays=delays).run.records
    assert all(record.is_ok for record in records)
    return records[len(first) :]


def delays_of(records: list[Record]) -> Delays:
    """What processes added to a step of a full batch; the rest as it was measured once."""
    tpots_s = [one.tpot_s for one in records if one.tpot_s is not None]
    return replace(MEASURED, step_s=statistics.median(tpots_s) - STEP_S - SLOTS * PER_TOKEN_S)


def main() -> int:
    """Both, several times by turns, since the machine's minutes differ; the bars are of medians."""
    bench = Report("fidelity")
    errors: dict[str, dict[str, list[float]]] = {policy: {"e2el_s": [], "ttft_s": [], "tau": []} for policy in POLICIES}
    steps_s: list[float] = []
    for _ in range(NUM_RUNS):
        for policy in POLICIES:
            together, measured = real(policy)
            delays = delays_of(together)
            virtual = simulated(policy, delays)
            steps_s.append(delays.step_s)
            for name in ("e2el_s", "ttft_s"):
                errors[policy][name].append(_mean(virtual, name) / _mean(measured, name) - 1)
            firsts = [np.array([one.pieces[0][0] for one in records]) for records in (virtual, measured)]
            errors[policy]["tau"].append(kendall_tau(*firsts))
    bench.figures.update(step_s=steps_s, errors=errors)
    bench.bar("processes add to a step, ms", statistics.median(steps_s) * 1000, "printed", True)
    for policy, of in errors.items():
        error = statistics.median(of["e2el_s"])
        bench.bar(f"{policy}: mean E2EL, simulated / real - 1", error, "within 5 %", abs(error) <= 0.05)
        bench.bar(f"{policy}: mean TTFT, simulated / real - 1", statistics.median(of["ttft_s"]), "printed", True)
        bench.bar(f"{policy}: order of first tokens, tau", statistics.median(of["tau"]), "printed", True)
    return 0 if bench.write() else 1


def _mean(records: list[Record], name: str) -> float:
    return statistics.fmean(getattr(record, name) for record in records)


if __name__ == "__main__":
    sys.exit(main())
