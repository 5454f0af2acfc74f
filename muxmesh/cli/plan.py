"""`muxmesh plan`: searches for the units that serve a workload best, and writes them as mesh.yaml with the reasons.

It reads the inputs (`plan_inputs`), runs the search and prints tables. It changes no running mesh.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TextIO

from muxmesh.cli.common import print_json, refuse_unwritable
from muxmesh.cli.mesh_client import client_of
from muxmesh.cli.plan_inputs import (
    LEAST_RATE,
    Counts,
    ObservedLoad,
    PlanInputs,
    compared_plan,
    live_loads,
    plan_inputs,
)
from muxmesh.cli.plan_simulation import PlanSimulation, Simulated
from muxmesh.cli.tls_options import given_tls_option
from muxmesh.client import NO_RETRIES
from muxmesh.clock import SystemClock
from muxmesh.config.load import parse_mesh_config
from muxmesh.errors import ConfigError
from muxmesh.placement.corrected_estimator import CorrectedEstimator, by_name
from muxmesh.placement.explanation import Reason, reasons
from muxmesh.placement.mesh_writer import mesh_yaml
from muxmesh.placement.plan import Plan
from muxmesh.placement.reference_estimator import ReferenceEstimator
from muxmesh.placement.replan import Move, moves
from muxmesh.placement.search import Found, fits, search
from muxmesh.placement.throughput_bound import throughput_bound
from muxmesh.placement.unit_choices import Objective, UnitChoices


@dataclass(frozen=True, slots=True)
class _Estimates:
    """One plan on both estimators."""

    corrected: float
    attainment: float
    reference: float


class _Planner:
    """The estimators and the search over one set of inputs."""

    def __init__(self, inputs: PlanInputs, objective: Objective) -> None:
        self.inputs = inputs
        self.corrected = CorrectedEstimator(inputs.profile, inputs.cluster)
        prompt, output = (
            round(sum(getattr(load, field) for load in inputs.loads) / len(inputs.loads))
            for field in ("prompt_tokens", "output_tokens")
        )
        self.reference = ReferenceEstimator(inputs.profile, prompt, output)
        self.choices = UnitChoices(
            inputs.loads, inputs.profile, inputs.cluster, objective, self.reference, self.corrected
        )

    def estimates(self, plan: Plan) -> _Estimates:
        return _Estimates(self.corrected.score(plan), self.corrected.attainment(plan), self.reference.score(plan))

    @cached_property
    def bound(self) -> float:
        """See `throughput_bound`."""
        return throughput_bound(self.inputs.loads, self.inputs.profile, self.inputs.cluster, self.corrected)


def run(arguments: argparse.Namespace) -> int:
    """Plans and prints; returns the exit code. Raises ConfigError for inputs that are invalid or impossible."""
    refuse_unwritable(arguments.output)
    _refuse_options(arguments)
    live, counts = _observed(arguments)
    inputs = plan_inputs(arguments, live)
    planner = _Planner(inputs, _OBJECTIVES[arguments.objective])
    compared = _compared(arguments, planner)
    found, took_s = _searched(planner, arguments)
    best, simulated = _best(planner, found, compared, arguments)
    text = mesh_yaml(best, planner.corrected, inputs.target, _head(planner, best, found, took_s))
    parse_mesh_config(text, str(arguments.output or "plan"))
    result = _result(planner, best, found, took_s, compared)
    for name, one in simulated.items():
        result["estimates"][name]["simulated"] = asdict(one)
    why = reasons(best, planner.choices) if arguments.explain else []
    costs = None if live is None else _costs(planner, compared["running"], best, counts, arguments.threshold)
    if arguments.output is not None:
        arguments.output.write_text(text)
    if arguments.json:
        details = {"mesh_yaml": text, "reasons": [asdict(one) for one in why]}
        print_json(result | details | (asdict(costs) if costs else {}))
        return 0
    if arguments.output is None:
        print(text, end="")
    _show(result, why, costs, arguments)
    return 0


def _refuse_options(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that contradict each other or lack another one, so that none is ignored."""
    if arguments.live is not None and arguments.compare is None:
        raise ConfigError("--compare: is required with --live: the mesh.yaml of the running mesh")
    if arguments.live is None and (option := given_tls_option(arguments)) is not None:
        raise ConfigError(f"{option}: has no effect without --live, the address of a mesh")
    if arguments.live is not None and arguments.load is not None:
        raise ConfigError("--load: contradicts --live; rates and lengths are from one of them")
    if arguments.muxserve is not None:
        for option in ("live", "load", "cluster"):
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option}: contradicts --muxserve, whose file has the rates and the cluster")


