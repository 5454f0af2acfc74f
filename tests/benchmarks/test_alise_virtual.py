"""The systems that `benchmarks.alise_virtual` compares."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.alise_virtual import WHOLE, Case, Workload
from benchmarks.policies import Lengths
from muxmesh.predictor.rank_correlation import kendall_tau
from muxmesh.types import LengthPrediction
from simulator.forecasts import ForecastInput

_rng = random.Random(4)
REQUESTS = [Lengths(10, max(1, round(_rng.lognormvariate(4, 1)))) for _ in range(400)]
OWN = [LengthPrediction(one.num_output, 2 * one.num_output) for one in REQUESTS]


def forecasts_of(workload: Workload, case: Case) -> list[float]:
    source = workload.forecasts(case)
    return [source.forecast(ForecastInput(None, "m", "", one.num_output))[0].p50_tokens for one in workload.requests]


def agreement(forecasts: list[float]) -> float:
    """Kendall's tau with the true lengths."""
    return kendall_tau(np.array(forecasts), np.array([float(one.num_output) for one in REQUESTS]))


@pytest.mark.parametrize("predictions", [None, OWN])
def test_predictions_of_other_requests_are_the_same_ones_and_do_not_rank(
    predictions: list[LengthPrediction] | None,
) -> None:
    workload = Workload("w", REQUESTS, predictions)
    own, others = (forecasts_of(workload, case) for case in (WHOLE, replace(WHOLE, is_shuffled=True)))
    assert sorted(own) == sorted(others)
    assert agreement(own) > 0.5
    assert abs(agreement(others)) < 0.1


def test_injected_errors_have_the_rank_correlation_of_the_case() -> None:
    workload = Workload("w", REQUESTS, None)
    for tau in (0.3, 0.6):
        assert agreement(forecasts_of(workload, Case("x", tau=tau))) == pytest.approx(tau, abs=0.06)
    assert agreement(forecasts_of(workload, Case("x", tau=1.0))) == 1.0
