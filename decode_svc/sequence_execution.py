"""What becomes of one sequence in this decode worker: pre-emptions, seconds by state, overdue. Pure but for the log.

It knows neither the engine nor kvstore; the service calls it for each event.
"""

from __future__ import annotations

import logging
from collections import Counter

from muxmesh.clock import Clock
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.quoting import quoted
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.sequence_states import SequenceState
from worker.worker_metrics import WorkerCounters

_log = logging.getLogger(__name__)


class SequenceExecution:
    """Owns the `Execution` of one sequence while the worker has it, and counts it for the worker's metrics.

    The worker has the sequence from the construction until `end`.
    """

    def __init__(
        self,
        lease_id: int,
        sequence: SequenceRecord,
        counters: WorkerCounters,
        clock: Clock,
        policy: SchedulingPolicy,
        traces: bool = False,
    ) -> None:
        """``traces``: logs each pre-emption."""
        self._lease_id, self._sequence, self._counters = lease_id, sequence, counters
        self._clock, self._policy, self._traces = clock, policy, traces
        self._preemptions: Counter[PreemptionReason] = Counter()
        self._num_recomputed = 0
        self._is_overdue = False
        self._has_news = False
        self._claimed_for: PreemptionReason | None = None
        counters.states.begin(lease_id, SequenceState.BATCHED, clock.monotonic_s())
        self._check_overdue()

    def kv_claimed(self, reason: PreemptionReason) -> None:
        """Others need the sequence's memory: its next pre-emption for memory has this reason. May be repeated."""
        self._claimed_for = reason

    def displaced(self, reason: PreemptionReason | None) -> None:
        """The sequence is not in the batch. ``reason``: why it lost its slot; None: it had none."""
        self._enter(SequenceState.PAUSED)
        if reason is not None:
            self._count(reason)

    def kv_preempted(self) -> None:
        """The sequence is paused, and loses its memory."""
        self._enter(SequenceState.PAUSED)
        self._count(self._claimed_for or PreemptionReason.KV_FULL)

    def kv_restored(self) -> None:
        """The sequence has memory again, and is to run. A claim of the memory that it had is settled."""
        self._claimed_for = None
        self.batched()

    def batched(self) -> None:
        """The sequence is in the batch again."""
        self._check_overdue()
        self._enter(SequenceState.BATCHED)
        self._has_news = True

    def recomputed(self) -> None:
        """The KV of the sequence is freed: another attempt computes it again."""
        self._num_recomputed += 1
        self._counters.num_recomputed += 1

    def news(self) -> Execution | None:
        """What became of the sequence so far, if it has been in the batch again since the last call."""
        if not self._has_news:
            return None
        self._has_news = False
        return self.report()

    def report(self) -> Execution:
        """What became of the sequence until now."""
        self._check_overdue()
        seconds = self._counters.states.seconds_of(self._lease_id, self._clock.monotonic_s())
        copying = (SequenceState.SWAPPING_OUT, SequenceState.SWAPPED, SequenceState.SWAPPING_IN)
        return Execution(
            preemptions=dict(self._preemptions),
            num_repredictions=self._sequence.work.num_repredictions,
            num_recomputed=self._num_recomputed,
            batched_s=seconds.get(SequenceState.BATCHED, 0.0),
            paused_s=seconds.get(SequenceState.PAUSED, 0.0),
            swapped_s=sum(seconds.get(state, 0.0) for state in copying),
            is_overdue=self._is_overdue,
        )

    def end(self) -> None:
        """The worker has the sequence no longer."""
        self._counters.num_repredictions += self._sequence.work.num_repredictions
        self._counters.states.end(self._lease_id, self._clock.monotonic_s())

    def _enter(self, state: SequenceState) -> None:
        self._counters.states.enter(self._lease_id, state, self._clock.monotonic_s())

    def _count(self, reason: PreemptionReason) -> None:
        self._preemptions[reason] += 1
        self._counters.preemptions[reason] += 1
        if self._traces:
            _log.info(
                "request %s, lease %d, is pre-empted after %d tokens: %s",
                quoted(self._sequence.request.request_id), self._lease_id, self._sequence.num_output_tokens, reason,
            )  # fmt: skip

    def _check_overdue(self) -> None:
        """Called at the end of each wait: what is served counts against the wait, so it is longest there."""
        self._is_overdue |= self._policy.is_overdue(self._sequence.scheduling, self._clock.unix_s())
