"""How long each output will be: predicted within a time budget, or not used.

The predictor runs in a thread of its own. A prediction that is not there within the budget is not used: the request is
expected to be as long as the mean of its model, and the predictor is not asked again until the late prediction has
come. Nothing here refuses or loses a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from muxmesh.clock import Clock
from muxmesh.predictor.checked_predictor import CheckedPrediction, CheckedPredictor
from muxmesh.predictor.length_predictor import Fitted, Refit
from muxmesh.types import LengthPrediction
from router.daemon_thread import DaemonThread

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)

_MAX_PENDING_OBSERVATIONS = 1000
FIT_FRACTION = 0.02
"""Of one core, for fits."""


@dataclass(frozen=True, slots=True)
class LengthForecast:
    """What is expected of one request. ``checked`` is None where the predictor was not asked or was late."""

    prediction: LengthPrediction
    source: str
    checked: CheckedPrediction | None = None


class LengthForecaster:
    """Owns the thread that predicts and learns, and the one that fits. Called on one event loop."""

    def __init__(self, predictor: CheckedPredictor, budget_s: float, clock: Clock) -> None:
        self._clock = clock
        self._next_fit_s = 0.0
        self._predictor = predictor
        self._budget_s = budget_s
        self._predicting = DaemonThread("predict")
        self._fitting = DaemonThread("fit")
        self._late: Future[CheckedPrediction] | None = None
        self._num_pending = 0
        self.num_late = 0

    async def predict(self, text: str, model: str, tenant: str, hint_tokens: int | None) -> LengthForecast:
        """A forecast within the budget. ``hint_tokens``: the client's own expectation."""
        if self._late is not None and not self._late.done():
            return self._default(model)
        self._late = None
        future = self._predicting.submit(lambda: self._predictor.predict(text, model, tenant, hint_tokens))
        done, _ = await asyncio.wait([asyncio.wrap_future(future)], timeout=self._budget_s)
        if not done:
            if self.num_late == 0:
                _log.warning("no prediction within %.0f ms; not used until it comes", 1000 * self._budget_s)
            self._late = future
            return self._default(model)
        if future.cancelled():  # the router is stopping
            return self._default(model)
        checked = future.result()
        return LengthForecast(checked.prediction, checked.source, checked)

    def _default(self, model: str) -> LengthForecast:
        self.num_late += 1
        return LengthForecast(self._predictor.typical(model), "late")

    def observe(self, forecast: LengthForecast, num_tokens: int, censored: bool) -> None:
        """Learns that an output ended after this many tokens; ``censored``: it was cut off and would be longer."""
        checked = forecast.checked
        if checked is None or num_tokens < 1 or self._num_pending >= _MAX_PENDING_OBSERVATIONS:
            return
        self._num_pending += 1
        observation = asyncio.wrap_future(self._predicting.submit(lambda: self._observe(checked, num_tokens, censored)))
        observation.add_done_callback(self._on_observed)

    def tau(self, model: str) -> float | None:
        """See `CheckedPredictor.tau`."""
        return self._predictor.tau(model)

    def is_ranking(self, model: str) -> bool:
        """See `CheckedPredictor.is_ranking`."""
        return self._predictor.is_ranking(model)

    @property
    def num_failures(self) -> int:
        """Predictions and observations that raised or were not numbers."""
        return self._predictor.num_failures

    async def call(self, function: Callable[[], _Result]) -> _Result:
        """Runs a function between predictions: one that reads the predictor's state, or replaces it."""
        return await asyncio.wrap_future(self._predicting.submit(function))

    def close(self) -> None:
        """Ends the threads; a prediction that hangs is left behind."""
        self._fitting.close()
        self._predicting.close()

    def _on_observed(self, observation: asyncio.Future[None]) -> None:
        self._num_pending -= 1
        if not observation.cancelled() and (error := observation.exception()) is not None:
            _log.error("an observation failed: %s", error)

    def _observe(self, checked: CheckedPrediction, num_tokens: int, censored: bool) -> None:
        self._predictor.observe(checked, num_tokens, censored)
        if self._clock.monotonic_s() < self._next_fit_s:
            return
        if (refit := self._predictor.refit()) is not None:
            self._fitting.submit(lambda: self._timed(refit)).add_done_callback(self._on_fitted)

    def _timed(self, refit: Refit) -> Fitted:
        """Fits, and schedules the next fit so far off that all fits take a small fraction of a core."""
        began_at_s = self._clock.monotonic_s()
        try:
            return refit.run()
        finally:
            ended_at_s = self._clock.monotonic_s()
            self._next_fit_s = ended_at_s + (ended_at_s - began_at_s) / FIT_FRACTION

    def _on_fitted(self, done: Future[Fitted]) -> None:
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            _log.error("a fit failed: %s", error)
        fitted = None if error else done.result()
        self._predicting.submit(lambda: self._publish(fitted))

    def _publish(self, fitted: Fitted | None) -> None:
        if not self._predictor.publish(fitted) and fitted is not None:
            _log.info("a fit was not published: tau %.3f, now %.3f", fitted.tau, fitted.published_tau)
