"""Repeated measurements of one time, as a median with its spread. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from muxmesh.placement.measured_cells import SampleSummary

_FAR = 5.0
"""A sample is an outlier beyond this multiple of the median deviation from the median."""
_LEAST_DEVIATION = 0.02
"""Relative. Samples that are nearer to the median are never outliers, however small the deviation of the others is."""


def summarize(samples: Sequence[float]) -> SampleSummary:
    """Summarizes at least one sample, in positive seconds."""
    median = statistics.median(samples)
    deviation = statistics.median(abs(sample - median) for sample in samples)
    bound = max(_FAR * deviation, _LEAST_DEVIATION * median)
    outliers = sum(abs(sample - median) > bound for sample in samples)
    return SampleSummary(median, deviation / median, len(samples), outliers)
