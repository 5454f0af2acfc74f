"""`muxmesh simulate`: a workload on a mesh in virtual time."""

from __future__ import annotations

import argparse
import json
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
from muxmesh.cli.common import cache_dir, print_json, refuse_unwritable
from muxmesh.clock import SystemClock
from muxmesh.config.load import load_mesh_config
from muxmesh.config.schema import Location, MeshConfig, order_without_effect
from muxmesh.errors import ConfigError
from muxmesh.models.prepared_model import model_problems, spec_here
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from simulator.forecasts import Forecasts, Known, Learned, Noisy
from simulator.run import Simulated, requests_of, simulate, true_length
from simulator.simulated_unit import Decision
from simulator.timeline import MEASURED

_DEFAULT_TAU = 0.5
_LONGEST_S = 1e7


def run(arguments: argparse.Namespace) -> int:
    """See `muxmesh simulate --help`."""
    refuse_unwritable(arguments.output, arguments.html, arguments.trace)
    loaded, base_dir = load_mesh_config(arguments.config), arguments.config.resolve().parent
    config = loaded.config
    if arguments.policy is None:  # else the file's order is for other runs
        loaded.refuse(order_without_effect(config))
    loaded.refuse(_without_times(config))
    loaded.refuse(model_problems(config, base_dir, cache_dir()))
    specs = {name: spec_here(model, base_dir, cache_dir()) for name, model in config.models().items()}
    spec = parse_spec(arguments.workload)
    sketches = requests_of(spec)
    _refuse_too_long(sketches[-1].at_s)
    forecasts = _forecasts(spec, sketches, arguments.tau)
    clock = SystemClock()
    began_at_s = clock.monotonic_s()
    with ExitStack() as stack:
        on_decision = None
        if arguments.trace:
            out = stack.enter_context(arguments.trace.open("w"))

            def on_decision(decision: Decision) -> None:
                out.write(json.dumps(asdict(decision)) + "\n")

        simulated = simulate(config, specs, sketches, forecasts, arguments.policy, on_decision, MEASURED)
    _refuse_too_long(simulated.run.duration_s)
    took_s = clock.monotonic_s() - began_at_s
    policy = arguments.policy or config.order.policy
    return _finish(arguments, spec, simulated, policy, took_s, sorted(specs))


def _refuse_too_long(virtual_s: float) -> None:
    if virtual_s > _LONGEST_S:
        raise ConfigError(
            f"workload: takes {virtual_s:.3g} virtual seconds; a report is by the second, of at most {_LONGEST_S:.0g}"
        )


def _without_times(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    for unit_index, unit in enumerate(config.units):
        for model_index, model in enumerate(unit.models):
            place: Location = ("units", unit_index, "models", model_index)
            if model.engine != "sim":
                yield (
                    (*place, "engine"),
                    "has no step times to simulate with; write `engine: sim` and its times in `sim`",
                )
            elif model.sim.base_s == model.sim.per_token_s == model.sim.per_context_s == 0:
                yield (*place, "sim"), "takes no time at all; give base_s, per_token_s or per_context_s, in seconds"


def _forecasts(spec: Spec, sketches: Sequence[Sketch], tau: float | None) -> Forecasts:
    if sketches[0].is_forced:
        if tau is not None:
            raise ConfigError(
                "--tau: has no effect where answers are forced: the mesh is told their lengths; output=natural"
            )
        return Known()
    if spec.prompts is not None and tau is None:
        return Learned(CheckedPredictor(LengthPredictor()))
    return Noisy(_DEFAULT_TAU if tau is None else tau, [true_length(one) for one in sketches], spec.seed)


def _finish(
    arguments: argparse.Namespace, spec: Spec, simulated: Simulated, policy: str, took_s: float, models: Sequence[str]
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
        print(f"\nSimulated {virtual_s:.0f} s in {took_s:.1f} s, order {policy}; no gaps between tokens are known",
              file=sys.stderr)  # fmt: skip
    return 0 if report["completed"] else 1
