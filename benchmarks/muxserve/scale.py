"""MuxMesh compared with MuxServe's baselines at the size of the paper, in virtual time: 19 models on 32 devices."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.muxserve import scale_bars, scale_cases
from benchmarks.muxserve.cases import ModelCase, UnitCase
from benchmarks.muxserve.constants import Constants, read_constants
from benchmarks.muxserve.estimators import Estimators, cluster_of
from benchmarks.muxserve.lengths import read_lengths
from benchmarks.muxserve.measured_cases import mean_lengths
from benchmarks.muxserve.outcome import Outcome, outcome_of
from benchmarks.muxserve.replay import SLO_SCALES, Replayer, kv_pool_bytes
from benchmarks.muxserve.scale_cases import OUR_SLO_SCALE, Workload
from benchmarks.muxserve.scale_plans import FOR_ALL, chosen_plans
from benchmarks.report import Report
from muxmesh.placement.muxserve_files import (
    PlacementInput,
    read_measured_runs,
    read_muxserve_profile,
    read_placement_input,
)
from muxmesh.placement.profile import Profile

PROFILE, LENGTHS = "muxserve_profile_llama.json.gz", "sharegpt_lengths.csv.gz"
"""Files in the folder of MuxServe's data."""
CONDENSED = (2000, 800)
ABLATED = (1.3, 1.0)
"""alpha and scale of the workload of the ablations."""

Systems = Mapping[str, Sequence[UnitCase]]
Job = Callable[[], Systems]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of the study runs. Arrivals last ``duration_s``, those of ChatLMSYS ``traced_s``."""

    duration_s: float
    traced_s: float
    num_seeds: int
    max_moves: int
    alphas: Sequence[float] = scale_cases.ALPHAS
    scales: Sequence[float] = scale_cases.SCALES


FULL = Size(40.0, 120.0, 1, 1500)
QUICK = Size(10.0, 10.0, 1, 300, (2.1,), (1.0,))


@dataclass(frozen=True)
class Study:
    """Makes plans for workloads, and has all systems serve them."""

    profile: Profile
    replayer: Replayer
    size: Size

    @property
    def constants(self) -> Constants:
        return self.replayer.constants

    @cached_property
    def estimators(self) -> Estimators:
        """Shared by the searches of a workload, as they keep what they compute of single models."""
        return Estimators(self.profile, self.constants, cluster_of(self.constants))

    @property
    def judge(self) -> Replayer:
        """For the replays that choose plans: it has other arrivals."""
        return replace(self.replayer, seed=self.replayer.seed + 1000)

    def outcomes(self, systems: Systems) -> dict[str, Outcome]:
        """The outcome of each system. Units that several have in common are replayed once."""
        units = dict.fromkeys(unit for of_system in systems.values() for unit in of_system)
        found = {unit: self.replayer.replay(unit) for unit in units}
        return {
            name: outcome_of([one for unit in of_system for one in found[unit]]) for name, of_system in systems.items()
        }

    def plans(self, workload: Workload, more: Sequence[UnitCase] = ()) -> dict[int, list[UnitCase]]:
        """SLO scale → our plan for it. ``more``: units beside those that searches find."""
        pool = scale_cases.pool_of_units(
            workload, self.estimators, self.constants, self.size.num_seeds, self.size.max_moves
        )
        return self.chosen(workload, [*pool, *more])

    def chosen(self, workload: Workload, pool: Sequence[UnitCase]) -> dict[int, list[UnitCase]]:
        """SLO scale → the best plan of units of ``pool`` and their variants."""
        return chosen_plans(workload, pool, self.estimators.cluster.num_devices, self.judge)

    def systems(self, workload: Workload, placement: PlacementInput | None = None) -> dict[str, list[UnitCase]]:
        """Ours and the baselines. ``placement`` has a published plan, whose units are in our pool, too."""
        published = scale_cases.published_units(placement, workload) if placement else []
        plans = self.plans(workload, [replace(unit, slo_scale=OUR_SLO_SCALE) for unit in published])
        found = {scale_bars.ours(scale): units for scale, units in plans.items()}
        found["spatial"] = scale_cases.spatial_units(workload, self.constants)
        found["temporal"] = scale_cases.temporal_units(plans[FOR_ALL], self.constants)
        if published:
            found["MuxServe's plan"] = published
            found["temporal, MuxServe's plan"] = scale_cases.temporal_units(published, self.constants)
        return found

    def orders(self) -> dict[str, list[UnitCase]]:
        """65B and 30B in one unit of 4 devices at 1 and 8 requests per second, more than the KV memory holds.

        `fcfs` is MuxServe's: one queue in order of arrival, the whole device for one step at a time. The others share
        the device; `roundrobin` has neither prefills first nor quotas that know the rates.
        """
        duration_s = self.size.duration_s
        models = tuple(
            ModelCase(
                name, kind, rate, round(rate * duration_s), 100, share, duration_s=duration_s,
                mean_prompt=scale_cases.MEAN_PROMPT, mean_output=scale_cases.MEAN_OUTPUT, slo_degree=degree,
            )
            for name, kind, rate, share, degree in (("l65", "llama-65b", 1.0, 30, 8), ("l30", "llama-30b", 8.0, 90, 4))
        )  # fmt: skip
        unit = UnitCase("orders", 4, models, max_overtakes=8, stall_budget=0.1)
        return {
            "adbs": [unit],
            "fcfs": scale_cases.temporal_units([unit], self.constants),
            "roundrobin": [replace(unit, mode="roundrobin")],
            "fcfs, shared device": [replace(unit, mode="fcfs")],
        }

    def ablations(self) -> dict[str, list[UnitCase]]:
        """Our plan for all SLO scales, and what it is without one part."""
        workload = scale_cases.synthetic(*ABLATED, self.size.duration_s)
        ours = self.plans(workload)[FOR_ALL]
        alone = scale_cases.alone_units(workload, self.estimators, self.constants)
        searched = scale_cases.searched_plan(workload, self.estimators, self.size.max_moves)
        greedy = scale_cases.greedy_plan(workload, self.estimators)
        greedy_units = scale_cases.planned_units(greedy, workload, OUR_SLO_SCALE)
        return {
            scale_bars.ours(FOR_ALL): ours,
            "spatial": scale_cases.spatial_units(workload, self.constants),
            "without SLOs": [replace(one, slo_scale=None) for one in ours],
            "phases together": [scale_cases.phases_together(one) for one in ours],
            "static KV pool": [scale_cases.static_pool(one, kv_pool_bytes(one, self.constants)) for one in ours],
            "fcfs": [replace(one, mode="fcfs") for one in ours],
            "roundrobin": [replace(one, mode="roundrobin") for one in ours],
            "no model shares": self.chosen(workload, alone)[FOR_ALL],
            "searched plan, no replays": scale_cases.planned_units(searched, workload, OUR_SLO_SCALE),
            "greedy placement": greedy_units,
            "greedy placement, replays": self.chosen(workload, greedy_units)[FOR_ALL],
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scale`."""
    parser.add_argument("data", type=Path, help="the folder of MuxServe's files")
    parser.add_argument("--quick", action="store_true", help="a part of the workloads, for a short time")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and lengths")
    parser.add_argument("--processes", type=int, default=2, help="cores to use")
    parser.add_argument("--only", default="", help="workloads whose names contain this, such as ChatLMSYS")


