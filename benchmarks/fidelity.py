"""The simulator against a real mesh of sim engines, on the same arrivals, lengths and policies.

`python -m benchmarks.fidelity` compares mean latencies and the order of first tokens, for each policy. The time that
processes add to a step differs between machines and changes within minutes, and near saturation 1 % of a step is 10 %
of the latency. So it is measured on each mesh, with another workload before and after the compared one, and the load is
below saturation.
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
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.predictor.rank_correlation import kendall_tau
from simulator.forecasts import TrueLengths
from simulator.run import simulate
from simulator.timeline import MEASURED, Delays

WORKLOAD = "rate=1.7 burstiness=0.25 lengths=U(20,200)/(5,120) requests=100 seed=5"
TOGETHER = "rate=inf lengths=D(20,100) requests=8 seed=4"
POLICIES = ("fcfs", "srtf-aged", "hrrn")
SLOTS = 8
STEP_S, PER_TOKEN_S = 0.05, 0.0001
NUM_RUNS = 3
_AFTER_S = 60.0
"""Virtual seconds from the start of one workload to the next; more than the first one takes."""


def config(policy: str) -> dict[str, Any]:
    """One model with a few slots, and steps of 50 ms plus 0.1 ms for each token."""
    model = {"name": "m", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S, "per_token_s": PER_TOKEN_S}}
    return {"order": {"policy": policy}, "units": [{"kv_pool": "64MiB", "models": [model]}]}


async def _real(policy: str) -> list[list[Record]]:
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "fidelity_mesh.yaml"
    path.write_text(json.dumps(config(policy)))
    async with up("-c", str(path)) as mesh:
        target = MeshTarget(mesh.address, 0.0, None)
        try:
            (model,) = await target.models()
            return [
                (await Driver(target, plan(parse_spec(text), model.vocabulary), SystemClock()).run()).records
                for text in (TOGETHER, WORKLOAD, TOGETHER)
            ]
        finally:
            await target.close()


def real(policy: str) -> tuple[list[Record], Delays]:
    """The workload on a real mesh, and the time that its processes added to a step of a full batch around it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        before, measured, after = runner.run(_real(policy))
    assert all(record.is_ok for record in (*before, *measured, *after))
    step_s = statistics.fmean((_step_s(before), _step_s(after)))
    return measured, replace(MEASURED, step_s=step_s - STEP_S - SLOTS * PER_TOKEN_S)


def _step_s(records: list[Record]) -> float:
    """Time of a step once the batch is full and warm: the median over the sequences."""
    warm = [one.pieces[len(one.pieces) // 5 :] for one in records]
    return statistics.median(
        (pieces[-1][0] - pieces[0][0]) / sum(count for _, count in pieces[1:]) for pieces in warm
    )  # fmt: skip


def simulated(policy: str, delays: Delays) -> list[Record]:
    """The workload in virtual time, after the workload that precedes it on the real mesh."""
    before, measured = sketch(parse_spec(TOGETHER)), sketch(parse_spec(WORKLOAD))
    both = before + [replace(one, index=one.index + len(before), at_s=one.at_s + _AFTER_S) for one in measured]
    parsed = MeshConfig.model_validate(config(policy))
    records = simulate(parsed, {"m": SIM_SPEC}, both, TrueLengths(), delays=delays).run.records
    assert all(record.is_ok for record in records)
    assert all(record.ended_s is not None and record.ended_s < _AFTER_S for record in records[: len(before)])
    return records[len(before) :]


def main() -> int:
    """Runs both in alternation, since the machine's speed changes; the bars are on medians."""
    bench = Report("fidelity")
    found: dict[str, dict[str, list[float]]] = {policy: {"e2el_s": [], "ttft_s": [], "tau": []} for policy in POLICIES}
    steps_s: list[float] = []
    for _ in range(NUM_RUNS):
        for policy in POLICIES:
            measured, delays = real(policy)
            virtual = simulated(policy, delays)
            steps_s.append(delays.step_s)
            for name in ("e2el_s", "ttft_s"):
                found[policy][name].append(_mean(virtual, name) / _mean(measured, name) - 1)
            firsts = [np.array([one.pieces[0][0] for one in records]) for records in (virtual, measured)]
            found[policy]["tau"].append(kendall_tau(*firsts))
    bench.figures.update(step_s=steps_s, found=found)
    bench.bar("processes add to a step, ms", statistics.median(steps_s) * 1000)
    for policy, runs in found.items():
        error = statistics.median(runs["e2el_s"])
        bench.bar(f"{policy}: mean E2EL, simulated / real - 1", error, "within 5 %", abs(error) <= 0.05)
        bench.bar(f"{policy}: mean TTFT, simulated / real - 1", statistics.median(runs["ttft_s"]))
        bench.bar(f"{policy}: order of first tokens, tau", statistics.median(runs["tau"]))
    return 0 if bench.write() else 1


def _mean(records: list[Record], name: str) -> float:
    return statistics.fmean(getattr(record, name) for record in records)


if __name__ == "__main__":
    sys.exit(main())
