"""Where the simulated router gets its expectations from."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from muxmesh.errors import ConfigError
from muxmesh.predictor.checked_predictor import CheckedPrediction, CheckedPredictor
from muxmesh.predictor.length_predictor import fit_now
from muxmesh.types import LengthPrediction


@dataclass(frozen=True, slots=True)
class Asked:
    """What a forecast is made from; ``num_output`` is the truth, for those who may know it."""

    text: str | None
    model: str
    tenant: str
    num_output: int
    hint_tokens: int | None = None


class Forecasts(Protocol):
    """Tells how long answers will be."""

    def ask(self, asked: Asked) -> tuple[LengthPrediction, str, object]:
        """A prediction, where it comes from, and what `observe` wants back."""

    def observe(self, memory: object, num_output: int, censored: bool) -> None:
        """An answer ended; ``censored``: at the longest that was allowed."""


class Known:
    """The truth: lengths that requests fix themselves, or a perfect predictor."""

    def ask(self, asked: Asked) -> tuple[LengthPrediction, str, object]:
        """See `Forecasts`."""
        return LengthPrediction(asked.num_output, asked.num_output), "fixed", None

    def observe(self, memory: object, num_output: int, censored: bool) -> None:
        """See `Forecasts`."""


class Noisy:
    """Predictions that rank with a given Kendall tau, and know how uncertain they are.

    The truth's place among all log lengths and the predicted place are correlated normal variables (a Gaussian copula),
    and the prediction is the median of what is left open.
    """

    def __init__(self, tau: float, lengths: Sequence[int], seed: int) -> None:
        """``lengths``: all that will be asked for. Raises ConfigError unless ``tau`` is in [0, 1]."""
        if not 0 <= tau <= 1:
            raise ConfigError(f"--tau: is {tau}; a number from 0 (useless) to 1 (perfect)")
        logs = [math.log(max(1, length)) for length in lengths]
        self._mean = sum(logs) / len(logs)
        self._deviation = math.sqrt(sum((one - self._mean) ** 2 for one in logs) / len(logs)) or 1e-9
        self._correlation = math.sin(math.pi * tau / 2)
        self._rng = random.Random(f"{seed}/forecasts")

    def ask(self, asked: Asked) -> tuple[LengthPrediction, str, object]:
        """See `Forecasts`."""
        place = (math.log(max(1, asked.num_output)) - self._mean) / self._deviation
        left = math.sqrt(max(0.0, 1 - self._correlation**2))
        seen = self._correlation * place + left * self._rng.gauss(0, 1)
        middle = self._mean + self._deviation * self._correlation * seen
        p50_tokens, p90_tokens = math.exp(middle), math.exp(middle + 1.2816 * self._deviation * left)
        return LengthPrediction(p50_tokens, p90_tokens), "noisy", None

    def observe(self, memory: object, num_output: int, censored: bool) -> None:
        """See `Forecasts`."""


class Learned:
    """A predictor behind its guard, as in the mesh, learning from each answer when it ends."""

    def __init__(self, guard: CheckedPredictor) -> None:
        self._guard = guard

    def ask(self, asked: Asked) -> tuple[LengthPrediction, str, object]:
        """See `Forecasts`."""
        judged = self._guard.predict(asked.text or "", asked.model, asked.tenant, asked.hint_tokens)
        return judged.prediction, judged.source, judged

    def observe(self, memory: object, num_output: int, censored: bool) -> None:
        """See `Forecasts`."""
        if not isinstance(memory, CheckedPrediction):
            return
        self._guard.observe(memory, num_output, censored)
        fit_now(self._guard)
