"""The length predictor: what is retrieved and what is regressed, joined, with a bound; learns from every answer.

ALISE (Zhao et al. 2024) looks for similar prompts first and falls back to a regression. Here both always speak and are
weighed by how much they know: the regression is the prior, answers to prompts that read alike are observations.
Lengths are logarithms, standardised for each model, so what one model answered tells of every other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from statistics import NormalDist
from typing import Protocol

import numpy as np

from muxmesh.predictor.conformal_bound import ConformalBound
from muxmesh.predictor.prompt_features import Reader, Reading
from muxmesh.predictor.rank_correlation import kendall_tau
from muxmesh.predictor.regression import Examples, Fit, fit
from muxmesh.predictor.retrieval import History

FIT_ROWS = 2048
_FIRST_FIT = 32
_REFIT_EVERY = 32
_REFIT_SHARE = 1 / 12
_PRIOR_VARIANCE = 0.4
_ANSWER_VARIANCE = 0.4
_TIE = 0.02
_DEVIATION_OF_MEAN_ERROR = math.sqrt(math.pi / 2)
COLD_TOKENS = 128.0
"""What an answer is expected to be where nothing is known."""
_COLD_SPREAD = 1.0
_TELLS_NOTHING = -1.0
"""In spreads: five in six answers get longer than this, so that one was cut off there is no news."""
_MOST_TOKENS = 1e6
_UNIT = NormalDist()


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """A prediction, and what is needed to learn from how it turned out. Lengths in tokens."""

    p50_tokens: float
    p90_tokens: float
    source: str
    """`retrieved`, `regressed`, `typical` (of the model), or `cold` before the first answer."""
    reading: Reading
    prompt_hash: int
    log_spread: float
    bound: float
    middle: float = 0.0
    """What was added to the mean, in spreads, to get to the median."""


class Learner(Protocol):
    """Whatever learns by fits. `fit_now` does both halves of that at once."""

    def refit(self) -> Refit | None:
        """Work that is due, for any thread, if there is any."""

    def publish(self, fitted: Fitted | None) -> bool:
        """Takes the outcome of that work, None if it failed; False if what is there now ranks better."""


class Predictor(Learner, Protocol):
    """Whatever guesses lengths. May raise, and say nonsense: `CheckedPredictor` stands before it."""

    def predict(self, text: str, model: str) -> Guess:
        """A guess for one answer."""

    def observe(self, guess: Guess, model: str, num_tokens: int, censored: bool) -> None:
        """How a guess turned out. ``censored``: the answer was cut off there, it would have been longer."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The outcome of a `Refit`."""

    fit: Fit
    num_rows: int
    tau: float
    published_tau: float


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """A fit to be made, of values nobody changes. The last ``num_new`` prompts came after the published fit."""

    examples: Examples
    num_rows: int
    num_new: int
    published: Fit | None

    def run(self) -> Fitted:
        """Fits, and compares with the published fit on the later half of what is new: neither has seen it.

        Without that half the fit has what the published one had, and the earlier half besides.
        """
        held_out = min(-(-self.num_new // 2), len(self.examples) // 2)
        fitted, expected = fit(self.examples, held_out)
        if self.published is None or held_out == 0:
            return Fitted(fitted, self.num_rows, 1.0, 0.0)
        examples, targets = self.examples, self.examples.targets[-held_out:]
        readings = zip(examples.lexical[-held_out:], examples.words[-held_out:], strict=True)
        before = np.array([self.published.predict(Reading(*one))[0] for one in readings])
        return Fitted(fitted, self.num_rows, kendall_tau(expected, targets), kendall_tau(before, targets))


class LengthPredictor:
    """See the head of this file. Called from one thread; `Refit.run` may be called from another."""

    def __init__(self, capacity: int = 4096, fit_rows: int = FIT_ROWS) -> None:
        """``capacity``: prompts that are remembered; ``fit_rows``: the latest of them are learned from."""
        self._reader = Reader()
        self.history = History(capacity)
        self.conformal = ConformalBound()
        self._fit_rows = fit_rows
        self._middles: dict[str, ConformalBound] = {}
        self._fit: Fit | None = None
        self._fitted_at = 0
        self._published_rows = 0
        self._refitting = False
        self.num_published = 0
        self.num_rejected = 0

    def predict(self, text: str, model: str) -> Guess:
        """See `Predictor`."""
        reading, prompt_hash = self._reader.read(text), _hash(text)
        if self.history.num_observed == 0:
            bound = self.conformal.bound
            p90_tokens = COLD_TOKENS * math.exp(bound * _COLD_SPREAD)
            return Guess(COLD_TOKENS, p90_tokens, "cold", reading, prompt_hash, _COLD_SPREAD, bound)
        place, spread, source = 0.0, 1.0, "typical"
        if self._fit is not None:
            (place, spread), source = self._fit.predict(reading), "regressed"
        if neighbours := self.history.neighbours(reading):
            weight = _PRIOR_VARIANCE / (_PRIOR_VARIANCE + _ANSWER_VARIANCE / neighbours.num_answers)
            place, source = (1 - weight) * place + weight * neighbours.mean, "retrieved"
            spread *= math.sqrt(1 - weight / 2)
        mean, deviation = self.history.scale(model)
        log_spread, middle = spread * deviation, self._middle(model)
        expected = mean + place * deviation + middle.bound * log_spread
        bound = self.conformal.bound
        p50_tokens, p90_tokens = _tokens(expected), _tokens(expected + bound * log_spread)
        return Guess(p50_tokens, p90_tokens, source, reading, prompt_hash, log_spread, bound, middle.bound)

    def observe(self, guess: Guess, model: str, num_tokens: int, censored: bool) -> None:
        """See `Predictor`. A censored length counts as what it would have been on average, given the guess; one that
        is cut off early tells nothing, and would teach the guess itself.
        """
        log_length = math.log(max(1, num_tokens))
        expected = math.log(guess.p50_tokens)
        score = (log_length - expected) / guess.log_spread
        if not censored or score > guess.bound:
            self.conformal.observe(score, guess.bound)
        if not censored or score > 0:
            self._middle(model).observe(score + guess.middle, guess.middle)
        if censored:
            if score < _TELLS_NOTHING:
                return
            deviation = _DEVIATION_OF_MEAN_ERROR * guess.log_spread
            log_length = expected + deviation * _mean_above((log_length - expected) / deviation)
        self.history.add(guess.prompt_hash, guess.reading, model, log_length)

    def scores(self) -> dict[str, list[float]]:
        """What the bounds go by: of p90 under an empty name, of each model's p50 under its own."""
        return {"": self.conformal.scores} | {model: middle.scores for model, middle in self._middles.items()}

    def restore_scores(self, scores: Mapping[str, Iterable[float]]) -> None:
        """Goes on from what `scores` gave."""
        for model, known in scores.items():
            (self._middle(model) if model else self.conformal).restore(known)

    def _middle(self, model: str) -> ConformalBound:
        """The regression gives means of logarithms; half of a model's answers are to be shorter than p50."""
        return self._middles.setdefault(model, ConformalBound(level=0.5, first_bound=0.0))

    def refit(self) -> Refit | None:
        """See `Learner`."""
        num_new = self.history.num_observed - self._fitted_at
        due = _FIRST_FIT if self._fit is None else max(_REFIT_EVERY, self._fitted_at * _REFIT_SHARE)
        if self._refitting or num_new < min(due, self._fit_rows / 8):
            return None
        self._refitting = True
        self._fitted_at = self.history.num_observed
        num_new_rows = self.history.num_rows - self._published_rows
        return Refit(self.history.examples(self._fit_rows), self.history.num_rows, num_new_rows, self._fit)

    def publish(self, fitted: Fitted | None) -> bool:
        """See `Learner`."""
        self._refitting = False
        if fitted is None or fitted.tau < fitted.published_tau - _TIE:
            self.num_rejected += 1
            return False
        self._fit = fitted.fit
        self._published_rows = fitted.num_rows
        self.num_published += 1
        return True


def fit_now(learner: Learner) -> None:
    """Makes a fit that is due, and waits for it. Raises what the fit raises."""
    if refit := learner.refit():
        learner.publish(refit.run())


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _tokens(log_length: float) -> float:
    return min(_MOST_TOKENS, math.exp(min(log_length, 20.0)))


def _mean_above(least: float) -> float:
    """The mean of a standard normal variable that is known to be above ``least``."""
    if least > 6:
        return least + 1 / least
    return _UNIT.pdf(least) / (1 - _UNIT.cdf(least))
