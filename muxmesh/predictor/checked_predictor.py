"""A length predictor behind checks: what it returns is used only while it is finite and ranks outputs by length.

A predictor may raise, return NaN or rank no better than chance. Then every output of a model is forecast at the mean
length of that model, and with the same work for all (`router.expected_work`) the queue is served in order of arrival.
The predictor is still called and its rank correlation still measured, so that it is used again once it ranks. A
client's length hint counts as much as that client's earlier hints were right. A predictor that hangs is the caller's
business (`router.daemon_thread`).
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

import numpy as np

from muxmesh.predictor.conformal_bound import FIRST_BOUND
from muxmesh.predictor.length_predictor import COLD_TOKENS, Fitted, Guess, Predictor, Refit
from muxmesh.predictor.rank_correlation import kendall_tau
from muxmesh.predictor.retrieval import Scale
from muxmesh.running_mean import RunningMean
from muxmesh.types import LengthPrediction

_log = logging.getLogger(__name__)

FLOOR_TAU = 0.05
_BACK_TAU = 0.15
_WINDOW = 256
_FEWEST = 100
_JUDGE_EVERY = 16
_TYPICAL_VARIANCE = 0.7
_LONGEST_TOKENS = 1e6
_MOST_TENANTS = 10_000
_UNPROVED = 4
_RATE = 0.03

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class CheckedPrediction:
    """A prediction that can be used. ``source``: of the guess, or `hint`, `floor` (it does not rank), `failed`."""

    prediction: LengthPrediction
    source: str
    model: str
    tenant: str
    guess: Guess | None
    hint_tokens: int | None


@dataclass(slots=True)
class _Rank:
    """How well the guesses for one model have ranked. ``constant_tokens`` stands while they do not, and
    ``failed_tokens`` while there are none: one length for all, or those that came when it was shorter would go first.
    """

    guessed: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    turned_out: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    scale: Scale = field(default_factory=Scale)
    variance: float = _TYPICAL_VARIANCE
    since_judged: int = 0
    tau: float = 1.0
    constant_tokens: float | None = None
    failed_tokens: float | None = None

    def typical_tokens(self) -> float:
        return math.exp(self.scale.mean) if self.scale.count else COLD_TOKENS


class CheckedPredictor:
    """Stands before a predictor, and calls it alone. Called from one thread, but for `typical`."""

    def __init__(self, predictor: Predictor, floor_tau: float = FLOOR_TAU) -> None:
        self._predictor = predictor
        self._floor_tau = floor_tau
        self._ranks: dict[str, _Rank] = {}
        self._trust: OrderedDict[str, RunningMean] = OrderedDict()
        """Of each tenant's hints: mean squared error of their logarithm."""
        self.num_failures = 0

    def tau(self, model: str) -> float | None:
        """Kendall's tau over the last answers of a model; None if there are too few."""
        rank = self._ranks.get(model)
        return rank.tau if rank and len(rank.guessed) >= _FEWEST else None

    def is_ranking(self, model: str) -> bool:
        """False while the guesses for a model are not used."""
        rank = self._ranks.get(model)
        return rank is None or rank.constant_tokens is None

    def typical(self, model: str) -> LengthPrediction:
        """What to expect of an answer of which nothing is guessed. From any thread."""
        rank = self._ranks.get(model)
        if rank is None:
            return _about(COLD_TOKENS)
        return _about(rank.constant_tokens or rank.failed_tokens or rank.typical_tokens())

    def predict(self, text: str, model: str, tenant: str = "", hint_tokens: int | None = None) -> CheckedPrediction:
        """Never raises."""
        return self.judge(self.guess(text, model), model, tenant, hint_tokens)

    def guess(self, text: str, model: str) -> Guess | None:
        """What the predictor says, if that can be used at all."""

        def usable() -> Guess | None:
            guess = self._predictor.predict(text, model)
            is_length = all(math.isfinite(value) and value > 0 for value in (guess.p50_tokens, guess.p90_tokens))
            self.num_failures += not is_length
            return guess if is_length else None

        return self._tried("predicting", usable, None)

    def judge(
        self, guess: Guess | None, model: str, tenant: str = "", hint_tokens: int | None = None
    ) -> CheckedPrediction:
        """What to make of a guess; None: there is none."""
        rank = self._ranks.setdefault(model, _Rank())
        if guess is None:
            rank.failed_tokens = rank.failed_tokens or rank.typical_tokens()
            middle, upper, source = rank.failed_tokens, 0.0, "failed"
        elif rank.constant_tokens is not None:
            middle, upper, source = rank.constant_tokens, 0.0, "floor"
        else:
            middle, upper, source = min(guess.p50_tokens, _LONGEST_TOKENS), guess.p90_tokens, guess.source
            rank.failed_tokens = None
        weight = self._hint_weight(tenant, rank) if hint_tokens else 0.0
        if weight and hint_tokens:
            narrower = (hint_tokens / middle) ** weight
            middle, upper, source = middle * narrower, upper * narrower, "hint"
        if upper == 0.0:
            return CheckedPrediction(_about(middle), source, model, tenant, guess, hint_tokens)
        prediction = LengthPrediction(middle, max(middle, min(upper, _LONGEST_TOKENS)))
        return CheckedPrediction(prediction, source, model, tenant, guess, hint_tokens)

    def observe(self, judged: CheckedPrediction, num_tokens: int, censored: bool) -> None:
        """How an answer turned out. ``censored``: it was cut off there and would have been longer. Never raises."""
        length = math.log(max(1, num_tokens))
        if (guess := judged.guess) is not None:
            self._tried("learning", lambda: self._predictor.observe(guess, judged.model, num_tokens, censored), None)
        if judged.hint_tokens and (not censored or length > math.log(judged.hint_tokens)):
            self._trust_of(judged.tenant).add((math.log(judged.hint_tokens) - length) ** 2)
        if censored:
            return
        rank = self._ranks.setdefault(judged.model, _Rank())
        rank.scale.add(length)
        if judged.guess is not None and judged.guess.source not in ("cold", "typical"):
            self._rank(rank, math.log(min(judged.guess.p50_tokens, _LONGEST_TOKENS)), length)

    def refit(self) -> Refit | None:
        """See `Learner`. Never raises."""
        return self._tried("seeing what to fit", self._predictor.refit, None)

    def publish(self, fitted: Fitted | None) -> bool:
        """See `Learner`. Never raises."""
        return self._tried("taking a fit", lambda: self._predictor.publish(fitted), False)

    def dump(self) -> dict[str, Any]:
        """What is known of guesses and hints, as JSON can say it."""
        ranks = {
            model: {
                "guessed": list(rank.guessed),
                "turned_out": list(rank.turned_out),
                "scale": astuple(rank.scale),
                "variance": rank.variance,
                "tau": rank.tau,
                "constant_tokens": rank.constant_tokens,
            }
            for model, rank in self._ranks.items()
        }
        return {"ranks": ranks, "trust": {tenant: (trust.mean, trust.count) for tenant, trust in self._trust.items()}}

    def load(self, known: Mapping[str, Any]) -> None:
        """Goes on from what `dump` gave. Raises ValueError, KeyError or TypeError if it is something else."""
        ranks = {}
        for model, values in known["ranks"].items():
            rank = ranks[model] = _Rank(scale=Scale.of(values["scale"]), variance=_number(values["variance"]))
            rank.guessed.extend(map(_number, values["guessed"]))
            rank.turned_out.extend(map(_number, values["turned_out"]))
            rank.tau = _number(values["tau"])
            rank.constant_tokens = None if values["constant_tokens"] is None else _number(values["constant_tokens"])
        trust = {
            tenant: RunningMean(_RATE, _number(mean), int(count)) for tenant, (mean, count) in known["trust"].items()
        }
        self._ranks, self._trust = ranks, OrderedDict(trust)

    def _rank(self, rank: _Rank, guessed: float, length: float) -> None:
        rank.guessed.append(guessed)
        rank.turned_out.append(length)
        rank.variance += _RATE * ((guessed - length) ** 2 - rank.variance)
        rank.since_judged += 1
        if len(rank.guessed) < _FEWEST or rank.since_judged < _JUDGE_EVERY:
            return
        rank.since_judged = 0
        rank.tau = kendall_tau(np.array(rank.guessed), np.array(rank.turned_out))
        if rank.constant_tokens is None and rank.tau < self._floor_tau:
            rank.constant_tokens = rank.typical_tokens()
            _log.warning("predictions do not rank (tau %.2f): they are not used", rank.tau)
        elif rank.constant_tokens is not None and rank.tau >= max(_BACK_TAU, self._floor_tau):
            rank.constant_tokens = None
            _log.warning("predictions rank again (tau %.2f)", rank.tau)

    def _hint_weight(self, tenant: str, rank: _Rank) -> float:
        """By inverse variances, and none before a few hints have proved better than twice the guess's own error."""
        trust = self._trust.get(tenant)
        if trust is None or trust.count < _UNPROVED:
            return 0.0
        own = rank.variance if rank.constant_tokens is None else _TYPICAL_VARIANCE
        return own / (own + trust.mean) if trust.mean < 2 * own else 0.0

    def _trust_of(self, tenant: str) -> RunningMean:
        trust = self._trust.setdefault(tenant, RunningMean(_RATE))
        self._trust.move_to_end(tenant)
        if len(self._trust) > _MOST_TENANTS:
            self._trust.popitem(last=False)
        return trust

    def _tried(self, doing: str, function: Callable[[], _Result], otherwise: _Result) -> _Result:
        try:
            return function()
        except Exception:  # fail-open: a predictor must not cost a request
            self.num_failures += 1
            if self.num_failures & (self.num_failures - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                _log.exception("the length predictor failed while %s (failure %d)", doing, self.num_failures)
            return otherwise


def _about(middle_tokens: float) -> LengthPrediction:
    upper_tokens = middle_tokens * math.exp(FIRST_BOUND * math.sqrt(_TYPICAL_VARIANCE))
    return LengthPrediction(middle_tokens, max(middle_tokens, min(upper_tokens, _LONGEST_TOKENS)))


def _number(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    return float(value)
