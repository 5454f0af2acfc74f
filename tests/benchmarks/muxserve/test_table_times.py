"""Step times from a table."""

import pytest

from benchmarks.muxserve.table_times import TableStepTimes, unloaded_latency_s
from muxmesh.step_cost import StepShape
from tests.benchmarks.muxserve.miniature import table


def test_a_decode_step_is_a_line_over_the_context() -> None:
    base_s, per_context_s = TableStepTimes(table()).decode_cost(10, 1.0)
    assert base_s == pytest.approx(0.01)
    assert per_context_s == pytest.approx(1e-5)


def test_a_prefill_step_takes_the_time_of_its_tokens_at_its_share() -> None:
    times = TableStepTimes(table())
    assert times.prefill_s(StepShape(400, 0, 2), 1.0) == pytest.approx(0.4)
    assert times.prefill_s(StepShape(400, 0, 2), 0.5) == pytest.approx(0.8)


def test_an_unloaded_request_takes_its_prefill_and_a_step_for_each_further_token() -> None:
    assert unloaded_latency_s(table(), 100, 51) == pytest.approx(0.1 + 50 * (0.01 + 1e-5 * 125.5))
