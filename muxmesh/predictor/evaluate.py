"""Measures the predictor on a file of outputs. Prequential: each output is predicted before it is learned.

Consecutive outputs of one prompt, by several models, are all predicted before any of them is learned, so a prompt is
unknown when its length is predicted, unless it occurs again later.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from muxmesh.clock import Clock
from muxmesh.predictor.checked_predictor import CheckedPrediction, CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor, fit_now
from muxmesh.predictor.rank_correlation import Floats, kendall_tau

COVERAGE_WINDOW = 500
COVERAGE_BAND = (0.86, 0.94)


@dataclass(frozen=True, slots=True)
class Item:
    """One output. ``task`` only groups it in the report. ``censored``: cut off at ``num_tokens``."""

    prompt: str
    model: str
    num_tokens: int
    task: str = ""
    censored: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """One output, its prediction, and the seconds that the prediction took."""

    item: Item
    checked: CheckedPrediction
    seconds: float


def replay(items: Iterable[Item], clock: Clock, predictor: LengthPredictor | None = None) -> list[Outcome]:
    """Predicts and learns the outputs in the given order. Refits are run in between, in place."""
    checked_predictor = CheckedPredictor(predictor or LengthPredictor())
    outcomes: list[Outcome] = []
    for _, group in itertools.groupby(items, key=lambda item: item.prompt):
        of_prompt = [_predicted(checked_predictor, item, clock) for item in group]
        for outcome in of_prompt:
            checked_predictor.observe(outcome.checked, outcome.item.num_tokens, outcome.item.censored)
        outcomes += of_prompt
        fit_now(checked_predictor)
    return outcomes


def _predicted(predictor: CheckedPredictor, item: Item, clock: Clock) -> Outcome:
    started_at_s = clock.monotonic_s()
    checked = predictor.predict(item.prompt, item.model)
    return Outcome(item, checked, clock.monotonic_s() - started_at_s)


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of a replay, at least one outcome, as JSON values.

    They are over the last half, when the predictor has learned; coverage windows are over all but the first. Censored
    outputs count only for the coverage: they would have been the longer ones.
    """
    num_outcomes = len(outcomes)
    late = outcomes[num_outcomes // 2 :]
    lengths = [one.item.num_tokens for one in late if not one.item.censored]
    constant = float(np.median(lengths)) if lengths else 0.0
    return {
        "num_answers": num_outcomes,
        "num_censored": sum(one.item.censored for one in outcomes),
        "num_evaluated": len(lengths),
        "pooled": _figures(late, constant),
        "models": _figures_by(late, lambda one: one.item.model, constant),
        "tasks": _figures_by([one for one in late if one.item.task], lambda one: one.item.task, constant),
        "p90_windows": _coverage_windows(outcomes),
        "predict_ms": {
            f"p{percent}": 1000 * float(np.percentile([one.seconds for one in outcomes], percent))
            for percent in (50, 99)
        },
    }


def _figures_by(
    outcomes: Sequence[Outcome], key: Callable[[Outcome], str], constant: float
) -> dict[str, dict[str, float]]:
    groups = itertools.groupby(sorted(outcomes, key=key), key=key)
    return {name: figures for name, group in groups if (figures := _figures(list(group), constant))}


def _figures(outcomes: Sequence[Outcome], constant: float) -> dict[str, float]:
    """Figures of one group; empty if all its outputs are censored.

    ``mae_median`` and ``mae_constant`` are mean absolute errors of two constant forecasts, which are known only
    afterwards: the median length of this group, and ``constant``, that of all outputs.
    """
    whole = [one for one in outcomes if not one.item.censored]
    if not whole:
        return {}
    actual = np.array([one.item.num_tokens for one in whole], float)
    predicted = np.array([one.checked.prediction.p50_tokens for one in whole])
    return {
        "num": len(whole),
        "tau": tau(predicted, actual),
        "mae": float(np.abs(predicted - actual).mean()),
        "mae_median": float(np.abs(np.median(actual) - actual).mean()),
        "mae_constant": float(np.abs(constant - actual).mean()),
        "p90_coverage": _coverage(outcomes),
        "hit_rate": statistics.fmean(one.checked.source == "retrieved" for one in whole),
        "log_error": float(np.abs(np.log(predicted) - np.log(np.maximum(1, actual))).mean()),
    }


def tau(predicted: Floats, actual: Floats, max_pairs: int = 4000) -> float:
    """Kendall's tau over at most ``max_pairs`` evenly spaced pairs of the values."""
    step = math.ceil(len(actual) / max_pairs)
    return kendall_tau(predicted[::step], actual[::step])


def _coverage(outcomes: Sequence[Outcome]) -> float:
    """Share of outputs that are no longer than their p90.

    A censored output is taken to be like those that got as far relative to their p90 (the product-limit estimate,
    Kaplan and Meier 1958). Without censored outputs the share is exact.
    """
    relative = np.array([one.item.num_tokens / one.checked.prediction.p90_tokens for one in outcomes])
    censored = np.array([one.item.censored for one in outcomes])
    order = np.lexsort((censored, relative))
    goes_on = 1 - ~censored[order] / np.arange(len(outcomes), 0, -1)
    return round(1 - float(np.prod(goes_on[relative[order] <= 1])), 9)  # rounding makes the share exact


def _coverage_windows(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    starts = range(COVERAGE_WINDOW, len(outcomes) - COVERAGE_WINDOW + 1, COVERAGE_WINDOW)
    shares = [_coverage(outcomes[start : start + COVERAGE_WINDOW]) for start in starts]
    if not shares:
        return {"num": 0}
    low, high = COVERAGE_BAND
    within = sum(low <= share <= high for share in shares) / len(shares)
    return {"num": len(shares), "within_band": within, "lowest": min(shares), "highest": max(shares)}
