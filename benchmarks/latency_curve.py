"""Curves of mean normalized latency over the request rate: how they are sampled and compared. Pure.

A load is a rate as a fraction of the capacity: the rate that a server sustains while requests wait.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_EXTENSION = 1.35
"""Factor from the highest load to the next one, while the curve is below the level."""
_TAIL = 0.6
"""Part of the time of a longest output at full batch that a run needs once no request waits."""

Bound = Literal["", "at least", "at most", "unknown"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A value, or a bound of it: the curve that it is read from ends before it reaches the level."""

    value: float
    bound: Bound = ""

    def over(self, other: Figure) -> Figure:
        """The quotient. It is a bound if either is one, and ``unknown`` if the two bounds oppose each other."""
        inverse: Bound = {"at least": "at most", "at most": "at least"}.get(other.bound, other.bound)  # type: ignore[assignment]
        bounds = {self.bound, inverse} - {""}
        bound: Bound = bounds.pop() if len(bounds) == 1 else "unknown" if bounds else ""
        return Figure(self.value / other.value, bound)

    def reaches(self, target: float) -> bool | None:
        """Whether the value is at least ``target``; None if the bound leaves that open."""
        if self.value >= target:
            return True if self.bound in ("", "at least") else None
        return False if self.bound in ("", "at most") else None


def rate_at(rates: Sequence[float], latencies: Sequence[float], level: float) -> Figure:
    """The rate at which the latency first exceeds ``level``, by linear interpolation. ``rates`` ascend."""
    above = next((index for index, one in enumerate(latencies) if one > level), None)
    if above is None:
        return Figure(rates[-1], "at least")
    if above == 0:
        return Figure(rates[0], "at most")
    low, high = latencies[above - 1], latencies[above]
    return Figure(rates[above - 1] + (rates[above] - rates[above - 1]) * (level - low) / (high - low))


def next_load(curve: Mapping[float, float], levels: Sequence[float], main_level: float, most: float) -> float:
    """The load to measure next, given the latency at each load so far.

    Loads rise up to ``most`` until the latency exceeds ``main_level``. After that the next load is in the middle of the
    widest interval in which the curve first exceeds a level.
    """
    loads = sorted(curve)
    if max(curve.values()) <= main_level and loads[-1] < most:
        return round(min(most, loads[-1] * _EXTENSION), 3)
    intervals = []
    for level in levels:
        above = next((index for index, load in enumerate(loads) if curve[load] > level), 0)
        if above > 0:
            intervals.append((loads[above - 1], loads[above]))
    low, high = max(intervals or itertools.pairwise(loads), key=lambda interval: interval[1] / interval[0])
    return round((low + high) / 2, 3)


def sustained_requests_per_s(report: Mapping[str, Any], max_num_seqs: int) -> float:
    """The capacity, from the report of a load test that sent all requests at once.

    Tokens per second, from when the batch is first full until no request waits, divided by the mean output length of
    the whole run. The throughput of the whole run, if that time is shorter than 5 s.
    """
    series = report["series"]
    running, waiting = series["running"], series["waiting"]
    first = next((second for second, count in enumerate(running) if count >= max_num_seqs), len(running))
    last = max((second for second, count in enumerate(waiting) if count > 0), default=0)
    tokens = series["output_tokens_per_s"][first + 1 : last + 1]
    if len(tokens) < 5:
        return float(report["request_throughput"])
    return float(statistics.fmean(tokens)) * float(report["completed"] / report["total_output_tokens"])


def arrival_seed(
    counts: Sequence[int], first: int, times_of: Callable[[int, int], Sequence[float]], tolerance: float = 0.03
) -> int:
    """The first seed from ``first`` on with which ``counts`` requests arrive at their nominal rate.

    ``times_of(seed, count)``: the arrival times of that many requests at one per second. The last one must be within
    ``tolerance`` of its expectation, so that a run of a minute offers the load that it is named by. Raises
    StopIteration if none of 10,000 seeds does.
    """
    return next(
        seed
        for seed in range(first, first + 10_000)
        if all(abs(times_of(seed, count)[-1] / (count - 1) - 1) <= tolerance for count in counts)
    )


def run_s(load: float, arrivals_s: float, capacity: float, mean_tokens: float, cap: int, max_num_seqs: int) -> float:
    """Expected seconds of a run: its arrivals, its backlog and the end of its last outputs.

    ``capacity``: requests per second. ``mean_tokens``, ``cap``: mean and maximum output tokens.
    """
    step_s = max_num_seqs / (capacity * mean_tokens)
    return arrivals_s * max(1.0, load) + _TAIL * cap * step_s


def expected_loads(loads: Sequence[float], num_points: int, most: float) -> list[float]:
    """The loads of a system whose curve stays below the level until ``most``, the longest case."""
    expected = list(loads[:num_points])
    while len(expected) < num_points:
        expected.append(min(most, expected[-1] * _EXTENSION))
    return expected