def _observed(arguments: argparse.Namespace) -> tuple[dict[str, ObservedLoad] | None, dict[str, Counts]]:
    """Rates and lengths of the mesh of --live, and its counters; without --live None and no counters.

    Raises ConfigError if no request arrived.
    """
    if arguments.live is None:
        return None, {}
    live, counts = asyncio.run(_watched(arguments))
    if all(load.rate <= LEAST_RATE for load in live.values()):
        raise ConfigError(
            f"--live: no request arrived at {arguments.live} in {arguments.seconds:g} s; watch longer by --seconds"
        )
    return live, counts


def _searched(planner: _Planner, arguments: argparse.Namespace) -> tuple[Found, float]:
    """The outcome of the search, and its seconds."""
    clock, budget_s = SystemClock(), float(arguments.budget)
    started_s = clock.monotonic_s()

    def is_late() -> bool:
        return clock.monotonic_s() - started_s > budget_s

    return search(planner.choices, arguments.seed, arguments.moves, is_late), clock.monotonic_s() - started_s


_NUM_SIMULATED = 3
"""How many of the best plans --simulate simulates."""


def _best(
    planner: _Planner, found: Found, compared: Mapping[str, Plan], arguments: argparse.Namespace
) -> tuple[Plan, dict[str, Simulated]]:
    """The best plan; with --simulate in virtual time, and what it and those beside it served there."""
    if arguments.simulate is None:
        return found.plans[0], {}
    simulation = PlanSimulation(planner.inputs, planner.corrected, arguments.simulate, arguments.seed)
    tried = [(plan, simulation.run(plan)) for plan in found.plans[:_NUM_SIMULATED]]
    best, served = max(tried, key=lambda one: _simulated_value(one[1]))
    return best, {"plan": served, **{name: simulation.run(plan) for name, plan in compared.items()}}


def _simulated_value(simulated: Simulated) -> float:
    """Throughput decides, and between plans that serve all, the SLOs."""
    return simulated.throughput * (1 + 0.01 * simulated.attainment)


_OBJECTIVES: Mapping[str, Objective] = {
    "corrected": Objective(0.0, 1.0),
    "reference": Objective(1.0, 0.0),
    "both": Objective(1.0, 1.0),
}


def _head(planner: _Planner, plan: Plan, found: Found, took_s: float) -> list[str]:
    """The comment at the head of mesh.yaml."""
    inputs = planner.inputs
    estimates = planner.estimates(plan)
    device = "cores" if inputs.target.is_cpu else "devices"
    return [
        f"Written by `muxmesh plan`: {len(inputs.loads)} models on {plan.num_devices} of {inputs.cluster.num_devices} "
        f"{device} ({inputs.profile.machine.name}).",
        f"Estimate: {estimates.corrected:.4g} requests/s (mean, weighted by rate), SLO met by "
        f"{estimates.attainment:.1%} of the requests.",
        f"No plan can reach more than {planner.bound:.4g}/s: the gap is "
        f"{1 - estimates.corrected / planner.bound:.1%}. "
        f"The value of the greedy start is {1 - found.greedy_value / max(found.values[0], 1e-9):.1%} lower.",
        f"Searched for {took_s:.1f} s: {found.num_moves} moves, {found.num_units_tried} different units.",
    ]


def _compared(arguments: argparse.Namespace, planner: _Planner) -> dict[str, Plan]:
    """Plans beside ours, by what they are called in tables. Raises ConfigError for one that cannot be simulated."""
    inputs = planner.inputs
    found = {}
    if inputs.published is not None:
        found["published"] = inputs.published
    if arguments.compare is not None:
        found["running" if arguments.live is not None else arguments.compare.name] = compared_plan(
            arguments.compare, inputs
        )
    for name, plan in found.items() if arguments.simulate is not None else ():
        sizes = [unit.num_devices for unit in plan.units]
        if not fits(inputs.cluster, sizes) or not all(map(planner.corrected.estimate, plan.units)):
            raise ConfigError(
                f"{name}: its units need more devices or memory than the cluster has; compare it without --simulate"
            )
    return found


