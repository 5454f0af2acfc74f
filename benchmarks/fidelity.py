"""The simulator beside the real mesh of sim engines: the same workload, arrivals, lengths and orders.

`python -m benchmarks.fidelity`: mean latencies and the order of first tokens, for each policy.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
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
from simulator.timeline import MEASURED

WORKLOAD = "rate=5.6 lengths=U(20,200)/(5,120) requests=200 seed=5"
IDLE = "rate=0.6 burstiness=inf lengths=D(20,60) requests=12 seed=4"
POLICIES = ("fcfs", "srtf-aged", "hrrn")
STEP_S, PER_TOKEN_S = 0.02, 0.00005


def config(policy: str) -> dict[str, Any]:
    """One model with 8 slots and steps of 20 ms and a little for each token."""
    model = {"name": "m", "engine": "sim", "max_num_seqs": 8, "sim": {"base_s": STEP_S, "per_token_s": PER_TOKEN_S}}
    return {"order": {"policy": policy}, "units": [{"kv_pool": "64MiB", "models": [model]}]}


async def real(policy: str, workload: str = WORKLOAD) -> list[Record]:
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


def simulated(policy: str) -> list[Record]:
    """The workload in virtual time."""
    parsed = MeshConfig.model_validate(config(policy))
    return simulate(parsed, {"m": SIM_SPEC}, sketch(parse_spec(WORKLOAD)), Known(), delays=MEASURED).run.records


def main() -> int:
    """What processes add on this machine, then both, and the bars."""
    bench = Report("fidelity")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        idle = runner.run(real("fcfs", IDLE))
    step_s = statistics.median(one.tpot_s or 0.0 for one in idle) - STEP_S - PER_TOKEN_S
    first_s = statistics.median(one.ttft_s for one in idle) - STEP_S - 20 * PER_TOKEN_S
    bench.figures["idle"] = {"step_s": step_s, "ttft_s": first_s}
    bench.bar("processes add to a step, ms", step_s * 1000, f"printed; assumed {MEASURED.step_s * 1000:g}", True)
    bench.bar("processes add to the first token, ms", first_s * 1000, "printed", True)
    for policy in POLICIES:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            measured = runner.run(real(policy))
        virtual = simulated(policy)
        assert all(record.is_ok for record in (*measured, *virtual))
        e2el, ttft = (
            tuple(statistics.fmean(getattr(one, name) for one in records) for records in (virtual, measured))
            for name in ("e2el_s", "ttft_s")
        )
        bench.figures[policy] = {"e2el_s": e2el, "ttft_s": ttft}
        error = e2el[0] / e2el[1] - 1
        bench.bar(f"{policy}: mean E2EL, simulated / real - 1", error, "within 5 %", abs(error) <= 0.05)
        bench.bar(f"{policy}: mean TTFT, simulated / real - 1", ttft[0] / ttft[1] - 1, "printed", True)
        firsts = [np.array([one.pieces[0][0] for one in records]) for records in (virtual, measured)]
        bench.bar(f"{policy}: order of first tokens, tau", kendall_tau(*firsts), "printed", True)
    return 0 if bench.write() else 1


if __name__ == "__main__":
    sys.exit(main())
