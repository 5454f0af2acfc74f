"""Plans beside MuxServe's published ones, on its estimator, on the corrected one and in simulation; and large searches.

    python -m benchmarks.plans DATA [INPUT...]

DATA has MuxServe's profile; INPUTs are placement inputs with a published plan, by default the two in DATA.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.muxserve.constants import read_constants
from benchmarks.muxserve.estimators import Estimators, cluster_of
from benchmarks.muxserve.lengths import read_lengths
from benchmarks.muxserve.outcome import Outcome, outcome_of
from benchmarks.muxserve.replay import Replayer
from benchmarks.muxserve.scale import LENGTHS, PROFILE
from benchmarks.muxserve.scale_bars import SLO_SCALE
from benchmarks.muxserve.scale_cases import Workload, planned_units, traced
from benchmarks.plan_pool import Gains, PlanPool, UnitFigures, preference
from benchmarks.plan_search import searched_plans
from benchmarks.report import Report
from muxmesh.cli.plan_inputs import published_plan
from muxmesh.clock import SystemClock
from muxmesh.placement.muxserve_files import read_muxserve_profile, read_placement_input
from muxmesh.placement.plan import ModelLoad, PlacedUnit, Plan
from muxmesh.placement.profile import Profile
from muxmesh.placement.search import search
from muxmesh.placement.throughput_bound import throughput_bound
from muxmesh.placement.unit_choices import Objective

INPUTS = ("muxserve_chatlmsys_800.json", "muxserve_chatlmsys_2000.json")
MUST_GAIN = {"muxserve_chatlmsys_800": (0.10, 0.116), "muxserve_chatlmsys_2000": (0.13, 0.150)}
"""Required and best possible gain over the published plan on MuxServe's estimator."""
OTHER_GAIN = (0.0, 0.10)
NUM_SEEDS = 8
MOVES = 8000
JUDGED_PARTS = (0.25, 1.0)
"""Lengths of the replays that choose a plan, as parts of the one that compares it; these have other arrivals."""
MARGIN = 0.03
"""Units of plans whose gain on the reference is this much too small are replayed again, too."""
SECONDS = 600.0
"""Limit of a large search."""
KINDS = ("llama-7b",) * 12 + ("llama-13b",) * 5 + ("llama-30b",) * 2 + ("llama-65b",)


@dataclass(frozen=True, slots=True)
class Judged:
    """A plan and its estimates."""

    plan: Plan
    reference: float
    corrected: float
    attainment: float


def judged(plan: Plan, estimators: Estimators) -> Judged:
    """The estimates of a plan."""
    corrected = estimators.corrected
    return Judged(plan, estimators.reference.score(plan), corrected.score(plan), corrected.attainment(plan))


def unit_estimates(unit: PlacedUnit, estimators: Estimators) -> tuple[float, float]:
    """Sums of rate * throughput of the models of ``unit`` on both estimators."""
    models, found = estimators.reference.throughputs(unit), estimators.corrected.estimates(Plan((unit,)))
    return (
        sum(one.load.rate * throughput for one, throughput in zip(unit.models, models, strict=True)),
        sum(load.rate * one.throughput for load, one in found),
    )


def estimated_best(plans: Sequence[Judged], published: Judged, gains: Sequence[float]) -> Judged:
    """The best plan on the corrected estimator of those that reach the first of ``gains`` which any reaches."""
    for gain in gains:
        reaching = [one for one in plans if one.reference >= (1 + gain) * published.reference]
        if reaching:
            return max(reaching, key=lambda one: one.corrected)
    return max(plans, key=lambda one: one.reference)


