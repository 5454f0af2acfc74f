"""What one model does to the others of a unit: floods, swapped popularity, a worker that hangs or dies in its grant.

`python -m benchmarks.shared_device.floods` runs meshes of sim engines, with ``--native`` of the models of
`benchmarks.shared_device.models`. Each disturbed run is compared with one without the disturbance before or after it,
with the same requests of the other models. The plots are in build/bench.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import uvloop

from benchmarks.mesh_process import UpProcess
from benchmarks.prompts import PROMPTS, write_prompts
from benchmarks.report import OUT, Report
from benchmarks.shared_device.disturbance import (
    Level,
    attained,
    buckets,
    largest_gap_s,
    others_kept,
    recovered_after_s,
)
from benchmarks.shared_device.loads import VOCABULARY, Stream, numbered, planned
from benchmarks.shared_device.measure import capacity, drive, in_turn, unloaded_of
from benchmarks.shared_device.models import cut_model, full_model, small_model
from benchmarks.shared_device.systems import mesh
from benchmarks.shared_device.virtual_time import in_virtual_time, unloaded_in_virtual_time
from loadtest.record import Run
from loadtest.slo import Unloaded
from loadtest.svg import Line, plot
from loadtest.target import Target
from loadtest.workload import PlannedRequest
from muxmesh.errors import MeshError

SCALE = 8
"""The SLO: this multiple of the unloaded latency."""
KEPT = 0.95
FLOOD = 10.0
LOAD = 0.5
"""Of the unit's capacity, by all models together, without a flood."""
VIRTUAL_RATE = 2.0
"""Requests per second of each model in virtual time: half of the capacity of the unit, by all together."""
RECOVERY_S = 10.0
LONGEST_GRANT_S, KILL_AFTER_S = 1.0, 4.0
_HANGING = "hanging"
_SEED = 5
_DRAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Setup:
    """A unit of several models: its configuration, what is sent to each, and how long and how often it is measured."""

    name: str
    config: dict[str, Any]
    contents: dict[str, str]
    duration_s: float
    rounds: int
    vocabulary: range

    @property
    def models(self) -> list[str]:
        return list(self.contents)


def sim_setup(duration_s: float, rounds: int) -> Setup:
    """Three models whose steps take 8 ms and 0.4 ms for each token."""
    names = ("a", "b", "c")
    sim = {"base_s": 0.008, "per_token_s": 0.0004, "per_context_s": 1e-6}
    models = [{"name": n, "engine": "sim", "max_num_seqs": 16, "slo": {"scale": SCALE}, "sim": sim} for n in names]
    contents = dict.fromkeys(names, "lengths=U(40,120)/(10,60)")
    return Setup("sim", _config("32MiB", models), contents, duration_s, rounds, range(40, 200))


def native_setup(duration_s: float, rounds: int) -> Setup:
    """SmolLM2, its cut and a random model, with outputs of at most 64 tokens."""
    OUT.mkdir(parents=True, exist_ok=True)
    prompts = OUT / "floods_prompts.jsonl"
    write_prompts(prompts, PROMPTS)
    chats = f"prompts={prompts} chat=yes cap=64"
    folders = {"a": full_model(), "b": cut_model(), "c": small_model()}
    models = [
        {"name": n, "source": str(f), "max_num_seqs": 16, "max_model_len": 2048, "slo": {"scale": SCALE}}
        for n, f in folders.items()
    ]
    contents = {"a": chats, "b": chats, "c": "lengths=U(20,100)/(10,64)"}
    return Setup("native", _config("1GiB", models), contents, duration_s, rounds, VOCABULARY)


