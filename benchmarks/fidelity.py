"""The simulator against a real mesh of sim engines, on the same arrivals, lengths and policies.

`python -m benchmarks.fidelity [CASE...]` compares mean latencies and the order of first tokens, for each case: one
model under three policies, and two models that compute at the same time, by their shares. The time that processes add
to a step differs between machines and changes within minutes, and near saturation 1 % of a step is 10 % of the latency.
So it is measured on each mesh, with another workload before and after the compared one, and the load is below
saturation.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import uvloop

from benchmarks.mesh_process import mesh_target
from benchmarks.report import Report
from loadtest.drive import Driver
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

SLOTS = 8
STEP_S, PER_TOKEN_S = 0.05, 0.0001
NUM_RUNS = 3
_AFTER_S = 60.0
"""Virtual seconds from the start of one workload to the next; more than the first one takes."""
_LENGTHS = "burstiness=0.25 lengths=U(20,200)/(5,120)"


@dataclass(frozen=True)
class Case:
    """One mesh with one unit. ``shares``: of prefill and decode, in percent. ``rate``: requests per second."""

    models: tuple[str, ...]
    policy: str
    rate: float
    num_requests: int
    shares: tuple[int, int] = (100, 100)

    @property
    def workload(self) -> str:
        models = ",".join(self.models)
        return f"rate={self.rate} {_LENGTHS} requests={self.num_requests} seed=5 models={models}"

    @property
    def together(self) -> str:
        """A workload that fills the batch of the first model."""
        return f"rate=inf lengths=D(20,100) requests={SLOTS} seed=4 models={self.models[0]}"

    @property
    def config(self) -> dict[str, Any]:
        """Models with a few slots, and steps of 50 ms plus 0.1 ms for each token, whatever the share."""
        prefill, decode = self.shares
        steps = {"base_s": STEP_S * decode / 100, "per_token_s": PER_TOKEN_S * decode / 100}
        models = [
            {
                "name": name,
                "engine": "sim",
                "max_num_seqs": SLOTS,
                "sim": steps,
                "compute_share": {"prefill": prefill, "decode": decode},
            }
            for name in self.models
        ]
        unit = {"kv_pool": "64MiB", "arbiter": {"mode": "adbs", "over_subscription": 0}, "models": models}
        return {"order": {"policy": self.policy}, "units": [unit]}


CASES = {policy: Case(("m",), policy, 1.7, 100) for policy in ("fcfs", "srtf-aged", "hrrn")}
CASES["two models, shares 60/40"] = Case(("a", "b"), "fcfs", 2.8, 140, (60, 40))


async def _real(case: Case) -> list[list[Record]]:
    async with mesh_target("fidelity_mesh", case.config, 0.0) as (_, target):
        model, *_ = await target.models()
        return [
            (await Driver(target, plan(parse_spec(text), model.vocabulary), SystemClock()).run()).records
            for text in (case.together, case.workload, case.together)
        ]


def real(case: Case) -> tuple[list[Record], Delays]:
    """The workload on a real mesh, and the time that its processes added to a step of a full batch around it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        before, measured, after = runner.run(_real(case))
    assert all(record.is_ok for record in (*before, *measured, *after))
    step_s = statistics.fmean((_step_s(before), _step_s(after)))
    return measured, replace(MEASURED, step_s=step_s - STEP_S - SLOTS * PER_TOKEN_S)


def _step_s(records: list[Record]) -> float:
    """Time of a step once the batch is full and warm: the median over the sequences."""
    warm = [one.pieces[len(one.pieces) // 5 :] for one in records]
    return statistics.median(
        (pieces[-1][0] - pieces[0][0]) / sum(count for _, count in pieces[1:]) for pieces in warm
    )  # fmt: skip


def simulated(case: Case, delays: Delays) -> list[Record]:
    """The workload in virtual time, after the workload that precedes it on the real mesh."""
    before, measured = sketch(parse_spec(case.together)), sketch(parse_spec(case.workload))
    both = before + [replace(one, index=one.index + len(before), at_s=one.at_s + _AFTER_S) for one in measured]
    parsed, specs = MeshConfig.model_validate(case.config), dict.fromkeys(case.models, SIM_SPEC)
    records = simulate(parsed, specs, both, TrueLengths(), delays=delays).run.records
    assert all(record.is_ok for record in records)
    assert all(record.ended_s is not None and record.ended_s < _AFTER_S for record in records[: len(before)])
    return records[len(before) :]


def main() -> int:
    """Runs both in alternation, since the machine's speed changes; the bars are on medians."""
    chosen = sys.argv[1:] or list(CASES)
    bench = Report("fidelity")
    found: dict[str, dict[str, list[float]]] = {name: {"e2el_s": [], "ttft_s": [], "tau": []} for name in chosen}
    steps_s: list[float] = []
    for _ in range(NUM_RUNS):
        for name in chosen:
            measured, delays = real(CASES[name])
            virtual = simulated(CASES[name], delays)
            steps_s.append(delays.step_s)
            for column in ("e2el_s", "ttft_s"):
                found[name][column].append(_mean(virtual, column) / _mean(measured, column) - 1)
            firsts = [np.array([one.pieces[0][0] for one in records]) for records in (virtual, measured)]
            found[name]["tau"].append(kendall_tau(*firsts))
    bench.figures.update(step_s=steps_s, found=found)
    bench.bar("processes add to a step, ms", statistics.median(steps_s) * 1000)
    for name, runs in found.items():
        error = statistics.median(runs["e2el_s"])
        bench.bar(f"{name}: mean E2EL, simulated / real - 1", error, "within 5 %", abs(error) <= 0.05)
        bench.bar(f"{name}: mean TTFT, simulated / real - 1", statistics.median(runs["ttft_s"]))
        bench.bar(f"{name}: order of first tokens, tau", statistics.median(runs["tau"]))
    return 0 if bench.write() else 1


def _mean(records: list[Record], name: str) -> float:
    return statistics.fmean(getattr(record, name) for record in records)


if __name__ == "__main__":
    sys.exit(main())
