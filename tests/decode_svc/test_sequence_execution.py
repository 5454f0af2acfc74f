"""What becomes of one sequence, by the events of its worker and a clock that the test moves."""

import logging

import pytest

from decode_svc.sequence_execution import SequenceExecution
from muxmesh.clock import ManualClock
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.sequence_states import SequenceState
from muxmesh.types import EngineRequest, LengthPrediction, Sampling, SchedulingState, Stopping
from worker.worker_metrics import WorkerCounters

MAX_WAIT_S = 100.0
POLICY = SchedulingPolicy("srtf", 0.0, 0.0, 1.0, MAX_WAIT_S)
ORDER, KV_FULL = PreemptionReason.ORDER, PreemptionReason.KV_FULL


class Worker:
    """A decode worker with one sequence, which arrived ``waited_s`` before the worker got it."""

    def __init__(self, waited_s: float = 0.0, traces: bool = False) -> None:
        self.clock, self.counters = ManualClock(64.0), WorkerCounters()
        state = SchedulingState(0, self.clock.unix_s() - waited_s, decode_s=8.0)
        prediction = LengthPrediction(8.0, 9.0)
        request = EngineRequest("r", "m", (1, 2), Sampling(), Stopping(40), state, prediction=prediction)
        self.sequence = SequenceRecord(request, 16, b"", (0, 1, 2), 2, (7,))
        self.execution = SequenceExecution(5, self.sequence, self.counters, self.clock, POLICY, traces)

    def swap(self, seconds: float) -> None:
        """The sequence is swapped out, waits and is swapped in, for ``seconds`` each."""
        for state in (SequenceState.SWAPPING_OUT, SequenceState.SWAPPED, SequenceState.SWAPPING_IN):
            self.counters.states.enter(5, state, self.clock.monotonic_s())
            self.clock.advance(seconds)


def test_a_sequence_that_is_displaced_and_swapped_has_its_reasons_and_the_seconds_of_each_state() -> None:
    worker = Worker()
    execution, clock = worker.execution, worker.clock
    clock.advance(4.0)
    execution.displaced(ORDER)
    clock.advance(2.0)
    execution.batched()
    clock.advance(1.0)
    execution.kv_claimed(PreemptionReason.KV_GROWTH)
    execution.kv_preempted()
    clock.advance(0.5)
    worker.swap(8.0)
    execution.kv_restored()
    clock.advance(16.0)
    expected = Execution({ORDER: 1, PreemptionReason.KV_GROWTH: 1}, 0, 0, 4.0 + 1.0 + 16.0, 2.5, 24.0)
    assert execution.report() == expected
    assert worker.counters.preemptions == expected.preemptions
    execution.end()
    assert len(worker.counters.states) == 0


def test_a_sequence_that_never_had_a_slot_is_not_pre_empted() -> None:
    worker = Worker()
    worker.execution.displaced(None)
    worker.clock.advance(3.0)
    assert worker.execution.report() == Execution(paused_s=3.0)


def test_a_claim_is_the_reason_of_the_next_pre_emption_only() -> None:
    worker = Worker()
    for is_claimed in (True, False):
        if is_claimed:
            worker.execution.kv_claimed(PreemptionReason.KV_QUOTA)
        worker.execution.kv_preempted()
        if is_claimed:
            worker.execution.kv_claimed(PreemptionReason.KV_QUOTA)  # it is repeated until the memory is free
        worker.execution.kv_restored()
    worker.execution.recomputed()
    report = worker.execution.report()
    assert report.preemptions == {PreemptionReason.KV_QUOTA: 1, KV_FULL: 1}
    assert report.num_recomputed == worker.counters.num_recomputed == 1


def test_there_is_news_once_after_each_return_to_the_batch() -> None:
    execution = Worker().execution
    assert execution.news() is None
    execution.displaced(ORDER)
    assert execution.news() is None
    execution.batched()
    assert execution.news() == Execution({ORDER: 1})
    assert execution.news() is None


def test_predictions_of_a_sequence_that_has_ended_are_counted() -> None:
    worker = Worker()
    for _ in range(3):
        worker.sequence.extend((9,))
    assert worker.execution.report().num_repredictions == 2, "at a quarter and at half of the predicted length"
    worker.execution.end()
    assert worker.counters.num_repredictions == 2


@pytest.mark.parametrize(("waited_s", "paused_s", "is_overdue"), [(101, 0, True), (60, 50, True), (60, 30, False)])
def test_a_sequence_is_overdue_from_its_waits_before_the_worker_and_in_it(
    waited_s: float, paused_s: float, is_overdue: bool
) -> None:
    worker = Worker(waited_s)
    worker.execution.displaced(ORDER)
    worker.clock.advance(paused_s)
    worker.execution.batched()
    assert worker.execution.report().is_overdue is is_overdue


def test_a_sequence_that_was_overdue_remains_so_however_much_it_has_been_served() -> None:
    worker = Worker(waited_s=101)
    worker.sequence.work.state = SchedulingState(0, worker.clock.unix_s() - 101, served_s=50.0)
    assert worker.execution.report().is_overdue


@pytest.mark.parametrize("traces", [True, False])
def test_pre_emptions_are_logged_if_decisions_are_traced(traces: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Worker(traces=traces).execution.displaced(ORDER)
    assert caplog.messages == ["request 'r', lease 5, is pre-empted after 1 tokens: order"] * traces
