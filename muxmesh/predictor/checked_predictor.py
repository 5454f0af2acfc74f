"""A length predictor behind checks: what it returns is used only while it is finite and ranks outputs by length.

A predictor may raise, return NaN or rank no better than chance. Then every output of a model is forecast at the mean
length of that model, and with the same work for all (`router.expected_work`) the queue is served in order of arrival.
The predictor is still called and its rank correlation still measured, so that it is used again once it ranks. The mean
length is a geometric mean: lengths are averaged as logarithms.

A client's length hint weighs as much as that tenant's earlier hints were accurate. A predictor that hangs is the
caller's business (`router.daemon_thread`).
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
from muxmesh.predictor.length_predictor import COLD_TOKENS, Fitted, Predictor, RawPrediction, Refit
from muxmesh.predictor.rank_correlation import kendall_tau
from muxmesh.predictor.retrieval import LengthStats
from muxmesh.running_mean import RunningMean
from muxmesh.types import LengthPrediction

_log = logging.getLogger(__name__)

FLOOR_TAU = 0.05
"""Predictions whose tau (rank correlation with the lengths) is lower are not used."""
_RESUME_TAU = 0.15
"""Predictions that were not used are used again from this tau on."""
_WINDOW = 256
_MIN_OUTPUTS = 100
_CHECK_EVERY = 16
_DEFAULT_VARIANCE = 0.7
"""Squared error of a log length that is forecast at the mean."""
_MAX_TOKENS = 1e6
_MAX_TENANTS = 10_000
_MIN_HINTS = 4
_RATE = 0.03

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class CheckedPrediction:
    """A prediction that is safe to use.

    ``source`` is that of the raw prediction, or `hint`, `floor` (predictions do not rank) or `failed`. ``raw`` is None
    if the predictor failed.
    """

    prediction: LengthPrediction
    source: str
    model: str
    tenant: str
    raw: RawPrediction | None
    hint_tokens: int | None


@dataclass(slots=True)
class _ModelCheck:
    """How well the predictions for one model have ranked.

    ``predicted`` and ``actual`` are log lengths of the latest outputs, ``variance`` is the mean squared difference.
    ``constant_tokens`` is the forecast of every output while predictions do not rank, ``failed_tokens`` that of every
    output while the predictor fails; None otherwise. Neither follows the mean length: requests that arrived when it was
    shorter would be served first.
    """

    predicted: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    actual: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    stats: LengthStats = field(default_factory=LengthStats)
    variance: float = _DEFAULT_VARIANCE
    since_checked: int = 0
    tau: float = 1.0
    constant_tokens: float | None = None
    failed_tokens: float | None = None

    def mean_tokens(self) -> float:
        """Geometric mean of the lengths."""
        return math.exp(self.stats.mean) if self.stats.count else COLD_TOKENS


class CheckedPredictor:
    """Owns the checks on one predictor, and is its only caller. Called from one thread, except `mean_prediction`."""

    def __init__(self, predictor: Predictor, floor_tau: float = FLOOR_TAU) -> None:
        self._predictor = predictor
        self._floor_tau = floor_tau
        self._checks: dict[str, _ModelCheck] = {}
        self._hint_errors: OrderedDict[str, RunningMean] = OrderedDict()
        """Tenant → mean squared error of the logarithm of its hints; the tenant with the latest hint last."""
        self.num_failures = 0

    def tau(self, model: str) -> float | None:
        """Kendall's tau over the latest outputs of a model; None if there are too few."""
        check = self._checks.get(model)
        return check.tau if check and len(check.predicted) >= _MIN_OUTPUTS else None

    def is_ranking(self, model: str) -> bool:
        """False while the predictions for a model are not used, because they do not rank."""
        check = self._checks.get(model)
        return check is None or check.constant_tokens is None

    def mean_prediction(self, model: str) -> LengthPrediction:
        """The forecast of an output for which there is no prediction: the mean length. From any thread."""
        check = self._checks.get(model)
        if check is None:
            return _with_default_spread(COLD_TOKENS)
        return _with_default_spread(check.constant_tokens or check.failed_tokens or check.mean_tokens())

    def predict(self, text: str, model: str, tenant: str = "", hint_tokens: int | None = None) -> CheckedPrediction:
        """Predicts the length of one output. Never raises. ``tenant`` enters `dump`: it is no secret of the client."""
        return self._checked(self._predict_raw(text, model, tenant), model, tenant, hint_tokens)

    def observe(self, checked: CheckedPrediction, num_tokens: int, censored: bool) -> None:
        """Learns the length of an output. ``censored``: it was cut off there, and would have been longer. Never raises.

        A censored length is no evidence about ranks, and evidence against a hint only if it is longer than the hint.
        """
        log_length = math.log(max(1, num_tokens))
        raw, model, hint_tokens = checked.raw, checked.model, checked.hint_tokens
        if raw is not None:
            self._fail_open("observing", lambda: self._predictor.observe(raw, model, num_tokens, censored), None)
        if hint_tokens and (not censored or log_length > math.log(hint_tokens)):
            self._hint_error_of(checked.tenant).add((math.log(hint_tokens) - log_length) ** 2)
        if censored:
            return
        check = self._checks.setdefault(model, _ModelCheck())
        check.stats.add(log_length)
        if raw is not None and raw.source not in ("cold", "median"):
            self._check_rank(check, math.log(min(raw.p50_tokens, _MAX_TOKENS)), log_length)

    def refit(self) -> Refit | None:
        """See `Learner`. Never raises."""
        return self._fail_open("preparing a fit", self._predictor.refit, None)

    def publish(self, fitted: Fitted | None) -> bool:
        """See `Learner`. Never raises."""
        return self._fail_open("publishing a fit", lambda: self._predictor.publish(fitted), False)

    def dump(self) -> dict[str, Any]:
        """The state of the checks as JSON values."""
        models = {
            model: {
                "predicted": list(check.predicted),
                "actual": list(check.actual),
                "stats": astuple(check.stats),
                "variance": check.variance,
                "since_checked": check.since_checked,
                "tau": check.tau,
                "constant_tokens": check.constant_tokens,
                "failed_tokens": check.failed_tokens,
            }
            for model, check in self._checks.items()
        }
        return {"models": models, "hint_errors": {name: (e.mean, e.count) for name, e in self._hint_errors.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Replaces the state by what `dump` returned.

        Raises ValueError, KeyError, TypeError or AttributeError, and then changes nothing, if the argument is no such
        value.
        """
        checks = {}
        for model, values in state["models"].items():
            constant_tokens, failed_tokens = values["constant_tokens"], values["failed_tokens"]
            check = checks[model] = _ModelCheck(
                stats=LengthStats.from_fields(values["stats"]),
                variance=_finite(values["variance"]),
                since_checked=int(values["since_checked"]),
                tau=_finite(values["tau"]),
                constant_tokens=None if constant_tokens is None else _positive(constant_tokens),
                failed_tokens=None if failed_tokens is None else _positive(failed_tokens),
            )
            check.predicted.extend(map(_finite, values["predicted"]))
            check.actual.extend(map(_finite, values["actual"]))
        hint_errors = OrderedDict(
            (tenant, RunningMean(_RATE, _finite(mean), int(count)))
            for tenant, (mean, count) in state["hint_errors"].items()
        )
        self._checks, self._hint_errors = checks, hint_errors

    def _predict_raw(self, text: str, model: str, tenant: str) -> RawPrediction | None:
        """The prediction of the predictor; None if it raises or returns no positive, finite lengths."""

        def usable() -> RawPrediction | None:
            raw = self._predictor.predict(text, model, tenant)
            is_length = all(math.isfinite(value) and value > 0 for value in (raw.p50_tokens, raw.p90_tokens))
            self.num_failures += not is_length
            return raw if is_length else None

        return self._fail_open("predicting", usable, None)

    def _checked(
        self, raw: RawPrediction | None, model: str, tenant: str, hint_tokens: int | None
    ) -> CheckedPrediction:
        check = self._checks.setdefault(model, _ModelCheck())
        p50_tokens, p90_tokens, source = self._unhinted(check, raw)
        if hint_tokens and (weight := self._hint_weight(tenant, check)):
            factor = (hint_tokens / p50_tokens) ** weight
            p50_tokens, source = p50_tokens * factor, "hint"
            p90_tokens = None if p90_tokens is None else p90_tokens * factor
        if p90_tokens is None:
            prediction = _with_default_spread(p50_tokens)
        else:
            prediction = LengthPrediction(p50_tokens, max(p50_tokens, min(p90_tokens, _MAX_TOKENS)))
        return CheckedPrediction(prediction, source, model, tenant, raw, hint_tokens)

    @staticmethod
    def _unhinted(check: _ModelCheck, raw: RawPrediction | None) -> tuple[float, float | None, str]:
        """Median, 0.9 quantile and source before the hint; the quantile is None for the default spread."""
        if raw is None:
            check.failed_tokens = check.failed_tokens or check.mean_tokens()
            return check.failed_tokens, None, "failed"
        if check.constant_tokens is not None:
            return check.constant_tokens, None, "floor"
        check.failed_tokens = None
        return min(raw.p50_tokens, _MAX_TOKENS), raw.p90_tokens, raw.source

    def _check_rank(self, check: _ModelCheck, predicted: float, actual: float) -> None:
        check.predicted.append(predicted)
        check.actual.append(actual)
        check.variance += _RATE * ((predicted - actual) ** 2 - check.variance)
        check.since_checked += 1
        if len(check.predicted) < _MIN_OUTPUTS or check.since_checked < _CHECK_EVERY:
            return
        check.since_checked = 0
        check.tau = kendall_tau(np.array(check.predicted), np.array(check.actual))
        if check.constant_tokens is None and check.tau < self._floor_tau:
            check.constant_tokens = check.mean_tokens()
            _log.warning("predictions do not rank (tau %.2f): they are not used", check.tau)
        elif check.constant_tokens is not None and check.tau >= max(_RESUME_TAU, self._floor_tau):
            check.constant_tokens = None
            _log.warning("predictions rank again (tau %.2f): they are used", check.tau)

    def _hint_weight(self, tenant: str, check: _ModelCheck) -> float:
        """Weight of a hint beside the prediction, by inverse variances.

        It is 0 until the tenant has given a few hints, and while their squared error is twice that of the predictions.
        """
        hint_error = self._hint_errors.get(tenant)
        if hint_error is None or hint_error.count < _MIN_HINTS:
            return 0.0
        own = check.variance if check.constant_tokens is None else _DEFAULT_VARIANCE
        return own / (own + hint_error.mean) if hint_error.mean < 2 * own else 0.0

    def _hint_error_of(self, tenant: str) -> RunningMean:
        hint_error = self._hint_errors.setdefault(tenant, RunningMean(_RATE))
        self._hint_errors.move_to_end(tenant)
        if len(self._hint_errors) > _MAX_TENANTS:
            self._hint_errors.popitem(last=False)
        return hint_error

    def _fail_open(self, doing: str, function: Callable[[], _Result], default: _Result) -> _Result:
        """The result of ``function``, or ``default`` if it raises: a predictor must not cost a request."""
        try:
            return function()
        except Exception:
            self.num_failures += 1
            if self.num_failures & (self.num_failures - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                _log.exception("the length predictor failed while %s (failure %d)", doing, self.num_failures)
            return default


def _with_default_spread(p50_tokens: float) -> LengthPrediction:
    p90_tokens = p50_tokens * math.exp(FIRST_BOUND * math.sqrt(_DEFAULT_VARIANCE))
    return LengthPrediction(p50_tokens, max(p50_tokens, min(p90_tokens, _MAX_TOKENS)))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    return float(value)


def _positive(value: float) -> float:
    if not _finite(value) > 0:
        raise ValueError(f"{value} is not positive")
    return float(value)
