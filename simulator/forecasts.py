"""Where the simulated router gets its length predictions: the true lengths, those with noise, or a real predictor."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from muxmesh.errors import ConfigError
from muxmesh.predictor.checked_predictor import CheckedPrediction, CheckedPredictor
from muxmesh.predictor.length_predictor import fit_now
from muxmesh.types import Z90, LengthPrediction


@dataclass(frozen=True, slots=True)
class ForecastInput:
    """What a forecast of one output may depend on. ``num_output`` is the true length."""

    text: str | None
    model: str
    tenant: str
    num_output: int
    hint_tokens: int | None = None


class Forecasts(Protocol):
    """A source of length predictions."""

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        """A prediction, its source (see `router.length_forecast`), and an object to be passed to `observe`."""

    def observe(self, forecast: object, num_output: int, censored: bool) -> None:
        """Learns the length of a finished output. ``censored``: it reached the longest allowed length."""


class TrueLengths:
    """Forecasts that are the true lengths: requests fix them, or the predictor is perfect."""

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        return LengthPrediction(request.num_output, request.num_output), "fixed", None

    def observe(self, forecast: object, num_output: int, censored: bool) -> None:
        """Learns nothing."""


class NoisyLengths:
    """Forecasts whose ranks have a given Kendall tau with the true lengths, and whose spread matches their errors.

    The true log length, standardised over all lengths, and an observation of it are correlated normal variables (a
    Gaussian copula: the correlation is sin(pi tau / 2)). The forecast is the conditional distribution of the length
    given the observation.
    """

    def __init__(self, tau: float, lengths: Sequence[int], seed: int) -> None:
        """``lengths``: all true lengths to be forecast. Raises ConfigError unless ``tau`` is in [0, 1]."""
        if not 0 <= tau <= 1:
            raise ConfigError(f"--tau: is {tau}; a number from 0 (useless) to 1 (perfect)")
        logs = [math.log(max(1, length)) for length in lengths]
        self._mean = sum(logs) / len(logs)
        self._deviation = math.sqrt(sum((one - self._mean) ** 2 for one in logs) / len(logs)) or 1e-9
        self._correlation = math.sin(math.pi * tau / 2)
        self._rng = random.Random(f"{seed}/forecasts")

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        standard = (math.log(max(1, request.num_output)) - self._mean) / self._deviation
        noise = math.sqrt(max(0.0, 1 - self._correlation**2))
        observed = self._correlation * standard + noise * self._rng.gauss(0, 1)
        log_median = self._mean + self._deviation * self._correlation * observed
        p50_tokens, p90_tokens = math.exp(log_median), math.exp(log_median + Z90 * self._deviation * noise)
        return LengthPrediction(p50_tokens, p90_tokens), "noisy", None

    def observe(self, forecast: object, num_output: int, censored: bool) -> None:
        """Learns nothing."""


class LearnedLengths:
    """Forecasts of a real predictor, which learns each output when it ends and is refitted in place."""

    def __init__(self, predictor: CheckedPredictor) -> None:
        self._predictor = predictor

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        checked = self._predictor.predict(request.text or "", request.model, request.tenant, request.hint_tokens)
        return checked.prediction, checked.source, checked

    def observe(self, forecast: object, num_output: int, censored: bool) -> None:
        """See `Forecasts`. Ignores a forecast of another source."""
        if not isinstance(forecast, CheckedPrediction):
            return
        self._predictor.observe(forecast, num_output, censored)
        fit_now(self._predictor)
