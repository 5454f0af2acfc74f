"""Means of what keeps coming. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RunningMean:
    """The mean of all values at first, and of about the last ``1 / least_rate`` later on."""

    least_rate: float
    mean: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Takes in a value."""
        self.count += 1
        self.mean += max(1 / self.count, self.least_rate) * (value - self.mean)
