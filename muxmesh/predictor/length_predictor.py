"""The length predictor: a regression and the retrieval of similar prompts, combined, with a bound on the error.

ALISE (Zhao et al. 2024) retrieves similar prompts first and falls back to a regression. Here the regression is the
prior, outputs of similar prompts are observations, and both are weighed by their variances. Lengths are logarithms,
standardised for each model, so that outputs of one model are evidence for every other. The predictor learns online,
from each output when it ends. Outputs of similar prompts are those of the same tenant; what it learned from one tenant
shows to another only as a part of the regression and of a model's median length. It knows no time budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from muxmesh.predictor.conformal_bound import ConformalBound
from muxmesh.predictor.prompt_features import FeatureExtractor, PromptFeatures
from muxmesh.predictor.rank_correlation import kendall_tau, tau_deviation
from muxmesh.predictor.regression import Examples, Fit, fit
from muxmesh.predictor.retrieval import History

CAPACITY = 4096
"""Prompts that are kept."""
FIT_ROWS = 2048
_FIRST_FIT = 32
_REFIT_EVERY = 32
_REFIT_FRACTION = 1 / 12
"""A refit is due after this fraction of the outputs that the last one saw, but not before ``_REFIT_EVERY``."""
_PRIOR_VARIANCE = 0.4
_OUTPUT_VARIANCE = 0.4
_MAX_TAU_LOSS = 0.02
"""A fit is published though its tau is lower than the published one's by this much, or by the standard deviation that
tau has by chance over the prompts on which both are compared: a fit of more outputs is better unless it is shown to be
worse."""
_DEVIATION_OF_MEAN_ERROR = math.sqrt(math.pi / 2)
"""Standard deviation of a normal variable over its mean absolute error."""
COLD_TOKENS = 128.0
"""Predicted median before the first output."""
_COLD_SPREAD = 1.0
_REGRESSED = ("regressed", "retrieved")
"""Sources of predictions that begin with the regression. `retrieved` does so from the first fit on."""
_MAX_SHIFT, _MAX_SCORE = 1.5, 6.0
"""Bounds of one output's evidence on the median's shift and on the 0.9 quantile. Scores are relative to the spread of
the past: after a time of nearly equal lengths, the first others have scores of 20 and more."""
_MIN_CENSORED_SCORE = -1.0
"""Below this score, about five in six outputs are longer, so a censored length carries no information."""
_MAX_TOKENS = 1e6
_MAX_LOG_LENGTH = 20.0
_UNIT_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, eq=False)
class RawPrediction:
    """A prediction as the predictor made it, with what `Predictor.observe` needs. Lengths are in tokens."""

    p50_tokens: float
    p90_tokens: float
    source: str
    """`retrieved`, `regressed`, `median` (the model's median length), or `cold`: no output of the tenant has ended
    yet, and at most a few of others."""
    features: PromptFeatures
    prompt_hash: int
    log_spread: float
    """Predicted mean absolute error of the log length."""
    bound: float
    """p90 over p50, in logarithms and in units of ``log_spread``."""
    median_shift: float = 0.0
    """Median of the log length less its predicted mean, in units of ``log_spread``."""
    tenant_id: int = 0


class Learner(Protocol):
    """Learns by fits that may run in another thread. `fit_now` runs one in place."""

    def refit(self) -> Refit | None:
        """The fit that is due, to be run in any thread; None if none is due or one is running."""

    def publish(self, fitted: Fitted | None) -> bool:
        """Takes the outcome of that fit, None if it failed. False: the fit ranks worse, and is not used."""


class Predictor(Learner, Protocol):
    """Predicts lengths. It may raise or return values that are no lengths: `CheckedPredictor` handles both."""

    def predict(self, text: str, model: str, tenant: str = "") -> RawPrediction:
        """Predicts the length of one output. ``tenant``: any name of the tenant that is the same each time."""

    def observe(self, raw: RawPrediction, model: str, num_tokens: int, censored: bool) -> None:
        """Learns the length of an output. ``censored``: it was cut off there, and would have been longer."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The outcome of a `Refit`, with tau of it and of the published fit on the same ``num_held_out`` prompts."""

    fit: Fit
    num_rows: int
    tau: float
    published_tau: float
    num_held_out: int

    @property
    def is_worse(self) -> bool:
        """Whether it ranks worse than the published fit, by more than chance explains."""
        return self.tau < self.published_tau - max(_MAX_TAU_LOSS, tau_deviation(self.num_held_out))


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """A fit to be made, of values that do not change. The last ``num_new`` prompts came after the published fit."""

    examples: Examples
    num_rows: int
    num_new: int
    published: Fit | None

    def run(self) -> Fitted:
        """Fits, and compares with the published fit on the later half of the new prompts.

        Neither has seen those: the fit that is compared lacks their targets. It has the earlier half of the new prompts
        more than the published one.
        """
        held_out = min(-(-self.num_new // 2), len(self.examples) // 2)
        fitted, expected = fit(self.examples, held_out)
        if self.published is None or held_out == 0:
            return Fitted(fitted, self.num_rows, 1.0, 0.0, held_out)
        examples, targets = self.examples, self.examples.targets[-held_out:]
        features = zip(examples.lexical[-held_out:], examples.words[-held_out:], strict=True)
        before = np.array([self.published.predict(PromptFeatures(*one))[0] for one in features])
        taus = kendall_tau(expected, targets), kendall_tau(before, targets)
        return Fitted(fitted, self.num_rows, *taus, held_out)


class LengthPredictor:
    """Implements `Predictor`. Called from one thread; only `Refit.run` may be called from another."""

    def __init__(self, capacity: int = CAPACITY, fit_rows: int = FIT_ROWS) -> None:
        """``capacity``: prompts that are kept. ``fit_rows``: the latest of them are fitted."""
        self._extractor = FeatureExtractor()
        self.history = History(capacity)
        self.conformal = ConformalBound()
        self._fit_rows = fit_rows
        self._median_shifts: dict[str, ConformalBound] = {}
        self._fit: Fit | None = None
        self._num_observed_at_fit = self._num_observed_before_fit = 0
        self._published_rows = 0
        self._refitting = False
        self.num_published = 0
        self.num_rejected = 0

    def predict(self, text: str, model: str, tenant: str = "") -> RawPrediction:
        features, tenant_id = self._extractor.extract(text), _hash(tenant) if tenant else 0
        prompt_hash = _hash(text, tenant_id)
        bound = self.conformal.bound
        if self.history.is_cold(tenant_id):
            p90_tokens, spread = COLD_TOKENS * math.exp(bound * _COLD_SPREAD), _COLD_SPREAD
            return RawPrediction(
                COLD_TOKENS, p90_tokens, "cold", features, prompt_hash, spread, bound, tenant_id=tenant_id
            )
        standard_mean, spread, source = 0.0, 1.0, "median"
        if self._fit is not None:
            (standard_mean, spread), source = self._fit.predict(features, tenant_id), "regressed"
        if neighbours := self.history.neighbours(features, tenant_id):
            weight = _PRIOR_VARIANCE / (_PRIOR_VARIANCE + _OUTPUT_VARIANCE / neighbours.num_outputs)
            standard_mean, source = (1 - weight) * standard_mean + weight * neighbours.mean, "retrieved"
            spread *= math.sqrt(1 - weight / 2)
        mean, deviation = self.history.scale(model)
        log_spread, median_shift = spread * deviation, self._median_shift(model).bound
        log_median = mean + standard_mean * deviation + median_shift * log_spread
        p50_tokens, p90_tokens = _tokens(log_median), _tokens(log_median + bound * log_spread)
        return RawPrediction(
            p50_tokens, p90_tokens, source, features, prompt_hash, log_spread, bound, median_shift, tenant_id
        )

    def observe(self, raw: RawPrediction, model: str, num_tokens: int, censored: bool) -> None:
        """See `Predictor`. A censored length counts as its expected full length, given the prediction.

        A length that is censored early is ignored: its expected full length is the prediction itself.
        """
        log_length = math.log(max(1, num_tokens))
        log_median = math.log(raw.p50_tokens)
        score = (log_length - log_median) / raw.log_spread
        if not censored or score > raw.bound:
            self.conformal.observe(min(score, _MAX_SCORE), raw.bound)
        is_regressed = raw.source in _REGRESSED
        if is_regressed == (self._fit is not None) and (not censored or score > 0):
            shift = max(-_MAX_SHIFT, min(score + raw.median_shift, _MAX_SHIFT))
            self._median_shift(model).observe(shift, raw.median_shift)
        if censored:
            if score < _MIN_CENSORED_SCORE:
                return
            deviation = _DEVIATION_OF_MEAN_ERROR * raw.log_spread
            log_length = log_median + deviation * _normal_mean_above((log_length - log_median) / deviation)
        self.history.add(raw.prompt_hash, raw.features, model, log_length, raw.tenant_id)

    @property
    def fit(self) -> Fit | None:
        """The published fit."""
        return self._fit

    def dump(self) -> dict[str, Any]:
        """The state beside `history` and `fit`, as JSON values. A fit that is running counts as not begun."""
        return {
            "conformal": self.conformal.dump(),
            "median_shifts": {model: bound.dump() for model, bound in self._median_shifts.items()},
            "num_observed_at_fit": self._num_observed_before_fit if self._refitting else self._num_observed_at_fit,
            "published_rows": self._published_rows,
            "num_published": self.num_published,
            "num_rejected": self.num_rejected,
        }

    def load(self, state: Mapping[str, Any], fitted: Fit | None) -> None:
        """Replaces the state beside `history` by what `dump` and `fit` returned.

        Raises ValueError, KeyError, TypeError or AttributeError if the arguments are no such values.
        """
        self.conformal.load(state["conformal"])
        for model, bound in state["median_shifts"].items():
            self._median_shift(model).load(bound)
        self._fit = fitted
        self._num_observed_at_fit, self._published_rows = (
            int(state["num_observed_at_fit"]),
            int(state["published_rows"]),
        )
        self.num_published, self.num_rejected = int(state["num_published"]), int(state["num_rejected"])

    def refit(self) -> Refit | None:
        num_new = self.history.num_observed - self._num_observed_at_fit
        due = _FIRST_FIT if self._fit is None else max(_REFIT_EVERY, self._num_observed_at_fit * _REFIT_FRACTION)
        if self._refitting or num_new < min(due, self._fit_rows / 8):
            return None
        self._refitting = True
        self._num_observed_before_fit = self._num_observed_at_fit
        self._num_observed_at_fit = self.history.num_observed
        num_new_rows = self.history.num_rows - self._published_rows
        return Refit(self.history.examples(self._fit_rows), self.history.num_rows, num_new_rows, self._fit)

    def publish(self, fitted: Fitted | None) -> bool:
        self._refitting = False
        if fitted is None or fitted.is_worse:
            self.num_rejected += 1
            return False
        if self._fit is None:  # the shifts so far are errors of the geometric mean, not of a regression
            self._median_shifts.clear()
        self._fit = fitted.fit
        self._published_rows = fitted.num_rows
        self.num_published += 1
        return True

    def _median_shift(self, model: str) -> ConformalBound:
        """The regression predicts means of logarithms; this bound is exceeded by half of the model's outputs."""
        return self._median_shifts.setdefault(model, ConformalBound(level=0.5, first_bound=0.0))


def fit_now(learner: Learner) -> None:
    """Runs and publishes the fit that is due, if there is one. Raises what the fit raises."""
    if refit := learner.refit():
        learner.publish(refit.run())


def _hash(text: str, tenant_id: int = 0) -> int:
    salt = tenant_id.to_bytes(8)
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8, salt=salt).digest())


def _tokens(log_length: float) -> float:
    return min(_MAX_TOKENS, math.exp(min(log_length, _MAX_LOG_LENGTH)))


def _normal_mean_above(least: float) -> float:
    """The mean of a standard normal variable that is known to be above ``least``."""
    if least > 6:  # asymptotic: the density underflows
        return least + 1 / least
    return _UNIT_NORMAL.pdf(least) / (1 - _UNIT_NORMAL.cdf(least))
