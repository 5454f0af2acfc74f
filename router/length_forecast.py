"""Forecasts of output lengths within a time budget. Never delays a request beyond the budget and never refuses one.

The predictor runs in a thread of its own. If it exceeds the budget, the forecast is the mean length of the model, and
the predictor is not called again until it has returned. Fits run in a second thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from muxmesh.clock import Clock
from muxmesh.metrics.family import Histogram
from muxmesh.predictor.checked_predictor import CheckedPrediction, CheckedPredictor
from muxmesh.predictor.length_predictor import Fitted, Refit
from muxmesh.types import SOURCES, LengthPrediction
from router.daemon_thread import DaemonThread
from router.tenant_key import tenant_key

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)

_MAX_PENDING_OBSERVATIONS = 1000
FIT_FRACTION = 0.02
"""The fraction of one core that fits may use."""
LENGTH_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0, 4.0, 10.0)
"""Upper bounds of output lengths divided by the predicted median."""

LOG_ERRORS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0)
"""Upper bounds of the absolute logarithm of these ratios."""
OBSERVED_SOURCES = tuple(source for source in SOURCES if source not in ("fixed", "late"))
"""Sources of forecasts that are compared with the outputs."""


@dataclass(frozen=True, slots=True)
class LengthForecast:
    """The forecast of one output. ``source``: as in `CheckedPrediction`, or ``fixed`` or ``late``.

    ``checked`` is None if the predictor was not called or was late: it does not learn from that output.
    """

    prediction: LengthPrediction
    source: str
    checked: CheckedPrediction | None = None


class LengthForecaster:
    """Owns the thread that predicts and observes, and the thread that fits. Called on one event loop."""

    def __init__(self, predictor: CheckedPredictor, budget_s: float, clock: Clock, tenant_secret: bytes) -> None:
        """``tenant_secret``: see `router.tenant_key`."""
        self._tenant_secret = tenant_secret
        self._clock = clock
        self._next_fit_s = 0.0
        self._predictor = predictor
        self._budget_s = budget_s
        self._predicting = DaemonThread("predict")
        self._fitting = DaemonThread("fit")
        self._late: Future[CheckedPrediction] | None = None
        self._num_pending = 0
        self.num_late = 0
        self._length_ratios: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(LENGTH_RATIOS))
        self._log_errors: defaultdict[tuple[str, str], Histogram] = defaultdict(lambda: Histogram(LOG_ERRORS))

    async def predict(self, text: str, model: str, tenant: str, hint_tokens: int | None) -> LengthForecast:
        """Returns a forecast within the budget. ``hint_tokens``: the client's own estimate of the output length."""
        if self._late is not None and not self._late.done():
            return self._default(model)
        self._late = None
        known_as = tenant_key(self._tenant_secret, tenant)
        future = self._predicting.submit(lambda: self._predictor.predict(text, model, known_as, hint_tokens))
        done, _ = await asyncio.wait([asyncio.wrap_future(future)], timeout=self._budget_s)
        if not done:
            if self.num_late == 0:
                _log.warning(
                    "the length predictor took more than %.0f ms; it is not called again until it has returned",
                    1000 * self._budget_s,
                )
            self._late = future
            return self._default(model)
        if future.cancelled():  # the router is stopping
            return self._default(model)
        checked = future.result()
        return LengthForecast(checked.prediction, checked.source, checked)

    def _default(self, model: str) -> LengthForecast:
        self.num_late += 1
        return LengthForecast(self._predictor.mean_prediction(model), "late")

    def observe(self, forecast: LengthForecast, num_tokens: int, censored: bool) -> None:
        """Reports an output's length to the predictor. Does not block. ``censored``: the output was cut off there."""
        checked = forecast.checked
        if checked is None or num_tokens < 1 or self._num_pending >= _MAX_PENDING_OBSERVATIONS:
            return
        if not censored:
            ratio = num_tokens / forecast.prediction.p50_tokens
            self._length_ratios[checked.model].observe(ratio)
            self._log_errors[checked.model, checked.source].observe(abs(math.log(ratio)))
        self._num_pending += 1
        observation = asyncio.wrap_future(self._predicting.submit(lambda: self._observe(checked, num_tokens, censored)))
        observation.add_done_callback(self._on_observed)

    @property
    def num_failures(self) -> int:
        """See `CheckedPredictor`."""
        return self._predictor.num_failures

    def length_ratio(self, model: str) -> Histogram:
        """Lengths of outputs, as multiples of the median that was predicted; without those that were cut off."""
        return self._length_ratios[model]

    def log_error(self, model: str, source: str) -> Histogram:
        """The absolute logarithms of these multiples, of the predictions of one source of `OBSERVED_SOURCES`."""
        return self._log_errors[model, source]

    def tau(self, model: str) -> float | None:
        """See `CheckedPredictor.tau`."""
        return self._predictor.tau(model)

    def is_ranking(self, model: str) -> bool:
        """See `CheckedPredictor.is_ranking`."""
        return self._predictor.is_ranking(model)

    async def call(self, function: Callable[[], _Result]) -> _Result:
        """Runs ``function`` in the predictor's thread, between predictions: it may read or replace its state."""
        return await asyncio.wrap_future(self._predicting.submit(function))

    def close(self) -> None:
        """Ends both threads without waiting; a call of the predictor that hangs is abandoned."""
        self._fitting.close()
        self._predicting.close()

    def _on_observed(self, observation: asyncio.Future[None]) -> None:
        self._num_pending -= 1
        if not observation.cancelled() and (error := observation.exception()) is not None:
            _log.error("the length predictor failed to observe an output: %s", error)

    def _observe(self, checked: CheckedPrediction, num_tokens: int, censored: bool) -> None:
        self._predictor.observe(checked, num_tokens, censored)
        if self._clock.monotonic_s() < self._next_fit_s:
            return
        if (refit := self._predictor.refit()) is not None:
            self._fitting.submit(lambda: self._timed(refit)).add_done_callback(self._on_fitted)

    def _timed(self, refit: Refit) -> Fitted:
        """Fits, and postpones the next fit so that fits use at most `FIT_FRACTION` of a core."""
        began_at_s = self._clock.thread_cpu_s()
        try:
            return refit.run()
        finally:
            used_s = self._clock.thread_cpu_s() - began_at_s
            self._next_fit_s = self._clock.monotonic_s() + used_s / FIT_FRACTION

    def _on_fitted(self, done: Future[Fitted]) -> None:
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            _log.error("a fit of the length predictor failed: %s", error)
        fitted = None if error else done.result()
        self._predicting.submit(lambda: self._publish(fitted))

    def _publish(self, fitted: Fitted | None) -> None:
        if not self._predictor.publish(fitted) and fitted is not None:
            _log.info(
                "a fit of the length predictor was rejected: tau %.3f, published fit %.3f",
                fitted.tau,
                fitted.published_tau,
            )
