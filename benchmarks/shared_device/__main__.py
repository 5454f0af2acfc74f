"""Several models on two cores: `adbs` against `spatial`, `temporal` and vLLM's servers, with real models and outputs.

`python -m benchmarks.shared_device [JSONL ...]` sends the prompts of the files as chats, else those of
`benchmarks.prompts`. `VLLM_PYTHON` names an interpreter that has vLLM. A case is measured at ``--load`` of the capacity
of the unit that `adbs` shares, with the same requests for every system, in rounds of alternating order. Output lengths
are natural, at most `CAP` tokens at temperature 0.7; those of the random model are given.

What a CPU can gain: cores and KV memory that the unpopular model leaves idle. What it cannot: streaming multiprocessors
that one phase leaves idle while it computes, since a core that computes is fully used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.prompts import PROMPTS, prompts_of, write_prompts
from benchmarks.report import OUT, Report
from benchmarks.shared_device.loads import from_trace, numbered, planned, rates_of, streams
from benchmarks.shared_device.measure import capacity, drive, in_turn, unloaded_of
from benchmarks.shared_device.models import cut_model, full_model, small_model
from benchmarks.shared_device.outcome import SCALES, Outcome, median_of, median_ratio, of_the_best, outcome
from benchmarks.shared_device.systems import Model, VllmServers, mesh, mesh_config
from benchmarks.shared_device.three import add_three
from benchmarks.shared_device.tight import add_real, add_virtual
from loadtest.slo import Unloaded
from loadtest.svg import Line, plot
from loadtest.target import Target
from loadtest.traces import read_trace
from loadtest.workload import PlannedRequest

CAP = 128
MAX_NUM_SEQS = 48
"""Of each model, in every system. At 16, a core is not full: the cost of a step is mostly that of reading weights."""
SLO_SCALE = 8.0
VLLM = "vllm"
_WARM_UP_S = 25.0
"""Not counted: longer than a request takes, so that as many requests end as begin in what is counted."""
_TIGHT_S = 30.0
_SEED = 19
_CAPACITY_REQUESTS = 160
_CALIBRATION_REQUESTS = 6


@dataclass(frozen=True, slots=True)
class Case:
    """Models, the most popular first, and how popular: by ``alpha``, or as in the trace if that is None."""

    models: tuple[str, ...]
    alpha: float | None
    systems: tuple[str, ...]


CASES = {
    "two-2.1": Case(("full", "cut"), 2.1, ("adbs", "spatial", "temporal")),
    "two-0.9": Case(("full", "cut"), 0.9, ("adbs", "spatial", "temporal")),
    "three-2.1": Case(("full", "cut", "small"), 2.1, ("adbs", "temporal")),
    "three-0.9": Case(("full", "cut", "small"), 0.9, ("adbs", "temporal")),
    "lmsys-2": Case(("full", "cut"), None, ("adbs", "spatial", "temporal")),
    "lmsys-3": Case(("full", "cut", "small"), None, ("adbs", "temporal")),
}
MUST = "two-2.1"
TIGHT = "tight"
"""The modes at tight SLOs on the sim engine, see `benchmarks.shared_device.tight`."""
THREE_VIRTUAL = "three-virtual"
"""Three models in virtual time, see `benchmarks.shared_device.three`."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how often and at which load. ``rate``: requests per second instead of a part of the capacity."""

    duration_s: float
    rounds: int
    load: float
    rate: float | None
    max_num_seqs: int
    trace: Path | None


