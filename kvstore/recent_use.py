"""How much of the device each model has used lately. Pure: knows no worker and no grant."""

from __future__ import annotations

import math

MEMORY_S = 3.0
"""After so many seconds, use counts for 1/e of what it was."""
_LEAST_PART = 0.01
"""A model with less of the device is not counted as one that uses it."""


class RecentUse:
    """Owns the seconds that the models have computed, which decay exponentially."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[float, float]] = {}
        """Model → seconds of the device, as they counted at the time beside them."""

    def count(self, model: str, seconds: float, now_s: float) -> None:
        """Adds ``seconds`` of the whole device that end at ``now_s``."""
        self._used[model] = self._seconds(model, now_s) + seconds, now_s

    def part(self, model: str, now_s: float) -> float:
        """The part of the device that the model has used lately: 1 if it has computed on all of it without a pause."""
        return self._seconds(model, now_s) / MEMORY_S

    def above_equal_part(self, now_s: float) -> frozenset[str]:
        """The models that have used more than the device divided equally among the models that use it."""
        parts = {model: self.part(model, now_s) for model in self._used}
        num_active = sum(part > _LEAST_PART for part in parts.values())
        return frozenset(model for model, part in parts.items() if part * num_active > 1)

    def _seconds(self, model: str, now_s: float) -> float:
        seconds, at_s = self._used.get(model, (0.0, now_s))
        return seconds * math.exp((at_s - now_s) / MEMORY_S)
