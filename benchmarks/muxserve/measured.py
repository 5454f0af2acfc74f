"""The simulator compared with the runs that MuxServe's authors measured on 32 A100 GPUs; fits the two constants."""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.muxserve.cases import ModelOutcome
from benchmarks.muxserve.constants import Constants, read_constants
from benchmarks.muxserve.lengths import read_lengths
from benchmarks.muxserve.measured_cases import MeasuredCase, measured_case
from benchmarks.muxserve.replay import Replayer, on_all_cores
from benchmarks.report import Report
from muxmesh.placement.muxserve_files import (
    MeasuredModel,
    read_measured_runs,
    read_muxserve_profile,
    read_placement_input,
)

SLO_SCALE = 8
AIM = 0.1
"""Median error of throughput per model and of SLO attainment."""
CONTENTIONS = (0.2, 0.3, 0.4, 0.5, 0.6)
OVERHEADS = (0.2, 0.25, 0.3, 0.35, 0.4)
MAX_FIT_REQUESTS = 2500


@dataclass(frozen=True, slots=True)
class ModelError:
    """One model of one case: what was measured and what the simulator says."""

    case: str
    system: str
    model: str
    kind: str
    throughput: float
    measured_throughput: float
    attainment: float | None
    """At `SLO_SCALE`. None: not measured."""
    measured_attainment: float | None
    latency_s: float
    measured_latency_s: float | None
    ttft_s: float
    measured_ttft_s: float

    @property
    def throughput_error(self) -> float:
        """Relative, without a sign."""
        return abs(self.throughput / self.measured_throughput - 1)

    @property
    def attainment_error(self) -> float | None:
        """Difference of the two parts of all requests, without a sign."""
        if self.attainment is None or self.measured_attainment is None:
            return None
        return abs(self.attainment - self.measured_attainment)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `measured`."""
    parser.add_argument("files", nargs="+", type=Path, help="files of measured runs")
    parser.add_argument("--profile", type=Path, required=True, help="muxserve_profile_llama.json.gz")
    parser.add_argument("--lengths", type=Path, required=True, help="sharegpt_lengths.csv.gz")
    parser.add_argument(
        "--plan", type=Path, help="the plan of a run whose file has no rates; else X.json beside X_measured.json"
    )
    parser.add_argument("--params", type=Path, help="a file like fitted.yaml; default: that file")
    parser.add_argument(
        "--fit", action="store_true", help="also fit contention and overhead, with errors of left-out cases"
    )
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and lengths")
    parser.add_argument("--processes", type=int, default=2, help="cores to use")


def run(options: argparse.Namespace) -> int:
    """Compares, and fits if asked to; writes build/bench/muxserve-measured.json."""
    constants = read_constants(options.params) if options.params else read_constants()
    cases = [case for path in options.files for case in _cases_of(path, options.plan, constants)]
    replayer = Replayer(read_muxserve_profile(options.profile), read_lengths(options.lengths), constants, options.seed)
    report = Report("muxserve-measured")
    report.figures["constants"] = asdict(constants)
    if options.fit:
        constants = fit(cases, replayer, options.processes, report)
        replayer = replace(replayer, constants=constants)
    errors = compare(cases, replayer, options.processes)
    report.figures["models"] = [asdict(one) for one in errors]
    print(_table(errors))
    _add_bars(report, errors)
    return 0 if report.write() else 1


def _cases_of(path: Path, plan: Path | None, constants: Constants) -> list[MeasuredCase]:
    beside = path.with_name(path.name.replace("_measured", "", 1))
    plan = plan or (beside if beside != path and beside.exists() else None)
    placement = read_placement_input(plan) if plan else None
    stem = path.name.partition(".json")[0].removeprefix("muxserve_").replace("_measured", "")
    return [
        measured_case(one, stem if one.alpha is None else f"alpha {one.alpha:g} x {one.scale:g}", placement, constants)
        for one in read_measured_runs(path)
    ]


def compare(cases: Sequence[MeasuredCase], replayer: Replayer, processes: int) -> list[ModelError]:
    """Replays all units of all cases, on several cores."""
    with get_context("fork").Pool(processes) as pool:
        outcomes = iter(on_all_cores(pool, replayer, [unit for case in cases for unit in case.units]))
    return [_error(case, outcome) for case in cases for _ in case.units for outcome in next(outcomes)]


def _error(case: MeasuredCase, outcome: ModelOutcome) -> ModelError:
    measured = case.measured[outcome.name]
    within = measured_attainment(measured)
    return ModelError(
        case=case.name,
        system=case.system,
        model=outcome.name,
        kind=measured.kind,
        throughput=outcome.throughput,
        measured_throughput=measured.throughput,
        attainment=None if within is None else outcome.attainment(SLO_SCALE),
        measured_attainment=within,
        latency_s=outcome.latency_s,
        measured_latency_s=measured.mean_latency_s,
        ttft_s=outcome.ttft_s,
        measured_ttft_s=measured.mean_ttft_s,
    )


def measured_attainment(measured: MeasuredModel) -> float | None:
    """The part of the requests within `SLO_SCALE`. None: the file does not say."""
    if not measured.within_slo or not measured.num_requests:
        return None
    return measured.within_slo[SLO_SCALE] / measured.num_requests


def loss(errors: Sequence[ModelError]) -> float:
    """What the fit makes small: the mean error of throughput, plus that of the mean latency, each at most 1."""
    latencies = [min(1.0, abs(one.latency_s / one.measured_latency_s - 1)) for one in errors if one.measured_latency_s]
    return fmean(min(1.0, one.throughput_error) for one in errors) + (fmean(latencies) if latencies else 0.0)


def fit(cases: Sequence[MeasuredCase], replayer: Replayer, processes: int, report: Report) -> Constants:
    """The overhead from `spatial`, where a step has no neighbours; then the contention from `muxserve`.

    Both by search over a grid, and over units of at most `MAX_FIT_REQUESTS`, which leaves out the hottest models.
    `temporal` is not used. Prints for each workload the error there of constants that were fitted without it.
    """
    constants, figures = replayer.constants, {}
    for name, grid in (("overhead", OVERHEADS), ("contention", CONTENTIONS)):
        system = "spatial" if name == "overhead" else "muxserve"
        fitted_on = [_without_large_units(case) for case in cases if case.system == system]
        losses: dict[float, dict[str, float]] = {}
        tried = {value: replace(constants, **dict[str, Any]({name: value})) for value in grid}
        for value, candidate in tried.items():
            by_workload = defaultdict(list)
            for one in compare(fitted_on, replace(replayer, constants=candidate), processes):
                by_workload[one.case.removesuffix(f" {one.system}")].append(one)
            losses[value] = {workload: loss(errors) for workload, errors in by_workload.items()}
            print(f"{name} {value:g}: {fmean(losses[value].values()):.4f}", flush=True)
        best, left_out = _best(losses, set()), _left_out(losses)
        figures[name] = {"losses": losses, "best": best, "left_out": left_out}
        constants = tried[best]
        for workload, (value, without, with_it) in left_out.items():
            print(
                f"{name} fitted without {workload}: {value:g}, loss there {without:.4f} (fitted with it {with_it:.4f})"
            )
        print(f"{name}: {best:g}")
    report.figures["fit"] = figures
    return constants


def _without_large_units(case: MeasuredCase) -> MeasuredCase:
    return replace(case, units=tuple(one for one in case.units if one.num_requests <= MAX_FIT_REQUESTS))


def _best(losses: Mapping[float, Mapping[str, float]], without: set[str]) -> float:
    return min(losses, key=lambda value: fmean(x for name, x in losses[value].items() if name not in without))


def _left_out(losses: Mapping[float, Mapping[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Workload → the constant fitted on the others, the loss on the workload with it, and with the best of all."""
    workloads = list(next(iter(losses.values())))
    if len(workloads) < 2:
        return {}
    best = _best(losses, set())
    return {one: (value := _best(losses, {one}), losses[value][one], losses[best][one]) for one in workloads}


