"""What a run shows of each model: completed requests and tokens per second, SLO attainment, tail latencies. Pure.

Throughputs count what ended inside a window of the run, so that a system that is overloaded and one that is not are
compared over the same time. The SLO of a request at scale s is s times its latency on an idle device (MuxServe,
ICML'24, section 4.1).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from loadtest.record import INTERRUPTED, Record, Run
from loadtest.slo import Unloaded

SCALES = (2, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one system.

    ``per_model``: model → completed requests per second and output tokens per second. ``throughput`` and ``tokens``:
    their means weighted by the rates of the models. ``attainment``: scale → share of the requests of all models;
    ``attainment_of``: the same for each model.
    """

    system: str
    throughput: float
    tokens: float
    per_model: dict[str, dict[str, float]]
    attainment: dict[int, float]
    attainment_of: dict[str, dict[int, float]]
    p99_tpot_s: float
    median_tpot_s: float
    p99_ttft_s: float
    failed: int
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def outcome(
    system: str,
    run: Run,
    rates: Mapping[str, float],
    unloaded: Mapping[str, Unloaded],
    window: tuple[float, float],
) -> Outcome:
    """The figures of a run. ``rates``: of the models. ``window``: [start, end) in seconds from the start of the run.

    Latencies and attainment are those of the requests that were due in the window.
    """
    due = [record for record in run.records if window[0] <= record.scheduled_s < window[1]]
    done = [record for record in due if record.is_ok]
    per_model = {model: _per_second(run.records, model, window) for model in rates}
    tpots = [record.tpot_s for record in done if record.tpot_s is not None]
    failed = [record for record in run.records if not record.is_ok and record.status != INTERRUPTED]
    attained = {
        model: {scale: _attainment(due, unloaded, scale, run.duration_s, model) for scale in SCALES} for model in rates
    }
    return Outcome(
        system=system,
        throughput=weighted({model: one["requests"] for model, one in per_model.items()}, rates),
        tokens=weighted({model: one["tokens"] for model, one in per_model.items()}, rates),
        per_model=per_model,
        attainment={scale: _attainment(due, unloaded, scale, run.duration_s) for scale in SCALES},
        attainment_of=attained,
        p99_tpot_s=percentile(tpots, 99),
        median_tpot_s=percentile(tpots, 50),
        p99_ttft_s=percentile([record.ttft_s for record in done], 99),
        failed=len(failed),
        errors=sorted({f"{record.status}: {record.error}"[:200] for record in failed})[:5],
    )


def weighted(values: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """The mean of the models' values, weighted by their rates."""
    return sum(rates[model] * values[model] for model in rates) / sum(rates.values())


def percentile(values: Sequence[float], percent: float) -> float:
    """0 of no values."""
    return float(np.percentile(values, percent)) if values else 0.0


def median_of(outcomes: Sequence[Outcome], system: str, figure: str) -> float:
    """The median of a figure of a system over the rounds. ``figure``: a field, or ``attainment@SCALE``."""
    name, _, scale = figure.partition("@")
    mine = [getattr(one, name) for one in outcomes if one.system == system]
    return float(statistics.median(one[int(scale)] if scale else one for one in mine))


def median_ratio(outcomes: Sequence[Outcome], system: str, other: str, figure: str) -> float:
    """The median over the rounds of each round's own ratio: the machine's speed changes from round to round."""
    pairs = zip(*([getattr(o, figure) for o in outcomes if o.system == name] for name in (system, other)), strict=True)
    return float(statistics.median(mine / theirs for mine, theirs in pairs))


def of_the_best(attained: Mapping[str, float]) -> float:
    """What `adbs` attains, relative to the best of these modes; 1 if none attains anything."""
    best = max(attained.values())
    return attained["adbs"] / best if best else 1.0


def _per_second(records: Sequence[Record], model: str, window: tuple[float, float]) -> dict[str, float]:
    """Requests that ended in the window, and tokens that arrived in it, per second."""
    start_s, end_s = window
    mine = [record for record in records if record.model == model]
    ended = sum(r.is_ok and r.ended_s is not None and start_s <= r.ended_s < end_s for r in mine)
    tokens = sum(count for r in mine for at_s, count in r.pieces if start_s <= at_s < end_s)
    return {"requests": ended / (end_s - start_s), "tokens": tokens / (end_s - start_s)}


def _attainment(
    records: Sequence[Record], unloaded: Mapping[str, Unloaded], scale: float, ended_s: float, model: str | None = None
) -> float:
    """Share of the requests within the SLO, among those for which it is known. 0 if there are none.

    A request that was running when the run was stopped missed it if it had been in the system for longer than the SLO
    of a mean request.
    """
    verdicts: list[bool] = []
    for name, own in unloaded.items():
        mine = [record for record in records if record.model == name and model in (None, name)]
        targets_s = {r.index: scale * own.e2el_s(r.num_input, r.num_output) for r in mine if r.is_ok}
        verdicts += [r.e2el_s <= targets_s[r.index] for r in mine if r.is_ok]
        verdicts += [False for r in mine if not r.is_ok and r.status != INTERRUPTED]
        mean_s = statistics.fmean(targets_s.values()) if targets_s else 0.0
        verdicts += [False for r in mine if r.status == INTERRUPTED and ended_s - r.scheduled_s > mean_s]
    return sum(verdicts) / len(verdicts) if verdicts else 0.0
