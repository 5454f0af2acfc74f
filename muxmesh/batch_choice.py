"""Which sequences form the batch of a step when a worker has more of them than its batch holds. Pure.

A sequence that is in the batch stays there until it ends, unless one that waits displaces it. It keeps its KV and its
position in the order, and returns when a slot is free or it displaces another one in turn. The engine's scheduler and
the simulator choose the batch here. Admission asks the same rules whether a queued request would get a slot
(`kvstore.worker_slots`).

Within one priority class a sequence displaces another one only if it precedes it by the policy, its remaining work is
less than half of the other's, and the other has sampled at most 80 % of its expected output (TRAIL, Shahout et al.
2025: pre-empting shortly before the end costs more than it gains). A better class displaces without these conditions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import SchedulingState

DISPLACING_RATIO = 0.5
"""Of the victim's remaining work: a sequence of the same class with less of it displaces the victim."""
NEARLY_DONE = 0.8
"""From this part of its expected output on, a sequence is displaced by better classes only."""
MAX_PREEMPTIONS = 3
"""A sequence is displaced at most this often by its own class."""
MAX_CLASS_PREEMPTIONS = 8
"""A sequence that was displaced this often, by any class, is not displaced again."""


class Batchable(Protocol):
    """What `choose_batch` reads of a sequence."""

    @property
    def scheduling(self) -> SchedulingState:
        """Its state with the remaining work of now."""

    @property
    def is_batched(self) -> bool:
        """Whether the batch of the last step had it."""

    @property
    def num_preemptions(self) -> int:
        """How often it was displaced."""

    @property
    def is_nearly_done(self) -> bool:
        """Whether it has sampled more than `NEARLY_DONE` of its expected output."""


_Item = TypeVar("_Item", bound=Batchable)


def displaces(newcomer: SchedulingState, victim: Batchable, policy: SchedulingPolicy, now_s: float) -> bool:
    """Whether a sequence that waits takes the slot of ``victim``, which is in the batch, at ``now_s`` (unix time)."""
    held = victim.scheduling
    if newcomer.priority == held.priority and not policy.is_overdue(newcomer, now_s):
        if newcomer.remaining_s >= DISPLACING_RATIO * held.remaining_s:  # first, as it decides most often
            return False
        if victim.num_preemptions >= MAX_PREEMPTIONS or victim.is_nearly_done or policy.is_overdue(held, now_s):
            return False
        return policy.sort_key(newcomer, now_s) < policy.sort_key(held, now_s)
    if victim.num_preemptions >= MAX_CLASS_PREEMPTIONS or policy.is_overdue(held, now_s):
        return False
    return newcomer.priority < held.priority or policy.is_overdue(newcomer, now_s)


def choose_batch(items: Sequence[_Item], policy: SchedulingPolicy, now_s: float, max_num_seqs: int) -> list[_Item]:
    """Returns the ``max_num_seqs`` items, or all if they are fewer, that the next step computes.

    At most ``max_num_seqs`` of the items are in the batch already. Free slots go to the first of those that wait. Then,
    in one step, at most half of the batch is displaced, the last in the order first. ``now_s``: unix time.
    """
    if len(items) <= max_num_seqs:
        return list(items)
    batch = [item for item in items if item.is_batched]
    assert len(batch) <= max_num_seqs, "more sequences are in the batch than it holds"
    waiting = sorted(
        (item for item in items if not item.is_batched), key=lambda item: policy.sort_key(item.scheduling, now_s)
    )
    num_free = max_num_seqs - len(batch)
    batch, waiting = batch + waiting[:num_free], waiting[num_free:]
    reach = Reach(batch, policy, now_s)
    held: list[_Item] | None = None
    num_displaced = 0
    for newcomer in waiting:
        if num_displaced >= max(1, max_num_seqs // 2):
            break
        if not reach.may_displace(newcomer.scheduling):
            continue
        if held is None:
            held = sorted(batch, key=lambda item: policy.sort_key(item.scheduling, now_s), reverse=True)
        victim = next((item for item in held if displaces(newcomer.scheduling, item, policy, now_s)), None)
        if victim is not None:
            held.remove(victim)
            batch[batch.index(victim)] = newcomer
            num_displaced += 1
    return batch


class Reach:
    """A quick answer to whether a sequence may displace any of a batch, without looking at each: it errs to yes."""

    def __init__(self, batch: Iterable[Batchable], policy: SchedulingPolicy, now_s: float) -> None:
        self._policy, self._now_s = policy, now_s
        self._worst_class, self._longest_s = -math.inf, 0.0
        for item in batch:
            state = item.scheduling
            self._worst_class = max(self._worst_class, state.priority)
            if item.num_preemptions < MAX_PREEMPTIONS and not item.is_nearly_done:
                self._longest_s = max(self._longest_s, state.remaining_s)

    def may_displace(self, newcomer: SchedulingState) -> bool:
        """False only if ``newcomer`` displaces none of the batch."""
        return (
            newcomer.remaining_s < DISPLACING_RATIO * self._longest_s
            or newcomer.priority < self._worst_class
            or self._policy.is_overdue(newcomer, self._now_s)
        )
