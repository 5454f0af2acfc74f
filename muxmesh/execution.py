"""What became of a sequence once a worker had it: pre-emptions by reason, and its time in and out of the batch. Pure.

A decode worker reports it for each attempt, the router adds the attempts up, and a client gets the sum. Other
processes have no copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class PreemptionReason(StrEnum):
    """Why a sequence was pre-empted. The first five displace it from a full batch, and it keeps its KV."""

    ORDER = "order"
    """A sequence of its own class precedes it."""
    SLO = "slo"
    """The next token of a sequence of its own class is due."""
    PRIORITY = "priority"
    """A sequence of a better class has come."""
    FAIRNESS = "fairness"
    """A sequence of a tenant that had less service precedes it."""
    OVERDUE = "overdue"
    """Another sequence is overdue."""
    KV_GROWTH = "kv_growth"
    """A growing sequence that precedes it needs its memory."""
    KV_ADMISSION = "kv_admission"
    """A queued request or a swapped sequence that precedes it needs its memory."""
    KV_QUOTA = "kv_quota"
    """Another model needs memory within its quota, which the model of the sequence has borrowed."""
    KV_FULL = "kv_full"
    """It needs another token block itself, and there is none."""

    @property
    def is_memory(self) -> bool:
        """Whether it loses its token blocks: its KV is swapped or computed again."""
        return self.value.startswith("kv_")


@dataclass(frozen=True, slots=True)
class Execution:
    """What became of a sequence after its prefill. Of several sequences or attempts: the sum.

    ``preemptions``: number by reason, without reasons that did not occur. ``num_repredictions``: how often its length
    was predicted again. ``num_recomputed``: pre-emptions after which its KV was computed again.

    ``batched_s``: seconds in the batch of a decode worker, the waits for the device included. ``paused_s``: displaced
    from it, or between two copies of its KV, which is in the pool. ``swapped_s``: its KV was swapped out, the copies
    included. ``recomputed_s``: from the end of an attempt until the next one had computed its KV again, the wait for
    memory included. ``is_overdue``: it has waited for so long that it was overdue.
    """

    preemptions: Mapping[PreemptionReason, int] = field(default_factory=dict)
    num_repredictions: int = 0
    num_recomputed: int = 0
    batched_s: float = 0.0
    paused_s: float = 0.0
    swapped_s: float = 0.0
    recomputed_s: float = 0.0
    is_overdue: bool = False

    @property
    def num_preemptions(self) -> int:
        """For all reasons together."""
        return sum(self.preemptions.values())

    @property
    def num_displaced(self) -> int:
        """How often others displaced it from a batch, where it kept its KV; `muxmesh.batch_choice` limits this."""
        return sum(count for reason, count in self.preemptions.items() if not reason.is_memory)

    def plus(self, other: Execution) -> Execution:
        """The sum of both; overdue if one of them is."""
        return Execution(
            dict(Counter(self.preemptions) + Counter(other.preemptions)),
            self.num_repredictions + other.num_repredictions,
            self.num_recomputed + other.num_recomputed,
            self.batched_s + other.batched_s,
            self.paused_s + other.paused_s,
            self.swapped_s + other.swapped_s,
            self.recomputed_s + other.recomputed_s,
            self.is_overdue or other.is_overdue,
        )


NO_EXECUTION = Execution()
