"""What the runs of `benchmarks.alise` show: curves, rates at equal latency, tails at equal rates. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.latency_curve import Figure, rate_at
from benchmarks.report import Report

MAIN_LEVEL_S = 0.5
LEVELS_S = (0.2, MAIN_LEVEL_S, 1.0)
"""Mean normalized latencies at which rates are compared."""
TAILS = ("p90_ttft_ms", "p99_ttft_ms", "p90_e2el_ms", "p99_e2el_ms")
REQUIRED: Mapping[str, tuple[float, float]] = {"fcfs": (1.5, 1.5), "vllm": (2.5, 3.0)}
"""System → the required ratio of our rate to its rate at `MAIN_LEVEL_S`, and the aim."""
MAX_TAIL, AIMED_TAIL = 1.10, 1.0
"""Of our 99th percentiles compared with those of FCFS."""


@dataclass(frozen=True, slots=True)
class Point:
    """The runs of one system at one rate. ``load``: its rate as a fraction of the capacity of its engine."""

    load: float
    requests_per_s: float
    normalized_s: float
    tails_ms: Mapping[str, float]
    median_ttft_ms: float
    mean_output_tokens: float
    num_completed: int
    num_failed: int

    @classmethod
    def of(cls, load: float, rate: float, report: Mapping[str, Any]) -> Point:
        """From the report of a load test. Raises ZeroDivisionError if no request succeeded."""
        return cls(
            load,
            rate,
            report["mean_normalized_latency_s_per_token"],
            {key: report[key] for key in TAILS},
            report["median_ttft_ms"],
            report["total_output_tokens"] / report["completed"],
            report["completed"],
            report["failed"],
        )

    @classmethod
    def mean(cls, points: Sequence[Point]) -> Point:
        """One point of several runs at the same rate: means of their figures, and all their requests."""
        first = points[0]
        return cls(
            first.load,
            first.requests_per_s,
            statistics.fmean(one.normalized_s for one in points),
            {key: statistics.fmean(one.tails_ms[key] for one in points) for key in first.tails_ms},
            statistics.fmean(one.median_ttft_ms for one in points),
            statistics.fmean(one.mean_output_tokens for one in points),
            sum(one.num_completed for one in points),
            sum(one.num_failed for one in points),
        )


Runs = Mapping[str, Sequence[Point]]
"""The points of each system, the first system being the one that is compared with the others."""


def level_inside(runs: Runs) -> float | None:
    """The level in the middle (geometric mean) of those that all curves have; None if there is none."""
    low = max(min(point.normalized_s for point in points) for points in runs.values())
    high = min(max(point.normalized_s for point in points) for points in runs.values())
    return float(f"{math.sqrt(low * high):.2g}") if low < high else None


def rate_of(points: Sequence[Point], level_s: float) -> Figure:
    """Requests per second at which the mean normalized latency first exceeds ``level_s``."""
    ordered = sorted(points, key=lambda point: point.requests_per_s)
    return rate_at([one.requests_per_s for one in ordered], [one.normalized_s for one in ordered], level_s)


def table(runs: Runs) -> str:
    """A Markdown table of all points."""
    head = (
        "| system, load | requests/s | normalized s/token | median TTFT, s | p90; p99 TTFT, s | p90; p99 latency, s "
        "| mean tokens | completed; failed |"
    )
    rows = [head, "|---" * 8 + "|"]
    for name, points in runs.items():
        for one in sorted(points, key=lambda point: point.load):
            ttft_s, e2el_s = (
                "; ".join(f"{one.tails_ms[f'{percentile}_{metric}_ms'] / 1000:.1f}" for percentile in ("p90", "p99"))
                for metric in ("ttft", "e2el")
            )
            rows.append(
                f"| {name}, {one.load:g} | {one.requests_per_s:.3f} | {one.normalized_s:.3f} "
                f"| {one.median_ttft_ms / 1000:.1f} | {ttft_s} | {e2el_s} "
                f"| {one.mean_output_tokens:.0f} | {one.num_completed}; {one.num_failed} |"
            )
    return "\n".join(rows)


def judged(report: Report, runs: Runs, about: Mapping[str, Any]) -> None:
    """Replaces the figures and bars of the report. ``about``: further figures, such as the minutes of a run.

    Every system needs at least one point.
    """
    mine, *others = runs
    report.figures = {
        **about,
        "loads": {name: [point.load for point in points] for name, points in runs.items()},
        "requests_per_s": {name: [point.requests_per_s for point in points] for name, points in runs.items()},
        "normalized_s": {name: [point.normalized_s for point in points] for name, points in runs.items()},
        **{key: {name: [point.tails_ms[key] for point in points] for name, points in runs.items()} for key in TAILS},
        "mean_output_tokens": {name: [point.mean_output_tokens for point in points] for name, points in runs.items()},
    }
    report.bars = []
    inside = level_inside(runs)
    levels = sorted({*LEVELS_S, *([] if inside is None else [inside])})
    for name in others:
        for level in levels:
            _compare_rates(report, runs, mine, name, level)
    if "fcfs" in others:
        _compare_tails(report, runs[mine], runs["fcfs"], mine)
    for name, points in runs.items():
        num_failed = sum(point.num_failed for point in points)
        report.bar(f"failed requests, {name}", num_failed, "0", num_failed == 0)


def _compare_rates(report: Report, runs: Runs, mine: str, name: str, level_s: float) -> None:
    ratio = rate_of(runs[mine], level_s).over(rate_of(runs[name], level_s))
    text = f"rate at {level_s:g} s/token, {mine} / {name}" + (f" ({ratio.bound})" if ratio.bound else "")
    required, aim = REQUIRED.get(name, (None, None))
    is_met = None if required is None or level_s != MAIN_LEVEL_S else ratio.reaches(required)
    if is_met is None or aim is None:
        report.bar(text, ratio.value)
        return
    report.bar(text, ratio.value, f"at least {required:g}", is_met, f"at least {aim:g}", bool(ratio.reaches(aim)))


def _compare_tails(report: Report, mine: Sequence[Point], fcfs: Sequence[Point], name: str) -> None:
    """Percentiles at the rates that both have, and the geometric means of their ratios."""
    by_rate = {point.requests_per_s: point for point in fcfs}
    pairs = [(point, by_rate[point.requests_per_s]) for point in mine if point.requests_per_s in by_rate]
    for key in TAILS if pairs else ():
        ratios = [one.tails_ms[key] / other.tails_ms[key] for one, other in pairs]
        for (one, _), ratio in zip(pairs, ratios, strict=True):
            report.bar(f"{key} at load {one.load:g}, {name} / fcfs", ratio)
        mean = statistics.geometric_mean(ratios)
        text = f"{key}, geometric mean over equal rates, {name} / fcfs"
        if key.startswith("p99"):
            report.bar(
                text, mean, f"at most {MAX_TAIL:g}", mean <= MAX_TAIL, f"at most {AIMED_TAIL:g}", mean <= AIMED_TAIL
            )
        else:
            report.bar(text, mean)
