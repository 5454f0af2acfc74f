"""For how long a worker's sequences were in which state, and how often each was pre-empted. Pure; time is an argument.

    prefill                              the prefill worker has the sequence
    batched      -> paused -> batched    others precede it, or its KV is about to be swapped
    paused       -> swapping_out         a copy of its KV begins
    swapping_out -> swapped              the copy is complete
    swapped      -> swapping_in          it has memory again
    swapping_in  -> paused -> batched    the copy is complete; it is back in the batch

The states are those that the worker sees. kvstore has the same ones for leases (`kvstore.leases`), but learns of a
pause only when it reads the progress page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum


class SequenceState(StrEnum):
    """See the table at the head of this module."""

    PREFILL = "prefill"
    BATCHED = "batched"
    PAUSED = "paused"
    SWAPPING_OUT = "swapping_out"
    SWAPPED = "swapped"
    SWAPPING_IN = "swapping_in"


@dataclass(frozen=True, slots=True)
class SequenceHistory:
    """What happened to a sequence, or to several in sum.

    ``num_displaced``: how often others took its slot in the batch. ``num_swapped``: how often its KV was swapped out.
    ``num_recomputed``: how often its KV was freed, and computed again. ``num_repredictions``: how often its length was
    predicted again. ``paused_s``: seconds in which it had its KV, but was not in the batch. ``swapped_s``: seconds from
    the beginning of a copy of its KV to the end of the copy back, or to now; ``copying_s``: seconds of them in which a
    copy was made.
    """

    num_displaced: int = 0
    num_swapped: int = 0
    num_recomputed: int = 0
    num_repredictions: int = 0
    paused_s: float = 0.0
    swapped_s: float = 0.0
    copying_s: float = 0.0

    def plus(self, other: SequenceHistory) -> SequenceHistory:
        """The sum of both, field by field."""
        return SequenceHistory(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


NO_HISTORY = SequenceHistory()


@dataclass(slots=True)
class _Stay:
    """One sequence, which is in ``state`` since ``since_s``; ``seconds`` are those of its stays before."""

    state: SequenceState
    since_s: float
    seconds: dict[SequenceState, float] = field(default_factory=dict)
    num_displaced: int = 0
    num_swapped: int = 0


class SequenceStates:
    """Owns the state of each sequence of one worker, and the seconds of all its sequences by state.

    Invariant: ``_counts`` is the number of sequences in each state.
    """

    def __init__(self) -> None:
        self._stays: dict[int, _Stay] = {}
        self._counts = dict.fromkeys(SequenceState, 0)
        self._seconds = dict.fromkeys(SequenceState, 0.0)
        self._settled_at_s = 0.0

    def __len__(self) -> int:
        return len(self._stays)

    def begin(self, lease_id: int, state: SequenceState, now_s: float) -> None:
        """The worker has a new sequence. Times are monotonic."""
        assert lease_id not in self._stays, "a sequence begins once"
        self._settle(now_s)
        self._stays[lease_id] = _Stay(state, now_s)
        self._counts[state] += 1

    def enter(self, lease_id: int, state: SequenceState, now_s: float) -> None:
        """A sequence is in another state. One that is not there, as it has ended, is ignored."""
        stay = self._stays.get(lease_id)
        if stay is None or stay.state is state:
            return
        self._settle(now_s)
        self._counts[stay.state] -= 1
        self._counts[state] += 1
        stay.seconds[stay.state] = stay.seconds.get(stay.state, 0.0) + now_s - stay.since_s
        stay.state, stay.since_s = state, now_s
        stay.num_swapped += state is SequenceState.SWAPPED

    def displace(self, lease_id: int, now_s: float, had_slot: bool) -> None:
        """Others precede a sequence in the batch, in which it ``had_slot`` or not yet."""
        self.enter(lease_id, SequenceState.PAUSED, now_s)
        self._stays[lease_id].num_displaced += had_slot

    def end(self, lease_id: int, now_s: float) -> None:
        """The worker has the sequence no longer."""
        self._settle(now_s)
        self._counts[self._stays.pop(lease_id).state] -= 1

    def history(self, lease_id: int, num_repredictions: int = 0, now_s: float | None = None) -> SequenceHistory:
        """What happened to a sequence until it entered its state of now, or until ``now_s``."""
        stay = self._stays[lease_id]
        seconds = dict.fromkeys(SequenceState, 0.0) | stay.seconds
        if now_s is not None:
            seconds[stay.state] += now_s - stay.since_s
        copying_s = seconds[SequenceState.SWAPPING_OUT] + seconds[SequenceState.SWAPPING_IN]
        return SequenceHistory(
            num_displaced=stay.num_displaced,
            num_swapped=stay.num_swapped,
            num_repredictions=num_repredictions,
            paused_s=seconds[SequenceState.PAUSED],
            swapped_s=copying_s + seconds[SequenceState.SWAPPED],
            copying_s=copying_s,
        )

    def seconds(self, now_s: float) -> Mapping[SequenceState, float]:
        """State → seconds that sequences were in it until ``now_s``, of all so far."""
        self._settle(now_s)
        return dict(self._seconds)

    def check_integrity(self) -> None:
        """Proves the invariant. Raises AssertionError."""
        counted = dict.fromkeys(SequenceState, 0)
        for stay in self._stays.values():
            counted[stay.state] += 1
        assert counted == self._counts, "counts of states are wrong"

    def _settle(self, now_s: float) -> None:
        """Counts the seconds since the last change."""
        elapsed_s, self._settled_at_s = now_s - self._settled_at_s, now_s
        for state, number in self._counts.items():
            if number:
                self._seconds[state] += number * elapsed_s