class Simulation:
    """Plans in virtual time, as in `make bench-muxserve-scale`: the same requests for each."""

    def __init__(self, replayer: Replayer, workload: Workload) -> None:
        self._replayer = replayer
        self._workload = workload

    def run(self, plan: Plan) -> Outcome:
        return outcome_of([one for unit in planned_units(plan, self._workload) for one in self._replayer.replay(unit)])

    def figures(self, unit: PlacedUnit, estimators: Estimators) -> UnitFigures:
        """The estimates and the replay of one unit."""
        (case,) = planned_units(Plan((unit,)), self._workload)
        models = self._replayer.replay(case)
        num_requests = sum(max(1, round(load.rate * self._workload.duration_s)) for load in self._workload.loads)
        return UnitFigures(
            *unit_estimates(unit, estimators),
            sum(one.rate * one.throughput for one in models),
            sum(one.within_slo[SLO_SCALE] for one in models) / num_requests,
        )


def replayed_best(
    simulations: Sequence[Simulation], estimators: Estimators, published: Plan, plans: Sequence[Plan], must: float
) -> Plan:
    """The preferred plan of those that can be made of the units of ``plans``, each replayed alone.

    The first of ``simulations`` is short and chooses the units that the next one replays.
    """
    units = list(dict.fromkeys(unit for plan in (published, *plans) for unit in plan.units))
    loads = [model.load for unit in published.units for model in unit.models]
    found: list[tuple[Plan, Gains]] = []
    for simulation in simulations:
        figures = {unit: simulation.figures(unit, estimators) for unit in units}
        found = PlanPool(loads, estimators.cluster.num_devices, figures, published).plans()
        near = [plan for plan, gains in found if gains.reference >= must - MARGIN and gains.corrected >= 0]
        units = list(dict.fromkeys(unit for plan in (published, *near) for unit in plan.units))
    return max(found, key=lambda one: preference(one[1], must))[0]


def compare(path: Path, data: Path, profile: Profile, report: Report, moves: int, simulated_s: float) -> None:
    """Adds the bars of one placement input."""
    constants = read_constants()
    given = read_placement_input(path)
    name = path.name.partition(".json")[0]
    loads = [
        ModelLoad(one.name, one.kind, one.rate, given.mean_prompt_tokens, given.mean_output_tokens)
        for one in given.models
    ]
    cluster = replace(cluster_of(constants), num_nodes=given.num_nodes, devices_per_node=given.devices_per_node)
    estimators = Estimators(profile, constants, cluster, given.mean_prompt_tokens, given.mean_output_tokens)
    plan = published_plan(given, loads)
    if plan is None:
        raise SystemExit(f"{path}: has no published plan to compare with")
    published = judged(plan, estimators)
    if given.published_score is not None:
        error = abs(published.reference - given.published_score)
        report.bar(f"{name}: reference score", published.reference, f"{given.published_score:.3f}", error < 0.0005)
    started_s = SystemClock().monotonic_s()
    plans = searched_plans(partial(estimators.choices, loads), NUM_SEEDS, moves)
    must, aim = MUST_GAIN.get(name, OTHER_GAIN)
    report.bar(f"{name}: search, s", SystemClock().monotonic_s() - started_s)
    if simulated_s:
        replayer = Replayer(profile, read_lengths(data / LENGTHS), constants)
        other = replace(replayer, seed=replayer.seed + 1000)
        judges = [Simulation(other, traced(given, simulated_s * part)) for part in JUDGED_PARTS]
        ours = judged(replayed_best(judges, estimators, plan, plans, must), estimators)
        report.bar(f"{name}: search and choice by replay, s", SystemClock().monotonic_s() - started_s)
        add_simulated(report, name, Simulation(replayer, traced(given, simulated_s)), plan, ours.plan)
    else:
        ours = estimated_best([judged(one, estimators) for one in plans], published, (aim, must))
    gain = ours.reference / published.reference - 1
    report.bar(f"{name}: reference gain", gain, f">= {must:g}", gain >= must, f">= {aim:g}", gain >= aim)
    gain = ours.corrected / published.corrected - 1
    report.bar(f"{name}: corrected gain", gain, ">= 0", gain >= 0)
    bound = throughput_bound(loads, estimators.profile, cluster, estimators.corrected)
    report.bar(f"{name}: gap to the bound", 1 - ours.corrected / bound)
    print(f"\n{name}: {given.what}")
    for title, one in (("published", published), ("ours", ours)):
        print(f"{title:<10} reference {one.reference:.3f}  corrected {one.corrected:.3f}  SLO {one.attainment:.3f}")
    show(ours.plan)


