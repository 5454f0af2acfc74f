"""What the estimators are given."""

from dataclasses import replace

import pytest

from benchmarks.muxserve.constants import read_constants
from benchmarks.muxserve.estimators import slowed
from tests.benchmarks.muxserve.miniature import profile


def test_the_planner_sees_the_overhead_and_the_contention() -> None:
    constants = replace(read_constants(), contention=0.7, overhead=1.0)
    seen = slowed(profile(), constants)
    assert seen.contention == 0.7
    assert seen.models["llama-7b"].tables[1].decode == pytest.approx(2 * profile().models["llama-7b"].tables[1].decode)
