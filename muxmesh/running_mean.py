"""Means of streams of values. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RunningMean:
    """The mean of all values at first, and of about the last ``1 / min_rate`` values later on."""

    min_rate: float
    mean: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Adds a value."""
        self.count += 1
        self.mean += max(1 / self.count, self.min_rate) * (value - self.mean)
