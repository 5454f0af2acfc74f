"""A mean over a stream of values that adapts to recent ones. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RunningMean:
    """The mean of all values up to ``1 / min_rate`` of them, and an exponential moving average from then on.

    The moving average covers about the last ``1 / min_rate`` values. ``min_rate`` 0 is the mean of all values.
    """

    min_rate: float
    mean: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.mean += max(1 / self.count, self.min_rate) * (value - self.mean)
