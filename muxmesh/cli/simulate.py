"""`muxmesh simulate`: runs a workload on a simulated mesh in virtual time and prints a load test's report.

It reads the configuration and the workload and chooses the source of length forecasts; `simulator` does the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime

from loadtest import table
from loadtest.html import page
from loadtest.report import About, build_report
from loadtest.spec import Spec, parse_spec
from loadtest.workload import Sketch
from muxmesh.cli.common import cache_dir, print_json, refuse_unwritable, source_dir
from muxmesh.clock import SystemClock
from muxmesh.config.contradictions import order_without_effect
from muxmesh.config.load import load_mesh_config
from muxmesh.config.schema import Location, MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.models.prepared_model import local_model_spec, model_problems
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from simulator.forecasts import Forecasts, LearnedLengths, NoisyLengths, TrueLengths
from simulator.run import SimulationResult, requests_of, simulate, true_length
from simulator.simulated_unit import Decision
from simulator.timeline import MEASURED

_DEFAULT_TAU = 0.5
_MAX_VIRTUAL_S = 1e7


def run(arguments: argparse.Namespace) -> int:
    """Simulates and reports; returns the exit code. Raises ConfigError before the simulation or if it is too long."""
    refuse_unwritable(arguments.output, arguments.html, arguments.trace)
    base_dir = source_dir(arguments.config)

    def check(config: MeshConfig) -> Iterator[tuple[Location, str]]:
        if arguments.policy is None:  # --policy replaces the file's order
            yield from order_without_effect(config)
        yield from _without_times(config)
        yield from model_problems(config, base_dir, cache_dir())

    config = load_mesh_config(arguments.config, check, variables=os.environ).config
    specs = {name: local_model_spec(model, base_dir, cache_dir()) for name, model in config.models().items()}
    spec = parse_spec(arguments.workload)
    sketches = requests_of(spec)
    _refuse_too_long(sketches[-1].at_s)
    forecasts = _forecasts(spec, sketches, arguments.tau)
    clock = SystemClock()
    started_at_s = clock.monotonic_s()
    with ExitStack() as stack:
        on_decision = None
        if arguments.trace:
            out = stack.enter_context(arguments.trace.open("w"))

            def on_decision(decision: Decision) -> None:
                out.write(json.dumps(asdict(decision)) + "\n")

        simulated = simulate(config, specs, sketches, forecasts, arguments.policy, on_decision, MEASURED)
    _refuse_too_long(simulated.run.duration_s)
    took_s = clock.monotonic_s() - started_at_s
    policy = arguments.policy or config.order.policy
    return _finish(arguments, spec, simulated, policy, took_s, sorted(specs))


def _refuse_too_long(virtual_s: float) -> None:
    if virtual_s > _MAX_VIRTUAL_S:
        raise ConfigError(
            f"workload: takes {virtual_s:.3g} virtual seconds; a report covers at most {_MAX_VIRTUAL_S:.0g}"
        )


def _without_times(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    for unit_index, unit in enumerate(config.units):
        for model_index, model in enumerate(unit.models):
            location: Location = ("units", unit_index, "models", model_index)
            if model.engine != "sim":
                yield (
                    (*location, "engine"),
                    "has no step times to simulate with; set `engine: sim` and the times in `sim`",
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
) -> int:
    date = datetime.fromtimestamp(SystemClock().unix_s(), UTC).isoformat(timespec="seconds")
    about = About(arguments.name or policy, f"simulated {arguments.config.name}, {policy}", models, spec.text, date,
                  rate=spec.rate)  # fmt: skip
    report = build_report(about, simulated.run)
    report["simulation"] = {
        "policy": policy,
        "wall_s": took_s,
        "num_events": simulated.num_events,
        "num_requeued": simulated.num_requeued,
        "busy_s": dict(simulated.busy_s),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")
    if arguments.html:
        arguments.html.write_text(page([report]))
    if arguments.json:
        print_json(report)
    else:
        print(table.render(report))
        virtual_s = simulated.run.duration_s
        line = f"Simulated {virtual_s:.0f} s in {took_s:.1f} s, order {policy}; the time of each token is not simulated"
        print(f"\n{line}", file=sys.stderr)
    return 0 if report["completed"] else 1
