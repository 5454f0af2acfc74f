"""How good is the predictor on a file of answers? Prequential: every answer is predicted before it is learned from.

Answers to one prompt that follow each other, one for each model, are all predicted before any of them is learned, so
that no prompt is known when it is asked about, unless it comes again later.
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
    """One answer. ``task`` is only for the report. ``censored``: cut off there, so it is longer."""

    prompt: str
    model: str
    num_tokens: int
    task: str = ""
    censored: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer, what was predicted, and the seconds that took."""

    item: Item
    judged: CheckedPrediction
    seconds: float


def replay(items: Iterable[Item], clock: Clock, predictor: LengthPredictor | None = None) -> list[Outcome]:
    """Predicts and learns, in the order given; refits happen in between, at once."""
    predictor = predictor or LengthPredictor()
    guard = CheckedPredictor(predictor)
    outcomes: list[Outcome] = []
    for _, group in itertools.groupby(items, key=lambda item: item.prompt):
        fresh = [_predicted(guard, item, clock) for item in group]
        for outcome in fresh:
            guard.observe(outcome.judged, outcome.item.num_tokens, outcome.item.censored)
        outcomes += fresh
        fit_now(guard)
    return outcomes


def _predicted(guard: CheckedPredictor, item: Item, clock: Clock) -> Outcome:
    started_at_s = clock.monotonic_s()
    judged = guard.predict(item.prompt, item.model)
    return Outcome(item, judged, clock.monotonic_s() - started_at_s)


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of a replay, over its last half, when something was known; coverage windows over all but the first.

    They are of answers that ended, but for the coverage: those that were cut off would have been the longer ones.
    """
    num_answers = len(outcomes)
    late = outcomes[num_answers // 2 :]
    ended = [one.item.num_tokens for one in late if not one.item.censored]
    constant = float(np.median(ended)) if ended else 0.0
    return {
        "num_answers": num_answers,
        "num_censored": sum(one.item.censored for one in outcomes),
        "num_evaluated": len(ended),
        "pooled": _figures(late, constant),
        "models": _by(late, lambda one: one.item.model, constant),
        "tasks": _by([one for one in late if one.item.task], lambda one: one.item.task, constant),
        "p90_windows": _coverage_windows(outcomes),
        "predict_ms": {
            f"p{share}": 1000 * float(np.percentile([one.seconds for one in outcomes], share)) for share in (50, 99)
        },
    }


def _by(outcomes: Sequence[Outcome], key: Callable[[Outcome], str], constant: float) -> dict[str, dict[str, float]]:
    groups = itertools.groupby(sorted(outcomes, key=key), key=key)
    return {name: found for name, group in groups if (found := _figures(list(group), constant))}


def _figures(outcomes: Sequence[Outcome], constant: float) -> dict[str, float]:
    """``mae_median``: of always saying the median of these answers, and ``mae_constant``: that of all answers, neither
    of which anybody knows beforehand.
    """
    ended = [one for one in outcomes if not one.item.censored]
    if not ended:
        return {}
    actual = np.array([one.item.num_tokens for one in ended], float)
    guessed = np.array([one.judged.prediction.p50_tokens for one in ended])
    return {
        "num": len(ended),
        "tau": tau(guessed, actual),
        "mae": float(np.abs(guessed - actual).mean()),
        "mae_median": float(np.abs(np.median(actual) - actual).mean()),
        "mae_constant": float(np.abs(constant - actual).mean()),
        "p90_coverage": _coverage(outcomes),
        "hit_rate": statistics.fmean(one.judged.source == "retrieved" for one in ended),
        "log_error": float(np.abs(np.log(guessed) - np.log(np.maximum(1, actual))).mean()),
    }


def tau(guessed: Floats, actual: Floats, most: int = 4000) -> float:
    """Kendall's tau, over an even selection of at most ``most`` pairs of values."""
    step = math.ceil(len(actual) / most)
    return kendall_tau(guessed[::step], actual[::step])


def _coverage(outcomes: Sequence[Outcome]) -> float:
    """Share of answers no longer than their p90. Of one that was cut off it is not known; it is taken to be like those
    that got as far beside their p90 (the product-limit estimate, Kaplan and Meier 1958).
    """
    used = np.array([one.item.num_tokens / one.judged.prediction.p90_tokens for one in outcomes])
    cut = np.array([one.item.censored for one in outcomes])
    order = np.lexsort((cut, used))
    goes_on = 1 - ~cut[order] / np.arange(len(outcomes), 0, -1)
    return round(1 - float(np.prod(goes_on[used[order] <= 1])), 9)  # whole answers: exactly their share


def _coverage_windows(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    starts = range(COVERAGE_WINDOW, len(outcomes) - COVERAGE_WINDOW + 1, COVERAGE_WINDOW)
    shares = [_coverage(outcomes[start : start + COVERAGE_WINDOW]) for start in starts]
    if not shares:
        return {"num": 0}
    low, high = COVERAGE_BAND
    within = sum(low <= share <= high for share in shares) / len(shares)
    return {"num": len(shares), "within_band": within, "lowest": min(shares), "highest": max(shares)}
