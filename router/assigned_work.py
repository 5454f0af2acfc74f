"""The sequences that one router has assigned to one unit, and what is left to compute of them. Pure.

It knows no other router's sequences: units report those (`UnitLoads` in kvstore.proto).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class AssignedSequence:
    """One sequence that waits for a credit of the unit or has one. ``prefill_s`` is 0 once its prompt is computed."""

    model: str
    prefill_s: float
    decode_s: float
    has_credit: bool = False


class AssignedWork:
    """Owns the sequences of one unit and the sums of their work.

    Invariant: each sum is that of the sequences that were added and are not removed; it is exactly 0 without any.
    """

    def __init__(self) -> None:
        self._num = Counter[str]()
        self._num_credited = Counter[str]()
        self._decode_s = defaultdict[str, float](float)
        self._prefill_s = 0.0
        self._num_to_prefill = 0
        self._queued_prefill_s = defaultdict[str, float](float)

    @property
    def prefill_s(self) -> float:
        """Seconds of prefill that are left, over all models: they share the device."""
        return self._prefill_s

    def queued_prefill_s(self, model: str) -> float:
        """The part of `prefill_s` of the sequences of one model that wait for a credit."""
        return self._queued_prefill_s.get(model, 0.0)

    def num(self, model: str) -> int:
        """Sequences of one model."""
        return self._num[model]

    def num_credited(self, model: str) -> int:
        """Sequences of one model that have a credit of the unit."""
        return self._num_credited[model]

    def mean_decode_s(self, model: str) -> float | None:
        """Mean seconds of decode of the sequences of one model; None without any."""
        num = self._num[model]
        return self._decode_s[model] / num if num else None

    def add(self, model: str, prefill_s: float, decode_s: float) -> AssignedSequence:
        """A sequence is assigned to the unit, with its work there."""
        self._num[model] += 1
        self._decode_s[model] += decode_s
        self._prefill_s += prefill_s
        self._num_to_prefill += prefill_s > 0
        self._queued_prefill_s[model] += prefill_s
        return AssignedSequence(model, prefill_s, decode_s)

    def credited(self, sequence: AssignedSequence) -> None:
        """A sequence has got its credit."""
        assert not sequence.has_credit, "a sequence has one credit"
        self._leave_queue(sequence)
        sequence.has_credit = True
        self._num_credited[sequence.model] += 1

    def prefilled(self, sequence: AssignedSequence) -> None:
        """The prompt of a sequence is computed."""
        self._leave_queue(sequence)
        if sequence.prefill_s > 0:
            self._num_to_prefill -= 1
            self._prefill_s = max(0.0, self._prefill_s - sequence.prefill_s) if self._num_to_prefill else 0.0
            sequence.prefill_s = 0.0

    def _leave_queue(self, sequence: AssignedSequence) -> None:
        if not sequence.has_credit and sequence.prefill_s > 0:
            model = sequence.model
            is_last = self._num[model] - self._num_credited[model] <= 1
            left_s = 0.0 if is_last else max(0.0, self._queued_prefill_s[model] - sequence.prefill_s)
            self._queued_prefill_s[model] = left_s

    def remove(self, sequence: AssignedSequence) -> None:
        """A sequence has ended, or leaves the unit."""
        self.prefilled(sequence)
        self._num[sequence.model] -= 1
        self._num_credited[sequence.model] -= sequence.has_credit
        self._decode_s[sequence.model] -= sequence.decode_s
        if not self._num[sequence.model]:
            del self._num[sequence.model], self._decode_s[sequence.model], self._queued_prefill_s[sequence.model]
