"""For how long a worker's sequences were in which state. Pure; time is an argument.

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
from dataclasses import dataclass, field
from enum import StrEnum


class SequenceState(StrEnum):
    """See the table at the head of this module."""

    PREFILL = "prefill"
    BATCHED = "batched"
    PAUSED = "paused"
    SWAPPING_OUT = "swapping_out"
    SWAPPED = "swapped"
    SWAPPING_IN = "swapping_in"


@dataclass(slots=True)
class _Stay:
    """The state of one sequence since ``since_s``, and its seconds in each state before."""

    state: SequenceState
    since_s: float
    seconds: dict[SequenceState, float] = field(default_factory=dict)


class SequenceStates:
    """Owns the state of each sequence of one worker, its seconds by state, and those of all its sequences together.

    Invariant: ``_counts`` is the number of sequences in each state.
    """

    def __init__(self) -> None:
        self._stays: dict[int, _Stay] = {}
        """By the id of the lease."""
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
        stay.seconds = self.seconds_of(lease_id, now_s)
        stay.state, stay.since_s = state, now_s

    def end(self, lease_id: int, now_s: float) -> None:
        """The worker has the sequence no longer."""
        self._settle(now_s)
        self._counts[self._stays.pop(lease_id).state] -= 1

    def seconds(self, now_s: float) -> Mapping[SequenceState, float]:
        """State → seconds that sequences were in it until ``now_s``, of all so far."""
        self._settle(now_s)
        return dict(self._seconds)

    def seconds_of(self, lease_id: int, now_s: float) -> dict[SequenceState, float]:
        """State → seconds that one sequence was in it until ``now_s``. Raises KeyError if the worker does not have it.

        States that it was not in are missing.
        """
        stay = self._stays[lease_id]
        return {**stay.seconds, stay.state: stay.seconds.get(stay.state, 0.0) + now_s - stay.since_s}

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
