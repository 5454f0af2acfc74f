"""The defaults of the engine seam. What every engine promises is in `test_contract`."""

import pytest

from muxmesh.engine.api import ComputeDemand, EngineJob, FreeGrant
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import SampledToken, StepOutcome
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping


def test_the_grant_of_a_device_without_other_workers_is_acquired_without_waiting() -> None:
    grant = FreeGrant()
    for _ in range(2):
        with pytest.raises(StopIteration):  # it ends at its first step: it has awaited nothing
            grant.acquire(ComputeDemand()).send(None)
        grant.revise(ComputeDemand())
        grant.release(1)
    grant.drop()


@pytest.mark.parametrize(
    ("now", "is_more_urgent"),
    [
        (ComputeDemand(1, 5.0, 3.0), False),  # the same sequence, two seconds later
        (ComputeDemand(0, 5.0, 3.0), True),
        (ComputeDemand(1, 4.0, 3.0), True),
        (ComputeDemand(1, 5.0, 2.9), True),
        (ComputeDemand(1, 5.0, -1.0, -1.0), False),  # missed
        (ComputeDemand(1, 5.0, -1.0, 1.0), True),  # late
        (ComputeDemand(2, 9.0, 9.0), False),
    ],
)
def test_a_demand_is_more_urgent_by_its_class_its_oldest_request_or_its_slack(
    now: ComputeDemand, is_more_urgent: bool
) -> None:
    assert now.is_more_urgent_than(ComputeDemand(1, 5.0, 5.0), passed_s=2.0) == is_more_urgent


@pytest.mark.parametrize("lost_s", [-1.0, 1.0])
def test_a_sequence_that_can_meet_its_slo_is_more_urgent_than_those_that_have_missed_it(lost_s: float) -> None:
    earlier = ComputeDemand(slack_s=-1.0, lost_s=lost_s)
    assert ComputeDemand(slack_s=9.0).is_more_urgent_than(earlier, passed_s=2.0)


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
