"""The metrics of a worker: what it counts in its slot of the grant page, and what only its own process knows.

kvstore does not export the same words: a worker's counters start at 0 with its process, as Prometheus expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.device_memory import Transport
from kvstore.grant_page import GrantPage, Word
from muxmesh.metrics.family import Family, Histogram, counter, histogram
from muxmesh.types import Role

HAND_OFF_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


@dataclass(slots=True)
class WorkerCounters:
    """What the services of a phase count."""

    num_preemptions: int = 0
    """Sequences that were pre-empted for memory: their KV was swapped or freed."""
    num_displaced: int = 0
    """Sequences that others displaced from the batch; they kept their KV."""
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
            {labels: counters.num_preemptions + counters.num_displaced},
        )  # fmt: skip
        yield counter(
            "muxmesh_preemptions_total",
            "Sequences that were pre-empted: by others that precede them in the batch (order), or for memory (kv).",
            ("unit", "model_name", "reason"),
            {(*labels, "order"): counters.num_displaced, (*labels, "kv"): counters.num_preemptions},
        )  # fmt: skip
        yield counter(
            "muxmesh_swap_copied_bytes_total", "Bytes copied to and from the swap region.",
            ("unit", "model_name", "direction"),
            {(*labels, "out"): self._read(Word.SWAP_OUT_BYTES), (*labels, "in"): self._read(Word.SWAP_IN_BYTES)},
        )  # fmt: skip
        yield counter(
            "muxmesh_swap_seconds_total", "Seconds of these copies.", ("unit", "model_name"),
            {labels: self._s(Word.SWAP_NS)},
        )  # fmt: skip

    def _read(self, word: Word) -> int:
        return self.page.read(self.slot, word)

    def _s(self, word: Word) -> float:
        return self._read(word) / 1e9

    def _counter(self, name: str, help_text: str, value: float) -> Family:
        labels = (self.unit, self.model, self.role.value)
        return counter(name, help_text, ("unit", "model_name", "role"), {labels: value})
