"""`muxmesh simulate`: runs a workload on a simulated mesh in virtual time and prints a load test's report.

It reads the configuration and the workload and chooses the source of length forecasts; `simulator` does the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from loadtest import table
from loadtest.html import page
from loadtest.report import About, build_report
from loadtest.slo import Objectives
from loadtest.spec import Spec, parse_spec
from loadtest.workload import Sketch
from muxmesh.cli.common import cache_dir, date_now, print_json, refuse_unwritable, source_dir
from muxmesh.clock import SystemClock
from muxmesh.config.contradictions import order_without_effect
from muxmesh.config.load import load_mesh_config
from muxmesh.config.schema import MeshConfig
from muxmesh.config.section import Location
from muxmesh.errors import ConfigError
from muxmesh.models.prepared_model import local_model_spec, model_problems
from muxmesh.placement.profile import Profile
from muxmesh.placement.profile_file import read_profile
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from muxmesh.types import ArbiterMode
from simulator.forecasts import Forecasts, LearnedLengths, NoisyLengths, TrueLengths
from simulator.measured_times import measured_times, profile_problems
from simulator.objectives import objectives_of
from simulator.run import SimulationResult, requests_of, simulate, true_length
from simulator.simulated_unit import Decision
from simulator.step_times import linear_slowdown
from simulator.timeline import MEASURED

_DEFAULT_TAU = 0.5
_MAX_VIRTUAL_S = 1e7
_ROUNDING = 1.001
"""A sum of shares up to this is no more than the device."""


def run(arguments: argparse.Namespace) -> int:
    """Simulates and reports; returns the exit code. Raises ConfigError before the simulation or if it is too long."""
    refuse_unwritable(arguments.output, arguments.html, arguments.trace)
    base_dir = source_dir(arguments.config)
    profile = None if arguments.profile is None else read_profile(arguments.profile)

    def check(config: MeshConfig) -> Iterator[tuple[Location, str]]:
        if arguments.policy is None:  # --policy replaces the file's order
            yield from order_without_effect(config)
        yield from _without_times(config, profile)
        yield from model_problems(config, base_dir, cache_dir())

    config = load_mesh_config(arguments.config, check, variables=os.environ).config
    config = _with_mode(config, arguments.arbiter)
    specs = {name: local_model_spec(model, base_dir, cache_dir()) for name, model in config.models().items()}
    spec = parse_spec(arguments.workload)
    sketches = requests_of(spec)
    _refuse_too_long(sketches[-1].at_s)
    forecasts = _forecasts(spec, sketches, arguments.tau)
    clock = SystemClock()
    started_at_s = clock.monotonic_s()
    times = measured_times(config, profile) if profile else {}
    contention = _contention(arguments.contention, profile)
    slowdown = linear_slowdown(contention)
    with ExitStack() as stack:
        on_decision = _trace_writer(arguments.trace, stack)
        simulated = simulate(
            config, specs, sketches, forecasts, arguments.policy, on_decision, MEASURED, slowdown, times
        )
    _refuse_too_long(simulated.run.duration_s)
    took_s = clock.monotonic_s() - started_at_s
    policy = arguments.policy or config.order.policy
    objectives = objectives_of(config, simulated.run, times)
    return _finish(arguments, spec, simulated, policy, took_s, sorted(specs), objectives, contention)


def _trace_writer(path: Path | None, stack: ExitStack) -> Callable[[Decision], None] | None:
    """Writes each decision as a line of JSON, until ``stack`` is closed; None without a path."""
    if path is None:
        return None
    out = stack.enter_context(path.open("w"))

    def write(decision: Decision) -> None:
        out.write(json.dumps(asdict(decision)) + "\n")

    return write


def _contention(given: float | None, profile: Profile | None) -> float:
    if given is not None:
        return given
    return profile.contention if profile else 0.0


def _with_mode(config: MeshConfig, mode: ArbiterMode | None) -> MeshConfig:
    """The same with the arbiter of every unit in ``mode``; None: as configured."""
    if mode is None:
        return config
    units = (
        unit.model_copy(update={"arbiter": unit.arbiter.model_copy(update={"mode": mode})}) for unit in config.units
    )
    return config.model_copy(update={"units": tuple(units)})


def _refuse_too_long(virtual_s: float) -> None:
    if virtual_s > _MAX_VIRTUAL_S:
        raise ConfigError(
            f"workload: takes {virtual_s:.3g} virtual seconds; a report covers at most {_MAX_VIRTUAL_S:.0g}"
        )


def _without_times(config: MeshConfig, profile: Profile | None) -> Iterator[tuple[Location, str]]:
    if profile is not None:
        yield from profile_problems(config, profile)
    for unit_index, unit in enumerate(config.units):
        for model_index, model in enumerate(unit.models):
            location: Location = ("units", unit_index, "models", model_index)
            if model.engine != "sim":
                if profile is None:
                    yield (
                        (*location, "engine"),
                        "has no step times to simulate with; measure them with `muxmesh profile` and give the file by "
                        "--profile, or set `engine: sim` and the times in `sim`",
                    )
            elif model.sim.base_s == model.sim.per_token_s == model.sim.per_context_s == 0:
                yield (
                    (*location, "sim"),
                    "every step takes no time; set base_s, per_token_s or per_context_s, in seconds",
                )


def _forecasts(spec: Spec, sketches: Sequence[Sketch], tau: float | None) -> Forecasts:
    if sketches[0].is_forced:
        if tau is not None:
            raise ConfigError(
                "--tau: has no effect on forced outputs, whose lengths are known; set output=natural in the workload"
            )
        return TrueLengths()
    if spec.prompts is not None and tau is None:
        return LearnedLengths(CheckedPredictor(LengthPredictor()))
    return NoisyLengths(_DEFAULT_TAU if tau is None else tau, [true_length(one) for one in sketches], spec.seed)


def _finish(
    arguments: argparse.Namespace,
    spec: Spec,
    simulated: SimulationResult,
    policy: str,
    took_s: float,
    models: Sequence[str],
    objectives: Objectives,
    contention: float,
) -> int:
    about = About(arguments.name or policy, f"simulated {arguments.config.name}, {policy}", models, spec.text,
                  date_now(), rate=spec.rate)  # fmt: skip
    report = build_report(about, simulated.run, objectives=objectives)
    report["simulation"] = {
        "policy": policy,
        "wall_s": took_s,
        "num_events": simulated.num_events,
        "num_requeued": simulated.num_requeued,
        "busy_s": simulated.busy_s,
        "units": {name: asdict(unit) for name, unit in simulated.units.items()},
    }
    report["warnings"] = [] if contention else list(_over_use(simulated))
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")
    if arguments.html:
        arguments.html.write_text(page([report]))
    if arguments.json:
        print_json(report)
    else:
        print(table.render(report))
        print("\n".join(_unit_lines(simulated)))
        virtual_s = simulated.run.duration_s
        line = f"Simulated {virtual_s:.0f} s in {took_s:.1f} s, order {policy}; the time of each token is not simulated"
        print(f"\n{line}", file=sys.stderr)
    return 0 if report["completed"] else 1


def _over_use(simulated: SimulationResult) -> Iterator[str]:
    """Units whose workers computed at full speed with more than the whole device in sum; without contention only."""
    for name, unit in simulated.units.items():
        if unit.peak_share > _ROUNDING:
            yield (
                f"unit {name}: workers with up to {unit.peak_share:.0%} of the device in all computed at once, without "
                "slowing each other down; a device is not that fast: use --contention, or smaller shares"
            )


def _unit_lines(simulated: SimulationResult) -> Iterator[str]:
    """A table of the workers of each unit, under what the unit did."""
    duration_s = simulated.run.duration_s or 1.0
    for name, unit in simulated.units.items():
        busy, used = unit.busy_s / duration_s, unit.share_s / duration_s
        yield (
            f"\nUnit {name}: busy {busy:.0%} of the time, {used:.0%} of the device in use; "
            f"pre-empted for others {unit.num_displaced}, for memory {unit.num_requeued + unit.num_swapped}, of which "
            f"swapped out {unit.num_swapped}"
        )
        yield f"{'model':<24} {'role':<8} {'share':>5} {'granted (s)':>12} {'grants':>9}"
        for one in unit.workers:
            yield f"{one.model:<24} {one.role:<8} {one.share:>5.0%} {one.granted_s:>12.2f} {one.num_grants:>9}"
        for model, switches in unit.switches.items():
            yield f"{model:<24} woke {switches.num_wakes} times, in {switches.waking_s:.2f} s"
