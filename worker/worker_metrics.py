"""The metrics of a worker: what it counts in its slot of the grant page, and what only its own process knows.

kvstore does not export the same words: a worker's counters start at 0 with its process, as Prometheus expects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvstore.device_memory import Transport
from kvstore.grant_page import GrantPage, Word
from muxmesh.clock import Clock
from muxmesh.execution import PreemptionReason
from muxmesh.metrics.family import Family, Histogram, Labels, counter, histogram
from muxmesh.sequence_states import SequenceState, SequenceStates
from muxmesh.types import KvFormat, Role

SwapKind = tuple[Literal["out", "in"], KvFormat]
"""Direction and format of a copy of KV."""
HAND_OFF_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


@dataclass(slots=True)
class SwapCount:
    """Copies of KV of one kind: their number, bytes and seconds."""

    num_copies: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """One more copy."""
        self.num_copies, self.num_bytes, self.seconds = (
            self.num_copies + 1, self.num_bytes + num_bytes, self.seconds + seconds,
        )  # fmt: skip


def _no_swaps() -> dict[SwapKind, SwapCount]:
    return {(direction, kv_format): SwapCount() for direction in ("out", "in") for kv_format in ("raw", "int8")}


@dataclass(slots=True)
class WorkerCounters:
    """What the services of a phase count."""

    preemptions: Counter[PreemptionReason] = field(default_factory=Counter)
    """How often sequences were pre-empted."""
    num_recomputed: int = 0
    """How often the KV of one was freed without a copy: the next attempt computes it again."""
    num_repredictions: int = 0
    """How often the length of a sequence was predicted again, of the sequences that have ended."""
    states: SequenceStates = field(default_factory=SequenceStates)
    swaps: dict[SwapKind, SwapCount] = field(default_factory=_no_swaps)
    """Copies that are complete."""
    handoff_s: Histogram = field(default_factory=lambda: Histogram(HAND_OFF_S))
    """Seconds of each hand-off: of the call that moves the lease."""


@dataclass(frozen=True, slots=True)
class WorkerMetrics:
    """The sources of a worker's metrics. ``kv_bytes_per_token``: what a computed token writes into the pool."""

    unit: str
    model: str
    role: Role
    transport: Transport
    page: GrantPage
    slot: int
    kv_bytes_per_token: int
    counters: WorkerCounters
    clock: Clock

    def families(self) -> Iterator[Family]:
        """All metrics, with the values of now."""
        steps, tokens, written = map(self._read, (Word.NUM_STEPS, Word.NUM_COMPUTED_TOKENS, Word.KV_BYTES_WRITTEN))
        yield self._counter(
            "muxmesh_worker_busy_seconds_total", "Seconds under a compute grant.", self._s(Word.BUSY_NS)
        )
        yield self._counter("muxmesh_worker_grants_total", "Compute grants received.", self._read(Word.NUM_GRANTS))
        yield self._counter(
            "muxmesh_worker_grant_wait_seconds_total", "Seconds waited for a compute grant.",
            self._s(Word.GRANT_WAIT_NS),
        )  # fmt: skip
        yield self._counter("muxmesh_worker_steps_total", "Steps computed.", steps)
        yield self._counter("muxmesh_worker_computed_tokens_total", "Tokens computed.", tokens)
        yield self._counter("muxmesh_kv_written_bytes_total", "Bytes of KV written into the pool.", written)
        yield self._counter(
            "muxmesh_kv_copied_bytes_total", "Bytes of KV written beyond those of computed tokens: copies.",
            max(0, written - tokens * self.kv_bytes_per_token),
        )  # fmt: skip
        yield self._states()
        if self.role is Role.PREFILL:
            yield histogram(
                "muxmesh_handoff_seconds", "Seconds of each hand-off of a sequence to decode, by transport.",
                ("unit", "model_name", "transport"),
                {(self.unit, self.model, str(self.transport)): self.counters.handoff_s},
            )  # fmt: skip
        else:
            yield from self._decode_families()

    def _decode_families(self) -> Iterator[Family]:
        labels = (self.unit, self.model)
        counters = self.counters
        yield counter(
            "vllm:num_preemptions_total", "Sequences that were pre-empted.", ("unit", "model_name"),
            {labels: counters.preemptions.total()},
        )  # fmt: skip
        yield counter(
            "muxmesh_preemptions_total",
            "Sequences that were pre-empted, by reason; those for memory begin with kv.",
            ("unit", "model_name", "reason"),
            {(*labels, reason): counters.preemptions[reason] for reason in PreemptionReason},
        )  # fmt: skip
        yield counter(
            "muxmesh_recomputed_sequences_total",
            "Sequences that were pre-empted for memory and not swapped: their KV is computed again.",
            ("unit", "model_name"), {labels: counters.num_recomputed},
        )  # fmt: skip
        yield counter(
            "muxmesh_repredictions_total", "How often the lengths of sequences that have ended were predicted again.",
            ("unit", "model_name"), {labels: counters.num_repredictions},
        )  # fmt: skip
        swaps = {(*labels, *kind): swap for kind, swap in counters.swaps.items()}
        yield self._swaps(
            "muxmesh_swap_copies_total", "Copies of sequences to and from the swap region.",
            {key: swap.num_copies for key, swap in swaps.items()},
        )  # fmt: skip
        yield self._swaps(
            "muxmesh_swap_copied_bytes_total", "Bytes of these copies, as they are in the swap region.",
            {key: swap.num_bytes for key, swap in swaps.items()},
        )  # fmt: skip
        yield self._swaps(
            "muxmesh_swap_seconds_total", "Seconds of these copies.", {key: one.seconds for key, one in swaps.items()}
        )

    @staticmethod
    def _swaps(name: str, help_text: str, samples: Mapping[Labels, float]) -> Family:
        return counter(name, help_text, ("unit", "model_name", "direction", "format"), samples)

    def _states(self) -> Family:
        """Seconds by state; prefill is the one state of the sequences of a prefill worker."""
        seconds = self.counters.states.seconds(self.clock.monotonic_s())
        return counter(
            "muxmesh_sequence_seconds_total", "Seconds that sequences were in a state.",
            ("unit", "model_name", "state"),
            {
                (self.unit, self.model, state): seconds[state]
                for state in SequenceState
                if (state is SequenceState.PREFILL) is (self.role is Role.PREFILL)
            },
        )  # fmt: skip

    def _read(self, word: Word) -> int:
        return self.page.read(self.slot, word)

    def _s(self, word: Word) -> float:
        return self._read(word) / 1e9

    def _counter(self, name: str, help_text: str, value: float) -> Family:
        labels = (self.unit, self.model, self.role.value)
        return counter(name, help_text, ("unit", "model_name", "role"), {labels: value})