class Bench:
    """Measures cases one after the other. Models and prompts are the same for all of them."""

    def __init__(self, settings: Settings, prompts: Path, python: str | None, compiled: bool) -> None:
        self._settings = settings
        self._python, self._compiled = python, compiled
        chats = f"prompts={prompts} chat=yes cap={CAP}"
        self._models = {
            "full": Model("full", full_model(), chats),
            "cut": Model("cut", cut_model(), chats),
            "small": Model("small", small_model(), f"lengths=U(20,120)/(20,{CAP})"),
        }
        self._cores = sorted(os.sched_getaffinity(0))[:2]

    async def case(self, name: str, case: Case, report: Report) -> None:
        """Measures all systems of a case and adds its figures and bars to the report."""
        models = [self._models[model] for model in case.models]
        async with self._mesh("adbs", models) as target:
            calibration = planned(streams({m.name: m.content for m in models}, 0.0, 4.0), 30.0, _SEED + 1)
            unloaded = await unloaded_of(target, calibration, _CALIBRATION_REQUESTS)
            offered = self._settings.rate or await self._rate(target, case, models)
        requests = self._requests(case, models, offered)
        rates = rates_of(requests, self._settings.duration_s)
        print(f"\n{name}: {_shown(rates)} requests/s, unloaded {_shown_unloaded(unloaded)}", flush=True)
        outcomes = await self._rounds(case, models, requests, rates, unloaded)
        report.figures[name] = {
            "rates": rates, "alpha": case.alpha, "settings": _as_json(self._settings),
            "unloaded": {model: asdict(one) for model, one in unloaded.items()},
            "outcomes": [one.as_json() for one in outcomes],
        }  # fmt: skip
        _add_bars(report, name, outcomes)
        _write_plot(name, outcomes)

    async def _rounds(
        self, case: Case, models: Sequence[Model], requests: Sequence[PlannedRequest],
        rates: Mapping[str, float], unloaded: Mapping[str, Unloaded],
    ) -> list[Outcome]:  # fmt: skip
        names = [*case.systems, *([VLLM] if self._python else [])]
        starts: dict[str, Callable[[], AbstractAsyncContextManager[Target]]] = {
            system: partial(self._mesh, system, models) for system in case.systems
        }
        servers = None
        if self._python:
            print("starting vLLM's servers ...", flush=True)
            servers = VllmServers(self._python, models, self._settings.max_num_seqs, self._compiled)
            starts[VLLM] = servers.target
        try:
            outcomes = []
            for number in range(self._settings.rounds):
                for system in in_turn(names, number):
                    async with starts[system]() as target:
                        found = await self._one(system, target, requests, rates, unloaded)
                    print(f"  round {number}: {_line(found)}", flush=True)
                    outcomes.append(found)
            return outcomes
        finally:
            if servers is not None:
                servers.close()

    async def _one(
        self, system: str, target: Target, requests: Sequence[PlannedRequest],
        rates: Mapping[str, float], unloaded: Mapping[str, Unloaded],
    ) -> Outcome:  # fmt: skip
        duration_s = self._settings.duration_s
        warm_up = numbered([one for one in requests if one.at_s < 1.0][:4])
        await drive(target, warm_up, 1.0, 60.0)
        run = await drive(target, requests, duration_s, duration_s)
        return outcome(system, run, rates, unloaded, (min(_WARM_UP_S, duration_s / 3), duration_s))

    @asynccontextmanager
    async def _mesh(self, system: str, models: Sequence[Model]) -> AsyncIterator[Target]:
        config = mesh_config(system, models, self._settings.max_num_seqs, self._cores, SLO_SCALE)
        async with mesh(system, config) as (_, target):
            yield target

    async def _rate(self, target: Target, case: Case, models: Sequence[Model]) -> float:
        """The offered load: a part of the capacity of the unit that all models share."""
        mixed = self._requests(case, models, 4.0)
        most = await capacity(target, mixed[:_CAPACITY_REQUESTS], self._settings.max_num_seqs)
        print(f"capacity of the shared unit: {most:.2f} requests/s", flush=True)
        return self._settings.load * most

    def _requests(self, case: Case, models: Sequence[Model], rate: float) -> list[PlannedRequest]:
        duration_s = self._settings.duration_s
        if case.alpha is not None:
            return planned(streams({m.name: m.content for m in models}, case.alpha, rate), duration_s, _SEED)
        path, own_rate = most_used(self._settings.trace, len(models))
        settings = f"time_scale={own_rate / rate} input_scale=0.5 output_scale=0.25 max_input=256 cap={CAP}"
        return from_trace(str(path), case.models, settings, duration_s)


def most_used(trace: Path | None, num_models: int) -> tuple[Path, float]:
    """The requests of a trace for its most used models, as a file, and how many there are per second."""
    if trace is None:
        raise SystemExit("cases lmsys-*: --trace has to name the file lmsys_arena_multimodel.jsonl.gz")
    arrivals = read_trace(trace)
    counts = Counter(one.model or "" for one in arrivals)
    kept = [name for name, _ in counts.most_common(num_models)]
    lines = [
        json.dumps({"t": one.at_s, "model": one.model, "n_in": one.num_input, "n_out": one.num_output})
        for one in arrivals if one.model in kept
    ]  # fmt: skip
    path = OUT / f"shared_device_trace_{num_models}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path, len(lines) / arrivals[-1].at_s


