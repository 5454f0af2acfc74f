import pytest

from loadtest.record import Record
from muxmesh.types import LengthPrediction, SchedulingState
from simulator.simulated_request import SimulatedRequest


def test_a_queued_request_that_was_preempted_has_its_prefill_to_do_again() -> None:
    arrived = SchedulingState(0, 0.0, prefill_s=2.0, decode_s=10.0)
    request = SimulatedRequest(
        0, "m", 10, 100, 100, arrived, LengthPrediction(100, 100), Record(0, 0.0), lambda one: None
    )
    assert request.scheduling == arrived and request.max_tokens == 110
    request.num_sent = 40
    assert request.scheduling.prefill_s == 2.0
    assert request.scheduling.decode_s == pytest.approx(6.0) and request.scheduling.served_s == pytest.approx(6.0)
