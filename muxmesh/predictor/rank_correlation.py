"""Rank correlation: how well predictions order outputs by length. Pure."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def kendall_tau(left: Floats, right: Floats) -> float:
    """Kendall's tau-b of two sequences of equal length; 0 if either is constant. O(n²) time and memory."""
    a = np.sign(np.subtract.outer(np.asarray(left, np.float64), np.asarray(left, np.float64)))
    b = np.sign(np.subtract.outer(np.asarray(right, np.float64), np.asarray(right, np.float64)))
    untied = float(np.abs(a).sum()) * float(np.abs(b).sum())
    return float((a * b).sum()) / untied**0.5 if untied else 0.0


def tau_deviation(num: int) -> float:
    """Standard deviation of Kendall's tau of ``num`` independent pairs (Kendall, 1938); infinite below two."""
    return math.sqrt(2 * (2 * num + 5) / (9 * num * (num - 1))) if num > 1 else math.inf
