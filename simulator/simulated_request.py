"""One request in virtual time. Knows no unit and no worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from loadtest.record import Record
from muxmesh.types import LengthPrediction, SchedulingState, SloTargets
from router.assigned_work import AssignedSequence


def _ignore() -> None:
    pass


@dataclass(slots=True)
class SimulatedRequest:
    """One request with its progress. All numbers are tokens."""

    index: int
    model: str
    num_prompt: int
    num_output: int
    """The length that the output will have."""
    max_new_tokens: int
    arrived: SchedulingState
    """Before anything was computed."""
    prediction: LengthPrediction
    record: Record
    """Filled in with times, tokens and status."""
    on_end: Callable[[SimulatedRequest], None]
    """Called once, when the record is complete."""
    on_first_token: Callable[[], None] = _ignore
    """Called once, when the first token is sampled."""
    slo: SloTargets | None = None
    """As it arrived; see `slo_at`."""
    hashes: tuple[bytes, ...] = ()
    """Block hashes of the prompt; empty: it does not use the prefix cache."""
    num_sent: int = 0
    """Output tokens sampled so far."""
    num_preemptions: int = 0
    """How often others displaced it from a batch before its KV was freed."""
    entry_id: int = 0
    tenant: str = ""
    tenant_weight: float = 1.0
    assigned: AssignedSequence | None = None
    """Its work, as counted at its unit."""

    @property
    def max_tokens(self) -> int:
        """Tokens of the prompt and the longest possible output."""
        return self.num_prompt + self.max_new_tokens

    @property
    def scheduling(self) -> SchedulingState:
        """The state while the request is queued: the KV of its prompt has to be computed, again after a pre-emption."""
        state = self.arrived.after_output(self.num_sent, self.prediction, prefill_again=True)
        return replace(state, num_preemptions=self.num_preemptions) if self.num_preemptions else state

    def slo_at(self, now_s: float) -> SloTargets | None:
        """Its targets, as a worker gets them at ``now_s``."""
        return None if self.slo is None else replace(self.slo, waited_s=now_s - self.arrived.arrived_at_s)
