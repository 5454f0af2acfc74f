"""How outcomes of models are summed up."""

import pytest

from benchmarks.muxserve.cases import ModelOutcome
from benchmarks.muxserve.outcome import outcome_of
from benchmarks.muxserve.replay import SLO_SCALES


def test_throughput_is_weighted_by_rates_and_attainment_by_requests() -> None:
    none: dict[float, int] = dict.fromkeys(SLO_SCALES, 0)
    every: dict[float, int] = dict.fromkeys(SLO_SCALES, 10)
    models = [ModelOutcome("a", 3.0, 30, 2.0, 1.0, 0.1, none), ModelOutcome("b", 1.0, 10, 1.0, 1.0, 0.1, every)]
    outcome = outcome_of(models)
    assert outcome.throughput == pytest.approx((3 * 2 + 1 * 1) / 4)
    assert outcome.attainment[8] == 0.25
