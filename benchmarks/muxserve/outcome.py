"""What one system makes of a workload: throughput and SLO attainment over all models. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.muxserve.cases import ModelOutcome
from benchmarks.muxserve.replay import SLO_SCALES


@dataclass(frozen=True, slots=True)
class Outcome:
    """One system under one workload."""

    throughput: float
    """Mean over models in requests per second, weighted by their rates."""
    attainment: Mapping[int, float]
    """SLO scale → the part of all requests within it."""


def outcome_of(models: Sequence[ModelOutcome]) -> Outcome:
    """The outcome of all models together."""
    rate, count = sum(one.rate for one in models), sum(one.num_requests for one in models)
    return Outcome(
        throughput=sum(one.rate * one.throughput for one in models) / rate,
        attainment={scale: sum(one.within_slo[scale] for one in models) / count for scale in SLO_SCALES},
    )