def run(options: argparse.Namespace) -> int:
    """Runs the study; writes build/bench/muxserve-scale.json."""
    profile = read_muxserve_profile(options.data / PROFILE)
    replayer = Replayer(profile, read_lengths(options.data / LENGTHS), read_constants(), options.seed)
    study = Study(profile, replayer, QUICK if options.quick else FULL)
    for model in (*profile.models.values(), *study.estimators.profile.models.values()):
        model.smoothed  # noqa: B018 - computed here once, and not for every workload
    report = Report("muxserve-scale")
    report.figures["constants"] = asdict(replayer.constants)
    all_jobs = list(_jobs(study, options.data))
    jobs = [(name, job) for name, job in all_jobs if options.only in name]
    if not jobs:
        raise SystemExit(f"--only {options.only}: is in the name of none of {', '.join(name for name, _ in all_jobs)}")
    found: dict[str, dict[str, Outcome]] = {}
    with get_context("fork").Pool(options.processes) as pool:
        for name, systems, outcomes in pool.imap_unordered(partial(_served, study), jobs):
            found[name] = outcomes
            print(f"\n{name} ({len(found)} of {len(jobs)})")
            _print(outcomes)
            report.figures[name] = {
                system: asdict(one) | {"units": [_described(unit) for unit in systems[system]]}
                for system, one in outcomes.items()
            }
    scale_bars.add_bars(report, {name: found[name] for name, _ in jobs})
    return 0 if report.write() else 1


def _jobs(study: Study, data: Path) -> Iterator[tuple[str, Job]]:
    """(name, what makes the systems), those that take longest first."""
    measured = read_measured_runs(data / "muxserve_chatlmsys_800_measured.json")[0]
    lengths = {one.name: mean_lengths(one) for one in measured.models}
    for condensed in CONDENSED:
        placement = read_placement_input(data / f"muxserve_chatlmsys_{condensed}.json")
        workload = scale_cases.traced(placement, study.size.traced_s, lengths)
        yield scale_bars.chatlmsys(condensed), partial(study.systems, workload, placement)
    yield scale_bars.ABLATIONS, study.ablations
    for scale in sorted(study.size.scales, reverse=True):
        for alpha in study.size.alphas:
            workload = scale_cases.synthetic(alpha, scale, study.size.duration_s)
            yield workload.name, partial(study.systems, workload)
    yield scale_bars.ORDERS, study.orders


def _served(study: Study, named: tuple[str, Job]) -> tuple[str, Systems, dict[str, Outcome]]:
    name, job = named
    systems = job()
    return name, systems, study.outcomes(systems)


def _print(outcomes: Mapping[str, Outcome]) -> None:
    for system, one in outcomes.items():
        parts = " ".join(f"{scale}:{100 * one.attainment[scale]:5.1f}" for scale in SLO_SCALES[1:12])
        print(f"  {system:26} {one.throughput:7.2f} req/s   SLO % {parts}", flush=True)


def _described(unit: UnitCase) -> dict[str, Any]:
    models = [f"{one.name} ({one.kind}) {one.prefill_share}/{one.decode_share} %" for one in unit.models]
    return {"devices": unit.num_devices, "slo_scale": unit.slo_scale, "models": models}