def _table(errors: Sequence[ModelError]) -> str:
    rows = [
        f"{'case':34} {'model':7} {'kind':9} {'tpt':>7} {'meas.':>7} {'err %':>6} {'SLO8':>6} {'meas.':>6} "
        f"{'lat s':>8} {'meas.':>8} {'ttft s':>8} {'meas.':>8}"
    ]
    for one in errors:
        slo, measured = (
            f"{100 * x:6.1f}" if x is not None else "     -" for x in (one.attainment, one.measured_attainment)
        )
        latency = f"{one.measured_latency_s:8.2f}" if one.measured_latency_s else "       -"
        rows.append(
            f"{one.case:34} {one.model:7} {one.kind:9} {one.throughput:7.2f} {one.measured_throughput:7.2f} "
            f"{100 * one.throughput_error:6.1f} {slo} {measured} {one.latency_s:8.2f} {latency} {one.ttft_s:8.2f} "
            f"{one.measured_ttft_s:8.2f}"
        )
    return "\n".join(rows)


def _add_bars(report: Report, errors: Sequence[ModelError]) -> None:
    for system in ("muxserve", "spatial", "temporal", "all"):
        chosen = [one for one in errors if system in (one.system, "all")]
        if not chosen:
            continue
        throughput = median(one.throughput_error for one in chosen)
        report.bar(f"{system}: median error of throughput", throughput, aim="0.1", is_reached=throughput <= AIM)
        report.bar(f"{system}: mean error of throughput", fmean(one.throughput_error for one in chosen))
        attainments = [one.attainment_error for one in chosen if one.attainment_error is not None]
        if attainments:
            middle = median(attainments)
            report.bar(f"{system}: median error of attainment at 8", middle, aim="0.1", is_reached=middle <= AIM)
            report.bar(f"{system}: mean error of attainment at 8", fmean(attainments))
    for (case, _), group in itertools.groupby(errors, key=lambda one: (one.case, one.system)):
        total = list(group)
        measured = sum(one.measured_throughput for one in total)
        report.figures.setdefault("totals", {})[case] = {
            "simulated": sum(one.throughput for one in total), "measured": measured,
        }  # fmt: skip
