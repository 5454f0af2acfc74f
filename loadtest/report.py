"""Computes the report of a run from its records, with the metric names of `vllm bench serve`. Pure.

A report is JSON content. A metric that was not measured is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loadtest.record import INTERRUPTED, Record, Run
from loadtest.slo import Objectives, attainment_figures

FORMAT = 1
METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 95, 99)
MAX_DRIVER_CPU = 0.9
"""Share of one core; the driver's event loop cannot use more than one."""
MAX_LAG = 0.1
"""Of the driver's event loop: its 99th percentile as a share of that of the TTFT, its mean of the medians."""
_TIMER_MS = 1.0
"""Resolution of the event loop's timers; a lag below it is not measurable."""
_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Goodput:
    """The latency limits of a good request, in ms. None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def is_met(self, record: Record) -> bool:
        tpot_s = record.tpot_s
        return record.is_ok and all(
            limit_ms is None or value_s is None or value_s * 1000 <= limit_ms
            for limit_ms, value_s in (
                (self.ttft_ms, record.ttft_s),
                (self.tpot_ms, tpot_s),
                (self.e2el_ms, record.e2el_s),
            )
        )


@dataclass(frozen=True, slots=True)
class About:
    """What was measured, for the head of a report. ``rate``: requests per second; None for a trace."""

    name: str
    target: str
    models: Sequence[str]
    workload: str
    date: str
    max_concurrency: int | None = None
    rate: float | None = None


NO_OBJECTIVES = Objectives()


@dataclass(frozen=True, slots=True)
class Judged:
    """What requests are judged by: the limits of `--goodput`, and SLOs."""

    goodput: Goodput | None = None
    objectives: Objectives = NO_OBJECTIVES


NOT_JUDGED = Judged()


def build_report(
    about: About, run: Run, goodput: Goodput | None = None, objectives: Objectives = NO_OBJECTIVES
) -> dict[str, Any]:
    """Returns the report of a run.

    With ``goodput`` it has the rate of good requests, with unloaded latencies the SLO attainment at multiples of them,
    with SLOs the attainment of those. A run with several models, tenants or priorities has the figures of each.
    """
    records, judged = run.records, Judged(goodput, objectives)
    done = [record for record in records if record.is_ok]
    report: dict[str, Any] = {
        "muxmesh_loadtest": FORMAT,
        **asdict(about),
        "models": list(about.models),
        "rate": None if about.rate == math.inf else about.rate,  # JSON has no infinity
        "partial": run.partial or None,
        **figures(records, run.duration_s, judged, run.token_times),
        "rate_weighted_throughput": _rate_weighted_throughput(records, run.duration_s),
        "errors": _errors(records),
        "finish_reasons": dict(Counter(record.finish for record in done)),
        "driver": _driver(run),
        "series": _series(records, run.duration_s),
        "requests": _requests(records),
    }
    for name, key in _GROUPS.items():
        groups = sorted({key(record) for record in records})
        if len(groups) > 1:
            report[f"by_{name}"] = {
                group: figures(
                    [record for record in records if key(record) == group], run.duration_s, judged, run.token_times
                )
                for group in groups
            }
    if goodput is not None:
        report["goodput_slo"] = {name: limit for name, limit in asdict(goodput).items() if limit is not None}
    if objectives.unloaded:
        report["slo"] = objectives.by_scale(records)
    if objectives.slos:
        report["configured_slo"] = objectives.limits
    return report


def _rate_weighted_throughput(records: Sequence[Record], duration_s: float) -> float | None:
    """Requests per second of each model, weighted by the rate at which it was requested; None with one model.

    It is the throughput of MuxServe (ICML'24, section 4.1): sum of rate_i * tpt_i / sum of rate_i.
    """
    requested = Counter(record.model for record in records)
    if len(requested) < 2 or duration_s <= 0:
        return None
    done = Counter(record.model for record in records if record.is_ok)
    return sum(count * done[model] / duration_s for model, count in requested.items()) / requested.total()


_GROUPS: Mapping[str, Callable[[Record], str]] = {
    "model": lambda record: record.model or "(default)",
    "tenant": lambda record: record.tenant or "(none)",
    "priority": lambda record: str(record.priority),
}


def figures(
    records: Sequence[Record], duration_s: float, judged: Judged = NOT_JUDGED, token_times: bool = True
) -> dict[str, Any]:
    """Returns the columns of `vllm bench serve`, the normalized latency and the attainment of the configured SLO.

    Throughputs are over ``duration_s``.

    Without ``token_times`` there is no inter-token latency and no peak throughput.
    """
    done = [record for record in records if record.is_ok]
    num_input, num_output = sum(r.num_input for r in done), sum(r.num_output for r in done)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    columns: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": sum(not r.is_ok and r.status != INTERRUPTED for r in records),
        "interrupted": sum(r.status == INTERRUPTED for r in records),
        "total_input_tokens": num_input,
        "total_cached_tokens": None
        if any(r.num_cached is None for r in done)
        else sum(r.num_cached or 0 for r in done),
        "total_output_tokens": num_output,
        "request_throughput": len(done) * per_s,
        "request_goodput": None if judged.goodput is None else sum(map(judged.goodput.is_met, records)) * per_s,
        **attainment_figures([judged.objectives.verdict(record) for record in records]),
        "output_throughput": num_output * per_s,
        "total_token_throughput": (num_input + num_output) * per_s,
        "max_output_tokens_per_s": max(_tokens_per_s(done, duration_s), default=0.0) if token_times else None,
        "max_concurrent_requests": _peak_concurrency(records),
    }
    values_s = {
        "ttft": [r.ttft_s for r in done],
        "tpot": [r.tpot_s for r in done if r.tpot_s is not None],
        "itl": [gap for r in done for gap in r.itls_s] if token_times else [],
        "e2el": [r.e2el_s for r in done],
    }
    for name in METRICS:
        columns |= _statistics(name, values_s[name])
    columns["max_itl_ms"] = 1000 * max(values_s["itl"]) if values_s["itl"] else None
    if router_s := [r.router_s for r in done if r.router_s is not None]:
        columns |= _statistics("router", router_s)
    normalized = [r.normalized_s for r in done]
    columns["mean_normalized_latency_s_per_token"] = float(np.mean(normalized)) if normalized else None
    columns["p99_normalized_latency_s_per_token"] = float(np.percentile(normalized, 99)) if normalized else None
    return columns


def bottleneck(report: Mapping[str, Any]) -> str | None:
    """Returns why the figures measure the driver and not the server, or None."""
    driver = report["driver"]
    if driver["cpu_share"] > MAX_DRIVER_CPU:
        return f"the driver used {driver['cpu_share']:.0%} of a core, more than {MAX_DRIVER_CPU:.0%}"
    for kind, figure, metric in (("p99", "p99", "ttft"), ("mean", "median", "ttft"), ("mean", "median", "itl")):
        lag_ms, measured_ms = driver[f"{kind}_lag_ms"], report[f"{figure}_{metric}_ms"]
        if measured_ms is not None and lag_ms > (limit_ms := max(_TIMER_MS, MAX_LAG * measured_ms)):
            return (
                f"the driver was {lag_ms:.1f} ms late ({kind}), more than {limit_ms:.1f} ms "
                f"({MAX_LAG:.0%} of the {figure} {metric.upper()})"
            )
    return None


def _statistics(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    if not values_s:
        return dict.fromkeys(keys)
    values = np.asarray(values_s) * 1000
    statistics = (np.mean(values), np.median(values), np.std(values), *np.percentile(values, PERCENTILES))
    return {key: float(value) for key, value in zip(keys, statistics, strict=True)}


def _errors(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Status → number of requests and the first distinct messages, the most frequent status first."""
    failed = [record for record in records if not record.is_ok]
    errors: dict[str, dict[str, Any]] = {}
    for status, count in Counter(record.status for record in failed).most_common():
        messages = dict.fromkeys(r.error for r in failed if r.status == status and r.error)
        errors[status] = {"count": count, "messages": list(messages)[:_ERRORS_SHOWN]}
    return errors


def _driver(run: Run) -> dict[str, float]:
    lags_ms = np.asarray(run.loop_lags_s or [0.0]) * 1000
    share = run.cpu_s / run.duration_s if run.duration_s > 0 else 0.0
    return {
        "cpu_s": run.cpu_s,
        "cpu_share": share,
        "mean_lag_ms": float(lags_ms.mean()),
        "p99_lag_ms": float(np.percentile(lags_ms, 99)),
        "max_lag_ms": float(lags_ms.max()),
    }


def _tokens_per_s(records: Sequence[Record], duration_s: float) -> list[float]:
    """Tokens that arrived in each second."""
    buckets = [0.0] * (math.floor(duration_s) + 1)
    for record in records:
        # The counts of the pieces may be estimates; the total is known for requests that succeeded.
        num_in_pieces = sum(count for _, count in record.pieces) or 1
        scale = record.num_output / num_in_pieces if record.is_ok else 1.0
        for at_s, count in record.pieces:
            buckets[min(math.floor(at_s), len(buckets) - 1)] += count * scale
    return buckets


def _level_changes(records: Sequence[Record]) -> list[tuple[float, int, int]]:
    """(time, change of waiting, change of running), in order of time. A request waits until its first token."""
    changes: list[tuple[float, int, int]] = []
    for record in records:
        if record.sent_s is None:
            continue
        ended_s = math.inf if record.ended_s is None else record.ended_s
        first_s = min(record.pieces[0][0] if record.pieces else ended_s, ended_s)
        changes += [(record.scheduled_s, 1, 0), (first_s, -1, 1), (ended_s, 0, -1)]
    return sorted(changes)


def _peak_concurrency(records: Sequence[Record]) -> int:
    """The highest number of requests that were sent and had not ended."""
    sent = [record for record in records if record.sent_s is not None]
    ends = [math.inf if record.ended_s is None else record.ended_s for record in sent]
    changes = [(record.sent_s or 0.0, 1) for record in sent] + [(end, -1) for end in ends]
    level = peak = 0
    for _, change in sorted(changes):
        level += change
        peak = max(peak, level)
    return peak


def _series(records: Sequence[Record], duration_s: float) -> dict[str, list[float]]:
    """For each second: the tokens that arrived, and the requests that wait or run at its end."""
    seconds = math.floor(duration_s) + 1
    waiting, running = [0] * seconds, [0] * seconds
    levels, second = [0, 0], 0
    for time_s, more_waiting, more_running in [*_level_changes(records), (math.inf, 0, 0)]:
        while second < seconds and second + 1 < time_s:
            waiting[second], running[second] = levels
            second += 1
        levels = [levels[0] + more_waiting, levels[1] + more_running]
    tokens = _tokens_per_s(records, duration_s)
    return {"output_tokens_per_s": tokens, "waiting": list(map(float, waiting)), "running": list(map(float, running))}


def _requests(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One column per property of a request; times are in ms."""

    def ms(value_s: float | None) -> float | None:
        return None if value_s is None else round(value_s * 1000, 3)

    return {
        "scheduled_ms": [ms(r.scheduled_s) for r in records],
        "sent_ms": [ms(r.sent_s) for r in records],
        "ttft_ms": [ms(r.ttft_s) if r.is_ok else None for r in records],
        "tpot_ms": [ms(r.tpot_s) if r.is_ok else None for r in records],
        "e2el_ms": [ms(r.e2el_s) if r.is_ok else None for r in records],
        "num_input": [r.num_input for r in records],
        "num_output": [r.num_output for r in records],
        "model": [r.model for r in records],
        "status": [r.status for r in records],
    }
