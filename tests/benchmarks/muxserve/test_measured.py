"""The comparison with measured runs, on miniature ones."""

from dataclasses import replace

import pytest

from benchmarks.muxserve.cases import UnitCase
from benchmarks.muxserve.measured import compare, loss
from benchmarks.muxserve.measured_cases import MeasuredCase
from tests.benchmarks.muxserve.miniature import measured_model, model, replayer

CASE = MeasuredCase(
    "mini spatial",
    "spatial",
    (UnitCase("u", 1, (model("a", 4),)),),
    {"a": measured_model("a", num_requests=4, within_slo={8.0: 3}, mean_latency_s=1.0)},
)


def test_every_model_is_compared_with_what_was_measured() -> None:
    (error,) = compare([CASE], replayer(), 1)
    assert error.attainment_error == 0.25
    assert error.throughput_error == pytest.approx(abs(error.throughput - 1))
    assert (error.case, error.model, error.measured_latency_s) == ("mini spatial", "a", 1.0)


def test_a_case_without_slo_counts_has_no_error_of_attainment() -> None:
    (error,) = compare([replace(CASE, measured={"a": measured_model("a", throughput=3.0)})], replayer(), 1)
    assert error.attainment_error is None
    assert loss([error]) == error.throughput_error