def _add_bars(report: Report, name: str, outcomes: Sequence[Outcome]) -> None:
    systems = sorted({one.system for one in outcomes})
    is_must = name == MUST
    for other in [system for system in systems if system != "adbs"]:
        ratio = median_ratio(outcomes, "adbs", other, "throughput")
        needed = {"spatial": 1.2, "temporal": 1.0}.get(other) if is_must else None
        aim = {"spatial": 1.8}.get(other)
        report.bar(
            f"{name}: rate-weighted requests/s, adbs / {other}", ratio,
            *((f"at least {needed}", ratio >= needed) if needed else ("", None)),
            *((f"at least {aim}", ratio >= aim) if aim else ("", None)),
        )  # fmt: skip
        report.bar(f"{name}: rate-weighted tokens/s, adbs / {other}", median_ratio(outcomes, "adbs", other, "tokens"))
        ratio = median_ratio(outcomes, "adbs", other, "p99_tpot_s")
        is_needed = is_must and other == "temporal"
        report.bar(f"{name}: p99 TPOT, adbs / {other}", ratio, *(("below 1", ratio < 1) if is_needed else ("", None)))
    for scale in SCALES:
        attained = {system: median_of(outcomes, system, f"attainment@{scale}") for system in systems}
        ratio = of_the_best({system: value for system, value in attained.items() if system != VLLM})
        needs = ("at least 0.95", ratio >= 0.95) if is_must and scale >= 8 else ("", None)
        report.bar(f"{name}: attainment at {scale}, adbs / best mode", ratio, *needs)
        print(f"  attainment at {scale}: {_shown(attained)}")


def _write_plot(name: str, outcomes: Sequence[Outcome]) -> None:
    systems = sorted({one.system for one in outcomes})
    lines = [
        Line(s, SCALES, [median_of(outcomes, s, f"attainment@{scale}") for scale in SCALES], True) for s in systems
    ]
    path = OUT / f"shared_device_{name}.svg"
    path.write_text(plot(f"SLO attainment, {name}", "SLO scale", "attained", lines))


def _line(one: Outcome) -> str:
    parts = ", ".join(f"{model} {own['requests']:.2f}" for model, own in one.per_model.items())
    attained = " ".join(f"{scale}:{value:.2f}" for scale, value in one.attainment.items())
    failed = f", {one.failed} FAILED {one.errors}" if one.failed else ""
    return (
        f"{one.system:9} weighted {one.throughput:.3f} req/s {one.tokens:.1f} tok/s ({parts}), TPOT "
        f"{one.median_tpot_s * 1000:.0f} p99 {one.p99_tpot_s * 1000:.0f} ms, p99 TTFT {one.p99_ttft_s:.1f} s, "
        f"attained {attained}{failed}"
    )


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _shown_unloaded(unloaded: Mapping[str, Unloaded]) -> str:
    return "; ".join(
        f"{model} {one.base_s * 1000:.0f} ms + {one.per_input_s * 1000:.2f} ms/input token + "
        f"{one.per_output_s * 1000:.1f} ms/output token"
        for model, one in unloaded.items()
    )


def _as_json(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "trace": str(settings.trace) if settings.trace else None}


def main() -> int:
    """Parses the arguments, merges the prompt files, measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", type=Path, help="jsonl files with a prompt in each line")
    names = [*CASES, TIGHT, THREE_VIRTUAL]
    parser.add_argument(
        "--cases", default=f"{MUST},{TIGHT},{THREE_VIRTUAL}", help=f"of {', '.join(names)}, separated by commas, or all"
    )
    parser.add_argument("--systems", help="instead of those of a case, like adbs,adbs@50,spatial; @50: compute_share")
    parser.add_argument("--quick", action="store_true", help="one round of 30 s")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=150.0, help="of each run, without the drain")
    parser.add_argument("--load", type=float, default=0.9, help="offered load as a part of the shared unit's capacity")
    parser.add_argument("--rate", type=float, help="offered load in requests/s")
    parser.add_argument("--max-num-seqs", type=int, default=MAX_NUM_SEQS)
    parser.add_argument("--trace", type=Path, help="lmsys_arena_multimodel.jsonl.gz, for the cases lmsys-*")
    parser.add_argument("--compiled", action="store_true", help="compile vLLM's models, which takes minutes more")
    arguments = parser.parse_args()
    chosen = names if arguments.cases == "all" else arguments.cases.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--cases: {unknown[0]}: must be of {', '.join(names)}")
    duration_s, rounds = (30.0, 1) if arguments.quick else (arguments.seconds, arguments.rounds)
    settings = Settings(
        duration_s, rounds, arguments.load, arguments.rate, arguments.max_num_seqs, arguments.trace
    )  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, _mixed(arguments.prompts), os.environ.get("VLLM_PYTHON") or None, arguments.compiled)
    report = Report("shared_device")
    systems = tuple(arguments.systems.split(",")) if arguments.systems else None

    async def measure() -> None:
        for name in chosen:
            if name == TIGHT:
                add_virtual(report)
                await add_real(report, min(duration_s, _TIGHT_S), min(rounds, 2))
            elif name == THREE_VIRTUAL:
                add_three(report)
            else:
                case = CASES[name]
                await bench.case(name, replace(case, systems=systems or case.systems), report)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure())
    return 0 if report.write() else 1


def _mixed(files: Sequence[Path]) -> Path:
    """One file with the prompts of all files."""
    mixed = OUT / "shared_device_prompts.jsonl"
    write_prompts(mixed, prompts_of(files) or PROMPTS)
    return mixed


if __name__ == "__main__":
    sys.exit(main())
