"""How long each answer will be, and so how much work its request is: asked in time, or not at all.

The predictor runs in a thread of its own. A guess that is not there within the budget is done without: the request is
taken for a typical one of its model, and nobody is asked again until the late guess has come. Nothing here refuses or
loses a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from muxmesh.clock import Clock
from muxmesh.predictor.guard import Guard, Judged
from muxmesh.predictor.predictor import Fitted, Refit
from muxmesh.types import LengthPrediction
from router.one_thread import OneThread

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)

_MOST_LESSONS = 1000
FIT_SHARE = 0.02
"""Of one core, for fits."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of one request. ``judged`` is None where nobody was asked or nothing came in time."""

    prediction: LengthPrediction
    source: str
    judged: Judged | None = None


class Forecaster:
    """Owns the thread that predicts and learns, and the one that fits. Called on one event loop."""

    def __init__(self, guard: Guard, budget_s: float, clock: Clock) -> None:
        self._clock = clock
        self._next_fit_s = 0.0
        self._guard = guard
        self._budget_s = budget_s
        self._asking = OneThread("predict")
        self._fitting = OneThread("fit")
        self._late: Future[Judged] | None = None
        self._num_lessons = 0
        self.num_late = 0

    async def predict(self, text: str, model: str, tenant: str, hint_tokens: int | None) -> Forecast:
        """A forecast within the budget."""
        if self._late is not None and not self._late.done():
            return self._without(model)
        self._late = None
        asked = self._asking.submit(lambda: self._guard.predict(text, model, tenant, hint_tokens))
        done, _ = await asyncio.wait([asyncio.wrap_future(asked)], timeout=self._budget_s)
        if not done:
            if self.num_late == 0:
                _log.warning("no prediction within %.0f ms; doing without until it comes", 1000 * self._budget_s)
            self._late = asked
            return self._without(model)
        if asked.cancelled():  # the mesh is ending
            return self._without(model)
        judged = asked.result()
        return Forecast(judged.prediction, judged.source, judged)

    def _without(self, model: str) -> Forecast:
        self.num_late += 1
        return Forecast(self._guard.typical(model), "late")

    def observe(self, forecast: Forecast, num_tokens: int, censored: bool) -> None:
        """An answer ended after so many tokens; ``censored``: it was cut off and would have been longer."""
        judged = forecast.judged
        if judged is None or num_tokens < 1 or self._num_lessons >= _MOST_LESSONS:
            return
        self._num_lessons += 1
        lesson = asyncio.wrap_future(self._asking.submit(lambda: self._learn(judged, num_tokens, censored)))
        lesson.add_done_callback(self._learned)

    def tau(self, model: str) -> float | None:
        """See `Guard.tau`."""
        return self._guard.tau(model)

    def is_ranking(self, model: str) -> bool:
        """See `Guard.is_ranking`."""
        return self._guard.is_ranking(model)

    @property
    def num_failures(self) -> int:
        """Guesses and lessons that raised or were no numbers."""
        return self._guard.num_failures

    async def call(self, function: Callable[[], _Result]) -> _Result:
        """Runs something between guesses: what looks at the predictor's state, or replaces it."""
        return await asyncio.wrap_future(self._asking.submit(function))

    def close(self) -> None:
        """Ends the threads; a guess that hangs is left behind."""
        self._fitting.close()
        self._asking.close()

    def _learned(self, lesson: asyncio.Future[None]) -> None:
        self._num_lessons -= 1
        if not lesson.cancelled() and (error := lesson.exception()) is not None:
            _log.error("a lesson failed: %s", error)

    def _learn(self, judged: Judged, num_tokens: int, censored: bool) -> None:
        self._guard.observe(judged, num_tokens, censored)
        if self._clock.monotonic_s() < self._next_fit_s:
            return
        if (refit := self._guard.refit()) is not None:
            self._fitting.submit(lambda: self._timed(refit)).add_done_callback(self._fitted)

    def _timed(self, refit: Refit) -> Fitted:
        """Fits, and sees to it that the next fit is so far off that all take a small share of a core."""
        began_at_s = self._clock.monotonic_s()
        try:
            return refit.run()
        finally:
            ended_at_s = self._clock.monotonic_s()
            self._next_fit_s = ended_at_s + (ended_at_s - began_at_s) / FIT_SHARE

    def _fitted(self, done: Future[Fitted]) -> None:
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            _log.error("a fit failed: %s", error)
        fitted = None if error else done.result()
        self._asking.submit(lambda: self._publish(fitted))

    def _publish(self, fitted: Fitted | None) -> None:
        if not self._guard.publish(fitted) and fitted is not None:
            _log.info("a fit was not published: tau %.3f, now %.3f", fitted.tau, fitted.published_tau)
