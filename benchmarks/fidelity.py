"""The simulator against a real mesh of sim engines, on the same arrivals, lengths and policies.

`python -m benchmarks.fidelity [CASE...]` compares latencies and the order of first tokens, for each case: one model
under three policies; two models that compute at the same time, by their shares; one model under more load than it can
serve, whose sequences displace each other from a full batch; and one with a small pool, whose sequences are swapped or,
as the swap region is small too, computed again. The time that processes add to a step differs between machines and
changes within minutes, and near saturation 1 % of a step is 10 % of the latency. So it is measured on each mesh, with
another workload before and after the compared one. The first four cases are below saturation. Meshes of a few cases run
beside each other, since sim engines only sleep: about 6 minutes in all.
"""

from __future__ import annotations

import asyncio
import re
import socket
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from muxmesh.execution import PreemptionReason
from muxmesh.metrics.scrape import fetch
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.predictor.rank_correlation import kendall_tau
from simulator.forecasts import TrueLengths
from simulator.run import simulate
from simulator.timeline import MEASURED, Delays

SLOTS = 8
STEP_S, PER_TOKEN_S = 0.05, 0.0001
NUM_RUNS = 2
AT_ONCE = 3
"""Cases whose meshes run at the same time."""
_AFTER_S = 60.0
"""Virtual seconds from the start of one workload to the next; more than the first one takes."""
_STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "p90": lambda values: float(np.percentile(values, 90)),
    "p99": lambda values: float(np.percentile(values, 99)),
}
_LATENCIES = {"ttft_s": "TTFT", "e2el_s": "E2EL", "normalized_s": "normalized latency"}
_PREEMPTIONS = re.compile(rb'^muxmesh_preemptions_total\{.*reason="(\w+)".*\} ([0-9.]+)', re.MULTILINE)
_SWAPPED = re.compile(rb"^muxmesh_swap_copied_bytes_total\{.*\} ([0-9.e+]+)", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """One mesh with one unit. ``shares``: of prefill and decode, in percent. ``rate``: requests per second."""

    models: tuple[str, ...]
    policy: str
    rate: float
    num_requests: int
    shares: tuple[int, int] = (100, 100)
    lengths: str = "U(20,200)/(5,120)"
    memory: Mapping[str, str] = field(default_factory=lambda: {"kv_pool": "64MiB"})
    """Sizes of pool, slabs and swap region."""
    is_pressed: bool = False
    """Sequences are pre-empted; more is compared."""

    @property
    def workload(self) -> str:
        models = ",".join(self.models)
        return (
            f"rate={self.rate} burstiness=0.25 lengths={self.lengths} requests={self.num_requests} seed=5 "
            f"models={models}"
        )

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
        unit = {**self.memory, "arbiter": {"mode": "adbs", "over_subscription": 0}, "models": models}
        return {"order": {"policy": self.policy}, "units": [unit]}


CASES = {policy: Case(("m",), policy, 1.7, 100) for policy in ("fcfs", "srtf-aged", "hrrn")}
CASES["two models, shares 60/40"] = Case(("a", "b"), "fcfs", 2.8, 140, (60, 40))
CASES["displaced"] = Case(("m",), "srtf-aged", 2.4, 90, lengths="U(5,150)/(2,200)", is_pressed=True)
CASES["swapped"] = Case(
    ("m",), "srtf-aged", 1.2, 40, lengths="U(100,350)/(40,350)",
    memory={"kv_pool": "1MiB", "slab": "64KiB", "kv_swap": "320KiB"}, is_pressed=True,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The records of the workload, and what was done to sequences: pre-emptions by reason, MiB of swap copies."""

    records: list[Record]
    counts: dict[str, float]


async def _real(case: Case, number: int) -> tuple[Outcome, Delays]:
    """The workload on a real mesh, and the time that its processes added to a step of a full batch around it."""
    config = case.config | {"metrics": {"listen": f"127.0.0.1:{_free_port()}"}}
    async with mesh_target(f"fidelity_mesh_{number}", config, 0.0) as (_, target):
        model, *_ = await target.models()
        before, measured, after = [
            (await Driver(target, plan(parse_spec(text), model.vocabulary), SystemClock()).run()).records
            for text in (case.together, case.workload, case.together)
        ]
        _, text = await fetch(config["metrics"]["listen"], "/metrics", 10.0)
    assert all(record.is_ok for record in (*before, *measured, *after))
    step_s = statistics.fmean((_step_s(before), _step_s(after)))
    counts = {"order": 0.0, "kv": 0.0}
    for reason, count in _PREEMPTIONS.findall(text):
        counts["kv" if PreemptionReason(reason.decode()).is_memory else "order"] += float(count)
    counts["swapped MiB"] = sum(map(float, _SWAPPED.findall(text))) / 2**20
    return Outcome(measured, counts), replace(MEASURED, step_s=step_s - STEP_S - SLOTS * PER_TOKEN_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def real(cases: Sequence[Case]) -> list[tuple[Outcome, Delays]]:
    """The cases on meshes beside each other."""

    async def run() -> list[tuple[Outcome, Delays]]:
        return await asyncio.gather(*(_real(case, number) for number, case in enumerate(cases)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _step_s(records: list[Record]) -> float:
    """Time of a step once the batch is full and warm: the median over the sequences."""
    warm = [one.pieces[len(one.pieces) // 5 :] for one in records]
    return statistics.median(
        (pieces[-1][0] - pieces[0][0]) / sum(count for _, count in pieces[1:]) for pieces in warm
    )  # fmt: skip


def simulated(case: Case, delays: Delays) -> Outcome:
    """The workload in virtual time, after the workload that precedes it on the real mesh."""
    before, measured = sketch(parse_spec(case.together)), sketch(parse_spec(case.workload))
    both = before + [replace(one, index=one.index + len(before), at_s=one.at_s + _AFTER_S) for one in measured]
    parsed, specs = MeshConfig.model_validate(case.config), dict.fromkeys(case.models, SIM_SPEC)
    result = simulate(parsed, specs, both, TrueLengths(), delays=delays)
    records = result.run.records
    assert all(record.is_ok for record in records)
    assert all(record.ended_s is not None and record.ended_s < _AFTER_S for record in records[: len(before)])
    (use,) = result.units.values()
    counts = {
        "order": use.num_displaced, "kv": use.num_swapped + use.num_requeued, "swapped MiB": use.swapped_bytes / 2**20
    }  # fmt: skip
    return Outcome(records[len(before) :], counts)


def main() -> int:
    """Runs both in alternation, since the machine's speed changes; the bars are on medians."""
    chosen = sys.argv[1:] or list(CASES)
    bench = Report("fidelity")
    errors: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in chosen}
    counts: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in chosen}
    steps_s: list[float] = []
    for _ in range(NUM_RUNS):
        for first in range(0, len(chosen), AT_ONCE):
            names = chosen[first : first + AT_ONCE]
            for name, (measured, delays) in zip(names, real([CASES[one] for one in names]), strict=True):
                virtual = simulated(CASES[name], delays)
                steps_s.append(delays.step_s)
                for figure, error in compare(virtual.records, measured.records).items():
                    errors[name][figure].append(error)
                counts[name].append((virtual.counts, measured.counts))
    bench.figures.update(step_s=steps_s, errors=errors, counts=counts)
    bench.bar("processes add to a step, ms", statistics.median(steps_s) * 1000)
    for name in chosen:
        _report(bench, name, errors[name], counts[name])
    return 0 if bench.write() else 1