def add_simulated(report: Report, name: str, simulation: Simulation, published: Plan, ours: Plan) -> None:
    """Adds the bars of two plans under the same requests."""
    before, after = simulation.run(published), simulation.run(ours)
    gain = after.throughput / before.throughput - 1
    report.bar(f"{name}: simulated gain", gain, ">= 0", gain >= 0, ">= 0.025", gain >= 0.025)
    gain = after.attainment[SLO_SCALE] - before.attainment[SLO_SCALE]
    report.bar(f"{name}: simulated SLO at scale 8, gain", gain, aim=">= 0", is_reached=gain >= 0)


def show(plan: Plan) -> None:
    """One line for each unit."""
    for unit in plan.units:
        models = (
            f"{one.load.name} ({one.load.kind}, {one.load.rate:.2f}/s, {one.prefill_share}/{one.decode_share} %, "
            f"{one.max_num_seqs})"
            for one in unit.models
        )
        print(f"  {unit.num_devices} x GPU: {', '.join(models)}")


def large(num_devices: int, num_models: int, profile: Profile, report: Report, moves: int) -> None:
    """Adds the bars of one large made-up workload: rates by a power law, lengths around those of ShareGPT."""
    random = Random(num_models)
    loads = [
        ModelLoad(
            f"llm-{rank}",
            random.choice(KINDS),
            num_devices * (rank + 1) ** -0.9,
            round(random.uniform(80, 320)),
            round(random.uniform(150, 500)),
        )
        for rank in range(num_models)
    ]
    constants = read_constants()
    cluster = replace(cluster_of(constants), num_nodes=num_devices // 8)
    estimators = Estimators(profile, constants, cluster)
    clock = SystemClock()
    started_s = clock.monotonic_s()
    found = search(
        estimators.choices(loads, Objective()),
        max_moves=moves,
        is_late=lambda: clock.monotonic_s() - started_s > SECONDS,
    )
    took_s = clock.monotonic_s() - started_s
    value = estimators.corrected.score(found.plans[0])
    bound = throughput_bound(loads, estimators.profile, cluster, estimators.corrected)
    name = f"{num_devices} GPUs x {num_models} models"
    report.bar(f"{name}: search, s", took_s, "<= 600", took_s <= SECONDS)
    report.bar(f"{name}: gap to the bound", 1 - value / bound)
    report.bar(f"{name}: gain over the greedy start", found.values[0] / found.greedy_value - 1)
    report.bar(f"{name}: peak memory, MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"\n{name}: {value:.2f} of at most {bound:.2f}, {found.num_units_tried} units, {found.num_moves} moves")


def main() -> int:
    """Compares, searches and reports; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.plans")
    parser.add_argument("data", type=Path, help="folder with MuxServe's profile")
    parser.add_argument("inputs", nargs="*", type=Path, help="placement inputs (default: the two in DATA)")
    parser.add_argument("--moves", type=int, default=MOVES, help="of each search for an input")
    parser.add_argument("--large-moves", type=int, default=60_000, help="of the large searches; 0: leave them out")
    parser.add_argument("--simulate", type=float, default=120.0, help="seconds of arrivals in virtual time; 0: none")
    options = parser.parse_args()
    profile = read_muxserve_profile(options.data / PROFILE)
    report = Report("plans")
    for path in options.inputs or [options.data / name for name in INPUTS]:
        compare(path, options.data, profile, report, options.moves, options.simulate)
    if options.large_moves:
        large(64, 40, profile, report, options.large_moves)
        large(1000, 200, profile, report, options.large_moves)
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