def _config(kv_pool: str, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    arbiter = {"mode": "adbs", "longest_grant_s": LONGEST_GRANT_S, "kill_after_s": KILL_AFTER_S}
    router = {"max_waiting_requests": 512}
    return {
        "router": router,
        "units": [{"kv_pool": kv_pool, "slab": "1MiB", "arbiter": arbiter, "models": list(models)}],
    }


def virtual_flood(rate: float, duration_s: float, scale: int = SCALE) -> float:
    """What the others keep of their attainment in a flood of sim engines in virtual time. ``rate``: of each model."""
    setup = sim_setup(duration_s, 1)
    _, *others = setup.models
    unloaded = unloaded_in_virtual_time(setup.config, setup.contents, _SEED + 1, setup.vocabulary)
    plans = flood_plans(setup, [Stream(name, rate, content) for name, content in setup.contents.items()])
    without, with_flood = (in_virtual_time(setup.config, requests) for requests in plans)
    return others_kept(without, with_flood, others, unloaded, scale)


def flood_plans(setup: Setup, usual: Sequence[Stream]) -> tuple[list[PlannedRequest], list[PlannedRequest]]:
    """The usual requests; and those with `FLOOD` times the rate of the first model in the middle third of the run."""
    third = setup.duration_s / 3
    quiet = planned(usual, setup.duration_s, _SEED, setup.vocabulary)
    first = usual[0]
    extra = planned([replace(first, rate=first.rate * (FLOOD - 1))], third, _SEED + 9, setup.vocabulary)
    return quiet, numbered([*quiet, *_shifted(extra, third)])


Disturb = Callable[[UpProcess], Awaitable[Any]]


class Floods:
    """Runs the disturbances on one setup. ``unloaded`` and ``rate`` are measured first."""

    def __init__(self, setup: Setup, report: Report) -> None:
        self._setup = setup
        self._report = report
        self._unloaded: dict[str, Unloaded] = {}
        self._rate = 0.0

    async def calibrate(self) -> None:
        """Measures the latency of each model on the idle unit, and the capacity of the unit at equal popularity."""
        setup = self._setup
        async with mesh("floods", setup.config) as (_, target):
            equal = [Stream(name, 4.0, content) for name, content in setup.contents.items()]
            self._unloaded = await unloaded_of(target, self._planned(equal, 8.0, _SEED + 1), 5)
            most = await capacity(target, self._planned(equal, 30.0, _SEED + 2)[:200], 16 * len(equal))
        self._rate = LOAD * most / len(setup.models)
        self._report.figures[setup.name] = {
            "capacity": most, "rate_of_each": self._rate, "unloaded": {m: asdict(u) for m, u in self._unloaded.items()},
        }  # fmt: skip
        print(f"{setup.name}: capacity {most:.2f} requests/s; each model gets {self._rate:.2f}", flush=True)

    def _planned(self, streams: Sequence[Stream], duration_s: float, seed: int) -> list[PlannedRequest]:
        return planned(streams, duration_s, seed, self._setup.vocabulary)

    def streams(self, factors: Mapping[str, float] | None = None) -> list[Stream]:
        """The load of each model, with a factor for some."""
        factors = factors or {}
        return [Stream(n, self._rate * factors.get(n, 1.0), c) for n, c in self._setup.contents.items()]

    async def flood(self) -> None:
        """The first model gets `FLOOD` times its rate in the middle of the run."""
        setup, rounds = self._setup, []
        _, *others = setup.models
        quiet, loud = flood_plans(setup, self.streams())
        third = setup.duration_s / 3
        for number in range(setup.rounds):
            runs = {}
            for name in in_turn(("quiet", "loud"), number):
                async with mesh("floods", setup.config) as (_, target):
                    runs[name] = await drive(target, quiet if name == "quiet" else loud, setup.duration_s, _DRAIN_S)
            rounds.append(others_kept(runs["quiet"].records, runs["loud"].records, others, self._unloaded, SCALE))
            self._plot("flood", runs["loud"], [third, 2 * third])
            for model in setup.models:
                of_model = {name: [r for r in run.records if r.model == model] for name, run in runs.items()}
                shown = {name: round(attained(of, self._unloaded, SCALE), 3) for name, of in of_model.items()}
                print(f"  {setup.name}, flood, round {number}, {model}: attained {shown}", flush=True)
        kept = statistics.median(rounds)
        errors = sorted({f"{r.model} {r.status}: {r.error}"[:120] for r in runs["loud"].records if not r.is_ok})
        self._report.figures[setup.name]["flood"] = {"kept": rounds, "errors": errors[:5]}
        self._bar("flood: attainment that the others keep", kept, f"at least {KEPT}", kept >= KEPT)

    async def swap(self) -> None:
        """The most popular model becomes the least popular one, and the other way round, in the middle of the run."""
        setup = self._setup
        first, *_, last = setup.models
        half = setup.duration_s / 2
        before = self._planned(self.streams({first: 2.4, last: 0.3}), half, _SEED)
        after = self._planned(self.streams({first: 0.3, last: 2.4}), half, _SEED + 3)
        requests = numbered([*before, *_shifted(after, half)])
        found = []
        for _ in range(setup.rounds):
            async with mesh("floods", setup.config) as (_, target):
                run = await drive(target, requests, setup.duration_s, _DRAIN_S)
            popular = [r for r in run.records if (r.model == first) == (r.scheduled_s < half)]
            usual = attained([r for r in popular if 5.0 <= r.scheduled_s < half], self._unloaded, SCALE)
            found.append(recovered_after_s(popular, self._unloaded, SCALE, half, KEPT * usual))
            self._plot("swap", run, [half])
        seconds = statistics.median(found)
        self._report.figures[setup.name]["swap"] = {"recovered_after_s": found}
        self._bar("swapped popularity: recovered after s", seconds, f"at most {RECOVERY_S:g}", seconds <= RECOVERY_S)

    async def fault(self, name: str, disturb: Disturb, is_killed: bool = True) -> None:
        """A worker is disturbed in the middle of a run.

        ``disturb`` ends when the worker is gone. ``is_killed``: kvstore has to end it.
        """
        setup = self._setup
        others = setup.models[1:]
        at_s = setup.duration_s / 3
        requests = self._planned(self.streams(), setup.duration_s, _SEED)
        config = _with_hanging_model(setup.config)
        async with mesh("floods", config) as (_, target):
            quiet = await drive(target, requests, setup.duration_s, _DRAIN_S)
        async with mesh("floods", config) as (process, target):
            run, gone_s = await _with_fault(process, target, requests, setup.duration_s, at_s, disturb)
            serves = await _all_ready(process)
        kept = others_kept(quiet.records, run.records, others, self._unloaded, SCALE)
        gap_s = largest_gap_s(run.records, others, at_s, at_s + 15)
        failed = sum(not record.is_ok for record in run.records)
        self._report.figures[setup.name][name] = {"kept": kept, "gap_s": gap_s, "gone_s": gone_s, "failed": failed}
        self._plot(name, run, [at_s])
        self._report.bar(f"{setup.name}, {name}: attainment that the others keep", kept)
        most_s = LONGEST_GRANT_S + 1
        self._bar(f"{name}: longest pause of the others, s", gap_s, f"at most {most_s:g}", gap_s <= most_s)
        if is_killed:
            most_s = KILL_AFTER_S + 2
            self._bar(f"{name}: killed after s", gone_s, f"at most {most_s:g}", gone_s <= most_s)
        self._bar(f"{name}: failed requests", failed, "0", failed == 0)
        self._bar(f"{name}: all workers serve at the end", float(serves), "1", serves)

    def _bar(self, name: str, value: float, target: str, ok: bool) -> None:
        self._report.bar(f"{self._setup.name}, {name}", value, target, ok)
        print(f"  {self._setup.name}, {name}: {value:.3g} ({target})", flush=True)

    def _plot(self, name: str, run: Run, marks_s: Sequence[float]) -> None:
        lines = []
        for model in self._setup.models:
            levels: list[Level] = buckets(
                [r for r in run.records if r.model == model], self._unloaded, SCALE, self._setup.duration_s, 2.0
            )
            lines.append(Line(model, [one.at_s for one in levels], [one.attained for one in levels]))
        at = ", ".join(f"{mark:g} s" for mark in marks_s)
        title = f"{self._setup.name}, {name} at {at}: attained at scale {SCALE}"
        path = OUT / f"floods_{self._setup.name}_{name.replace(' ', '_')}.svg"
        path.write_text(plot(title, "due at, s", "share of requests", lines))


def _shifted(requests: Sequence[PlannedRequest], by_s: float) -> list[PlannedRequest]:
    return [replace(one, at_s=one.at_s + by_s) for one in requests]


async def _with_fault(
    process: UpProcess, target: Target, requests: Sequence[PlannedRequest], duration_s: float, at_s: float,
    disturb: Disturb,
) -> tuple[Run, float]:  # fmt: skip
    """The run, and the seconds that the disturbance took."""

    async def later() -> float:
        await asyncio.sleep(at_s)
        started_s = asyncio.get_running_loop().time()
        await disturb(process)
        return asyncio.get_running_loop().time() - started_s

    disturbing = asyncio.create_task(later())
    run = await drive(target, requests, duration_s, _DRAIN_S)
    return run, await disturbing


async def _pid_of(process: UpProcess, model: str, role: str) -> int:
    status = await process.client.status(timeout_s=10.0)
    return next(w.pid for unit in status.units for w in unit.workers if w.model == model and w.role == role)


async def _gone(pid: int) -> None:
    while os.path.exists(f"/proc/{pid}"):
        await asyncio.sleep(0.02)


def signalled(model: str, number: signal.Signals) -> Disturb:
    """Sends a signal to the decode worker of a model, and waits until the process is gone."""

    async def disturb(process: UpProcess) -> None:
        pid = await _pid_of(process, model, "decode")
        os.kill(pid, number)
        await _gone(pid)

    return disturb


async def hang_a_step(process: UpProcess) -> None:
    """A prefill step that takes an hour, while the worker's heartbeats go on. Waits until the process is gone."""
    pid = await _pid_of(process, _HANGING, "prefill")
    request = asyncio.create_task(process.client.generate([1, 2, 3], model=_HANGING, max_new_tokens=1))
    try:
        await _gone(pid)
    finally:
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


def _with_hanging_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a further model, whose steps take an hour."""
    (unit,) = config["units"]
    hanging = {"name": _HANGING, "engine": "sim", "sim": {"base_s": 3600}}
    return {**config, "units": [{**unit, "models": [*unit["models"], hanging]}]}


async def _all_ready(process: UpProcess) -> bool:
    """Whether both workers of every model are ready within 20 s."""
    num_models = len(await process.client.list_models(timeout_s=10.0))
    for _ in range(100):
        try:
            status = await process.client.status(timeout_s=2.0)
        except MeshError:
            continue
        workers = [worker for unit in status.units for worker in unit.workers]
        if len(workers) == 2 * num_models and all(worker.ready for worker in workers):
            return True
        await asyncio.sleep(0.2)
    return False


async def run_all(setup: Setup, report: Report, only: Sequence[str]) -> None:
    """All disturbances of a setup, or some."""
    floods = Floods(setup, report)
    await floods.calibrate()
    steps: dict[str, Callable[[], Awaitable[None]]] = {
        "flood": floods.flood,
        "swap": floods.swap,
        "stopped": lambda: floods.fault("stopped", signalled(setup.models[0], signal.SIGSTOP)),
        "hung step": lambda: floods.fault("hung step", hang_a_step),
        "dead": lambda: floods.fault("dead", signalled(setup.models[0], signal.SIGKILL), is_killed=False),
    }
    for name in only or steps:
        await steps[name]()


def main() -> int:
    """Parses the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--native", action="store_true", help="also the native engine, which takes 10 minutes more")
    parser.add_argument("--only", default="", help="of flood, swap, stopped, hung step, dead, separated by commas")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    report = Report("floods")
    kept = virtual_flood(VIRTUAL_RATE, 90.0)
    report.bar("virtual time, flood: attainment that the others keep", kept, f"at least {KEPT}", kept >= KEPT)
    print(f"virtual time, flood: the others keep {kept:.3f}", flush=True)
    setups = [sim_setup(arguments.seconds, arguments.rounds)]
    if arguments.native:
        setups.append(native_setup(arguments.seconds, 1))

    async def measure() -> None:
        for setup in setups:
            await run_all(setup, report, [name for name in arguments.only.split(",") if name])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure())
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