def _result(planner: _Planner, best: Plan, found: Found, took_s: float, compared: Mapping[str, Plan]) -> dict[str, Any]:
    plans = {"plan": best, **compared}
    models = {name: by_name(planner.corrected.estimates(plan)) for name, plan in plans.items()}
    return {
        "estimates": {name: asdict(planner.estimates(plan)) for name, plan in plans.items()},
        "models": {
            load.name: {name: asdict(of_plan[load.name]) for name, of_plan in models.items() if load.name in of_plan}
            for load in planner.inputs.loads
        },
        "bound": planner.bound,
        "greedy_value": found.greedy_value,
        "seconds": took_s,
        "num_moves": found.num_moves,
        "num_units_tried": found.num_units_tried,
    }


@dataclass(frozen=True, slots=True)
class _Costs:
    """What has to change in the running mesh, and what that gains. ``gain``: of throughput, relative."""

    moves: list[Move]
    gain: float
    gain_attainment: float
    is_worth_it: bool


def _costs(planner: _Planner, running: Plan, best: Plan, counts: Mapping[str, Counts], threshold: float) -> _Costs:
    """The moves from the running plan to the new one, what they cost, and whether they are worth it."""
    found = moves(running, best, planner.inputs.profile, {name: one.running for name, one in counts.items()})
    now, then = planner.estimates(running), planner.estimates(best)
    gain = then.corrected / now.corrected - 1 if now.corrected else float("inf")
    gain_attainment = then.attainment - now.attainment
    return _Costs(found, gain, gain_attainment, bool(found) and max(gain, gain_attainment) >= threshold)


def _show(
    result: Mapping[str, Any], why: Sequence[Reason], costs: _Costs | None, arguments: argparse.Namespace
) -> None:
    """Tables on standard error if the plan itself is on standard output, else on standard output."""
    out = sys.stdout if arguments.output is not None else sys.stderr
    print(f"{'PLAN':<24} {'REQUESTS/S':>10} {'SLO MET':>8} {'REFERENCE':>10}", file=out)
    for name, one in result["estimates"].items():
        print(f"{name:<24} {one['corrected']:>10.4g} {one['attainment']:>8.1%} {one['reference']:>10.4g}", file=out)
        if "simulated" in one:
            simulated = one["simulated"]
            print(f"{'  simulated':<24} {simulated['throughput']:>10.4g} {simulated['attainment']:>8.1%}", file=out)
    print(f"{'(upper bound)':<24} {result['bound']:>10.4g}", file=out)
    for reason in why:
        cost = "not possible" if reason.cost == float("inf") else f"costs {reason.cost:.3g} requests/s"
        print(f"\n{reason.model}: on {reason.place}\n  next best: {reason.runner_up} ({cost})", file=out)
    if costs is not None:
        _show_moves(costs, arguments.threshold, out)
    if arguments.output is not None:
        print(f"\n{arguments.output} written", file=out)


def _show_moves(costs: _Costs, threshold: float, out: TextIO) -> None:
    """Prints what has to change in the running mesh, which stays as it is."""
    for move in costs.moves:
        print(
            f"\n{move.model} {move.change}: {move.before}\n  to {move.after}\n  loads "
            f"{move.load_bytes / 2**20:.0f} MiB in about {move.load_s:.1f} s, "
            f"{move.drained_sequences:.0f} running sequences to drain",
            file=out,
        )
    verdict = "worth it" if costs.is_worth_it else f"not worth it: below the threshold of {threshold:.0%}"
    print(
        f"\n{len(costs.moves)} moves for {costs.gain:+.1%} throughput and {costs.gain_attainment:+.1%} of "
        f"requests within their SLO: {verdict}. Nothing was changed.",
        file=out,
    )


async def _watched(arguments: argparse.Namespace) -> tuple[dict[str, ObservedLoad], dict[str, Counts]]:
    """Rates and lengths of a running mesh over some seconds, and its last counters."""
    clock = SystemClock()
    async with client_of(arguments, arguments.live, NO_RETRIES) as client:
        before, started_s = _counts(await client.status()), clock.monotonic_s()
        await asyncio.sleep(arguments.seconds)
        after, ended_s = _counts(await client.status()), clock.monotonic_s()
    return live_loads(before, after, ended_s - started_s), after


def _counts(status: Any) -> dict[str, Counts]:
    return {
        one.model: Counts(
            one.num_requests_finished + one.num_requests_aborted,
            one.num_requests_running,
            one.num_requests_waiting,
            one.prompt_tokens,
            one.output_tokens,
        )
        for one in status.models
    }
