"""One load test of one server: list its models, calibrate, drive, report.

It knows the order of these steps. It knows neither the wire protocol nor how metrics are computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadtest.drive import Driver
from loadtest.record import Record
from loadtest.report import About, Goodput, build_report
from loadtest.slo import Objectives, Unloaded, fit_unloaded
from loadtest.spec import Spec
from loadtest.sweep import build_sweep
from loadtest.target import Target
from loadtest.workload import PlannedRequest, plan
from muxmesh.clock import Clock
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.quoting import named

_CALIBRATION_SEED_OFFSET = 1 << 20
"""Calibration has a seed of its own, so that its random prompts are not in the prefix cache when the run starts."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a test runs and what its report has.

    ``name`` and ``date``: for the report. ``max_concurrency``: None is unbounded. ``calibrate``: number of requests
    of each model that are sent one at a time before the run, to fit the latency of the idle server; 0: no calibration
    and no attainment at multiples of it. ``unloaded``: that latency from an earlier test, so that several servers have
    the same SLO, by model or one for all models.
    ``cache_salt``: keeps the run's prompts apart from those of earlier runs in the server's prefix cache, if the server
    takes one; empty: none. ``is_new_salt``: no earlier run had it.
    """

    name: str
    date: str
    max_concurrency: int | None = None
    goodput: Goodput | None = None
    calibrate: int = 5
    unloaded: Mapping[str, Unloaded] | Unloaded | None = None
    cache_salt: str = ""
    is_new_salt: bool = False


class Session:
    """Tests one server. ``on_start`` receives a description and each `Driver` before it runs.

    The unloaded latency of a model is fitted once, by the first run that uses it.
    """

    def __init__(
        self,
        target: Target,
        options: Options,
        clock: Clock,
        on_start: Callable[[str, Driver], None] = lambda description, driver: None,
    ) -> None:
        self._target = target
        self._options = options
        self._clock = clock
        self._on_start = on_start
        self._unloaded: dict[str, Unloaded] = {}
        self._num_runs = 0

    async def run(self, spec: Spec) -> dict[str, Any]:
        """Runs the workload and returns its report. Raises Unavailable, ConfigError."""
        requests = await self._plan(spec)
        self._take_known_latencies()
        if self._options.calibrate and (unknown := [name for name in self._used if name not in self._unloaded]):
            calibration = plan(replace(spec, seed=spec.seed + _CALIBRATION_SEED_OFFSET), self._vocabulary)
            salted = self._salted(calibration)
            for name in unknown:
                self._unloaded[name] = await self._calibrate(self._requests_for(name, salted))
        driver = Driver(self._target, self._salted(requests), self._clock, self._options.max_concurrency)
        self._on_start("running" if spec.rate is None else f"rate {spec.rate:g}", driver)
        run = await driver.run()
        options = self._options
        about = About(
            options.name, self._target.name, sorted({r.model or self._default for r in requests}), spec.text,
            options.date, options.max_concurrency, spec.rate,
        )  # fmt: skip
        slos = {name: model.slo for name, model in self._used.items() if model.slo is not None}
        unloaded = {name: self._unloaded[name] for name in self._used if name in self._unloaded}
        report = build_report(about, run, options.goodput, Objectives(unloaded, slos, self._default))
        return report | {
            "cache_salt": options.cache_salt if self._takes_salt else "",
            "warnings": [*self._slo_warnings(), *self._cache_warnings(report)],
        }

    async def sweep(self, spec: Spec, rates: Sequence[float], scale: int, attainment: float) -> dict[str, Any]:
        """Runs the workload at each rate in ascending order; returns the sweep. Stops after a partial run.

        ``scale`` and ``attainment``: see `build_sweep`. Raises Unavailable, ConfigError.
        """
        if spec.trace is not None:
            raise ConfigError("--sweep: needs a workload with a rate; a trace has its own (time_scale=X changes it)")
        if self._options.unloaded is None and not self._options.calibrate:
            raise ConfigError("--sweep: needs the unloaded latency: --calibrate of at least 1, or --unloaded")
        reports = []
        for run_index, rate in enumerate(sorted(rates)):
            # Each run has its own seed: the prompts of earlier runs are in the server's prefix cache.
            seed = spec.seed + run_index
            text = re.sub(r"\b(rate|seed)=\S+ ?", "", spec.text)
            reports.append(
                await self.run(replace(spec, rate=rate, seed=seed, text=f"rate={rate:g} {text.strip()} seed={seed}"))
            )
            if reports[-1]["partial"]:
                break
        return build_sweep(reports, scale, attainment)

    async def _plan(self, spec: Spec) -> list[PlannedRequest]:
        served = {model.name: model for model in await self._target.models()}
        self._default = next(iter(served))
        if not spec.models and len(served) > 1:
            raise ConfigError(
                f"workload: several models are served; models=... has to name one or more of: {', '.join(served)}"
            )
        unknown = [name for name, _ in spec.models if name not in served]
        if unknown:
            raise ConfigError(f"workload: models={named(unknown[0])}: not served; served models: {', '.join(served)}")
        self._used = {name: served[name] for name in [name for name, _ in spec.models] or [self._default]}
        self._takes_salt = all(model.takes_cache_salt for model in self._used.values())
        smallest = min((model.vocabulary for model in self._used.values()), key=lambda vocabulary: vocabulary.stop)
        self._vocabulary = smallest
        return plan(spec, smallest)

    def _salted(self, requests: Sequence[PlannedRequest]) -> list[PlannedRequest]:
        """The requests with a salt of their own run: texts and shared prefixes are the same in every run of a sweep."""
        self._num_runs += 1
        if not self._options.cache_salt or not self._takes_salt:
            return list(requests)
        salt = f"{self._options.cache_salt}-{self._num_runs}"
        return [
            replace(request, cache_salt=f"{salt}/{request.tenant}" if request.tenant else salt) for request in requests
        ]

    def _slo_warnings(self) -> list[str]:
        """The SLOs by which no request could be judged."""
        return [
            f"the SLO of {name} is a multiple of its unloaded latency, which is unknown: use --calibrate or --unloaded"
            for name, model in self._used.items()
            if model.slo is not None and model.slo.scale is not None and name not in self._unloaded
        ]

    def _cache_warnings(self, report: Mapping[str, Any]) -> list[str]:
        """Whether the prefix cache may have had prompts of an earlier run."""
        cached, num_input = report["total_cached_tokens"], report["total_input_tokens"]
        if (self._options.is_new_salt and self._takes_salt) or cached == 0 or not num_input:
            return []
        remedy = "a new --cache-salt" if self._takes_salt else "another seed= in the workload"
        if cached is None:
            return [f"cached tokens are not reported; an earlier run of these prompts may have left some: use {remedy}"]
        return [f"{cached / num_input:.0%} of the input tokens were cached, perhaps by an earlier run: use {remedy}"]

    def _take_known_latencies(self) -> None:
        """Uses the latencies of an earlier test. Raises ConfigError if they are not those of the models in use."""
        known = self._options.unloaded
        if isinstance(known, Unloaded):
            self._unloaded = dict.fromkeys(self._used, known)
        elif known is not None:
            if missing := [name for name in self._used if name not in known]:
                raise ConfigError(f"--unloaded: has no latency of {named(missing[0])}; it has: {', '.join(known)}")
            self._unloaded = dict(known)

    def _requests_for(self, model: str, requests: Sequence[PlannedRequest]) -> list[PlannedRequest]:
        """The requests for ``model``, or all of them as requests for it if there are none."""
        own = [request for request in requests if (request.model or self._default) == model]
        return own or [replace(request, model=model) for request in requests]

    async def _calibrate(self, requests: Sequence[PlannedRequest]) -> Unloaded:
        step = max(1, len(requests) // self._options.calibrate)
        records: list[Record] = []
        for request in requests[::step][: self._options.calibrate]:
            driver = Driver(self._target, [replace(request, at_s=0.0)], self._clock)
            self._on_start("calibrating", driver)
            run = await driver.run()
            if run.partial:
                raise Unavailable(f"calibration: {run.partial}")
            records += run.records
        if not any(record.is_ok for record in records):
            raise ConfigError(f"calibration: no request succeeded: {records[0].status}: {named(records[0].error)}")
        return fit_unloaded(records)
