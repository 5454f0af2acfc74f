"""The defaults of the engine seam. What every engine promises is in `test_contract`."""

import pytest

from muxmesh.engine.api import EngineJob, FreeGrant
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import SampledToken, StepOutcome
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping


def test_the_grant_of_a_device_without_other_workers_is_acquired_without_waiting() -> None:
    grant = FreeGrant()
    for _ in range(2):
        with pytest.raises(StopIteration):  # it ends at its first step: it has awaited nothing
            grant.acquire().send(None)
        grant.release(1)
    grant.drop()


@pytest.mark.parametrize(("max_new_tokens", "num_tokens"), [(None, 9), (4, 4)])
def test_a_job_ends_with_its_sequence_unless_it_has_a_limit(max_new_tokens: int | None, num_tokens: int) -> None:
    request = EngineRequest("r", "m", (1, 2), Sampling(), Stopping(9), SchedulingState(0, 0.0))
    jobs = Scheduler(1, 10, 1000)
    jobs.add(EngineJob(1, SequenceRecord(request, 16, b"", (0,)), max_new_tokens))
    num_steps = 0
    while jobs.next_step(0.0):
        jobs.apply(StepOutcome({1: (SampledToken(5),)}))
        num_steps += 1
    assert num_steps == num_tokens