def compare(virtual: Sequence[Record], measured: Sequence[Record]) -> dict[str, float]:
    """Figure → simulated / real - 1; ``tau``: of the order of first tokens."""
    found = {}
    for column, latency in _LATENCIES.items():
        values = [[getattr(one, column) for one in records] for records in (virtual, measured)]
        for name, statistic in _STATISTICS.items():
            found[f"{name} {latency}"] = statistic(values[0]) / statistic(values[1]) - 1
    firsts = [np.array([one.pieces[0][0] for one in records]) for records in (virtual, measured)]
    found["tau"] = kendall_tau(*firsts)
    return found


def _report(
    bench: Report,
    name: str,
    errors: Mapping[str, Sequence[float]],
    counts: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> None:
    """Means of latencies have to be within 5 %. Tails and counts are reported."""
    error_of = {figure: statistics.median(values) for figure, values in errors.items()}
    is_pressed = CASES[name].is_pressed
    required = {"mean E2EL", "mean normalized latency"} if is_pressed else {"mean E2EL"}
    shown = [one for one in error_of if one != "tau"] if is_pressed else ["mean E2EL", "mean TTFT"]
    for figure in shown:
        label, error = f"{name}: {figure}, simulated / real - 1", error_of[figure]
        if figure in required:
            bench.bar(label, error, "within 5 %", abs(error) <= 0.05)
        else:
            bench.bar(label, error)
    bench.bar(f"{name}: order of first tokens, tau", error_of["tau"])
    if is_pressed:
        for kind in counts[0][0]:
            for side, index in (("simulated", 0), ("real", 1)):
                value = statistics.fmean(pair[index].get(kind, 0.0) for pair in counts)
                bench.bar(f"{name}: {kind if kind.endswith('MiB') else 'pre-empted, ' + kind}, {side}", value)


if __name__ == "__main__":
    sys.exit(main())
