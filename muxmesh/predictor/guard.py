"""What is believed of a guess: nothing that is no number, nothing that does not rank, of a client's hint what it has
earned.

A predictor may fail, hang (its caller's business), lie or be of no use; then every answer of a model is expected to be
as long as its typical one and, with the same work for all (`router.work`), the order is that of arrival. The guess is
made and watched all the same, so that a predictor that ranks again is used again.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from muxmesh.predictor.history import Scale
from muxmesh.predictor.predictor import Guess, Predictor
from muxmesh.predictor.quality import kendall_tau
from muxmesh.running import RunningMean
from muxmesh.types import LengthPrediction

_log = logging.getLogger(__name__)

FLOOR_TAU = 0.05
_BACK_TAU = 0.15
_WINDOW = 256
_FEWEST = 100
_JUDGE_EVERY = 16
_COLD_TOKENS = 128.0
_TYPICAL_VARIANCE = 0.7
_LONGEST_TOKENS = 1e6
_MOST_TENANTS = 10_000
_UNPROVED = 4
_RATE = 0.03
_UPPER_TIMES = 1.6


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
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
        return math.exp(self.scale.mean) if self.scale.count else _COLD_TOKENS


class Guard:
    """Stands before a predictor. Called from one thread."""

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

    def predict(self, text: str, model: str, tenant: str = "", hint_tokens: int | None = None) -> Judged:
        """Never raises."""
        return self.judge(self.guess(text, model), model, tenant, hint_tokens)

    def guess(self, text: str, model: str) -> Guess | None:
        """What the predictor says, if that can be used at all."""
        try:
            guess = self._predictor.predict(text, model)
            usable = all(math.isfinite(value) and value > 0 for value in (guess.p50_tokens, guess.p90_tokens))
        except Exception:  # fail-open: a predictor must not cost a request
            self._count_failure("predicting")
            return None
        self.num_failures += not usable
        return guess if usable else None

    def judge(self, guess: Guess | None, model: str, tenant: str = "", hint_tokens: int | None = None) -> Judged:
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
            upper = middle * math.exp(_UPPER_TIMES * math.sqrt(_TYPICAL_VARIANCE))
        prediction = LengthPrediction(middle, max(middle, min(upper, _LONGEST_TOKENS)))
        return Judged(prediction, source, model, tenant, guess, hint_tokens)

    def observe(self, judged: Judged, num_tokens: int, censored: bool) -> None:
        """How an answer turned out. ``censored``: it was cut off there and would have been longer. Never raises."""
        length = math.log(max(1, num_tokens))
        if judged.guess is not None:
            try:
                self._predictor.observe(judged.guess, judged.model, num_tokens, censored)
            except Exception:  # fail-open
                self._count_failure("learning")
        if judged.hint_tokens and (not censored or length > math.log(judged.hint_tokens)):
            self._trust_of(judged.tenant).add((math.log(judged.hint_tokens) - length) ** 2)
        if censored:
            return
        rank = self._ranks.setdefault(judged.model, _Rank())
        rank.scale.add(length)
        if judged.guess is not None and judged.guess.source not in ("cold", "typical"):
            self._rank(rank, math.log(min(judged.guess.p50_tokens, _LONGEST_TOKENS)), length)

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
            rank = ranks[model] = _Rank(scale=Scale(*values["scale"]), variance=float(values["variance"]))
            rank.guessed.extend(map(float, values["guessed"]))
            rank.turned_out.extend(map(float, values["turned_out"]))
            rank.tau, rank.constant_tokens = float(values["tau"]), values["constant_tokens"]
        self._trust = OrderedDict((tenant, RunningMean(_RATE, *values)) for tenant, values in known["trust"].items())
        self._ranks = ranks

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

    def _count_failure(self, doing: str) -> None:
        self.num_failures += 1
        if self.num_failures & (self.num_failures - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...: a log is no place for all
            _log.exception("the length predictor failed while %s (failure %d)", doing, self.num_failures)
