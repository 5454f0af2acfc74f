"""Length predictors and prompts with known lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from muxmesh.predictor.length_predictor import Fitted, LengthPredictor, RawPrediction, Refit, fit_now
from muxmesh.predictor.prompt_features import FeatureExtractor

FEATURES = FeatureExtractor().extract("x")

_SHORT = ("Yes or no: is {} a fruit?", "Is {} one word? Answer briefly.", "Classify {} as true or false.")
_LONG = (
    "Write a detailed essay about {}.",
    "Explain step by step how {} works, in depth.",
    "Write a long story of {}.",
)
_THINGS = [f"{kind} {number}" for number in range(400) for kind in ("apple", "river", "engine", "market", "violin")]


class ScriptedPredictor:
    """Predicts ``median`` of the true length, which is the prompt. Learns nothing, counts observations."""

    def __init__(self, median: Callable[[float], float]) -> None:
        self.median = median
        self.num_observed = 0

    def predict(self, text: str, model: str, tenant: str = "") -> RawPrediction:
        tokens = self.median(float(text))
        return RawPrediction(tokens, tokens * 2, "regressed", FEATURES, 0, 1.0, 1.6)

    def observe(self, raw: RawPrediction, model: str, num_tokens: int, censored: bool) -> None:
        self.num_observed += 1

    def refit(self) -> Refit | None:
        return None

    def publish(self, fitted: Fitted | None) -> bool:
        return True


def crash(*arguments: object) -> float:
    """A part of a predictor that raises."""
    raise RuntimeError("the predictor is broken")


def prompts_with_lengths(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Different prompts of two kinds, with outputs of about 20 and about 300 tokens."""
    rng = random.Random(seed)
    found = []
    for thing in rng.sample(_THINGS, count):
        is_long = rng.random() < 0.5
        prompt = rng.choice(_LONG if is_long else _SHORT).format(thing)
        found.append((prompt, max(1, round((300 if is_long else 20) * math.exp(rng.gauss(0, 0.4))))))
    return found


def trained_predictor(count: int = 300, model: str = "m") -> LengthPredictor:
    """A predictor that has observed ``count`` outputs, with all fits that were due."""
    predictor = LengthPredictor()
    for prompt, length in prompts_with_lengths(count):
        predictor.observe(predictor.predict(prompt, model), model, length, False)
        fit_now(predictor)
    return predictor
