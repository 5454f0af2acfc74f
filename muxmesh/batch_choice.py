"""Which sequences form the batch of a step when a worker has more of them than its batch holds. Pure.

A sequence that is in the batch stays there until it ends, unless one that waits displaces it. It keeps its KV and its
position in the order, and returns when a slot is free or it displaces another one in turn. The engine's scheduler and
the simulator choose the batch here. Admission asks the same rules whether a queued request would get a slot
(`kvstore.worker_slots`).

Within one priority class a sequence displaces another one only if it precedes it by the policy, its remaining work is
less than half of the other's, and the other has sampled at most 80 % of its expected output (TRAIL, Shahout et al.
2025: pre-empting shortly before the end costs more than it gains). A better class displaces without these conditions.

**Slack goes before remaining work.** A sequence with a TPOT target that could miss it by waiting is not displaced by
its own class: its slack has to be at least the longest work of a sequence that may displace it. One that waits and
whose next token is due goes before the others that wait, and displaces a sequence of its class that is not protected,
however much work it has. Once it is ahead of its target, remaining work decides again. One that has missed its SLO is
treated as if it had none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from typing import Protocol, TypeVar

from muxmesh.remaining_work import RemainingWork
from muxmesh.scheduling_policy import SchedulingPolicy, SortKey
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
    def is_protected(self) -> bool:
        """Whether its own class does not displace it, see `is_protected`."""


class Computable(Batchable, Protocol):
    """What `choose_batch` reads of a sequence of its own worker."""

    @property
    def slack_s(self) -> float:
        """Seconds until its next token is due by its SLO, see `muxmesh.slo.slack_s`."""


_Item = TypeVar("_Item", bound=Computable)


def is_protected(work: RemainingWork, slack_s: float) -> bool:
    """Whether its own class does not displace a sequence: it is nearly done, or it could miss its SLO."""
    return work.is_past(NEARLY_DONE) or slack_s < DISPLACING_RATIO * work.state.remaining_s


def displaces(
    newcomer: SchedulingState, victim: Batchable, policy: SchedulingPolicy, now_s: float, is_due: bool = False
) -> bool:
    """Whether a sequence that waits takes the slot of ``victim``, which is in the batch, at ``now_s`` (unix time).

    ``is_due``: whether the next token of the one that waits is due.
    """
    held = victim.scheduling
    if newcomer.priority == held.priority and not policy.is_overdue(newcomer, now_s):
        if newcomer.remaining_s >= DISPLACING_RATIO * held.remaining_s and not is_due:  # it decides most often
            return False
        if victim.num_preemptions >= MAX_PREEMPTIONS or victim.is_protected or policy.is_overdue(held, now_s):
            return False
        return is_due or policy.sort_key(newcomer, now_s) < policy.sort_key(held, now_s)
    if victim.num_preemptions >= MAX_CLASS_PREEMPTIONS or policy.is_overdue(held, now_s):
        return False
    return newcomer.priority < held.priority or policy.is_overdue(newcomer, now_s)


def choose_batch(items: Sequence[_Item], policy: SchedulingPolicy, now_s: float, max_num_seqs: int) -> list[_Item]:
    """Returns the ``max_num_seqs`` items, or all if they are fewer, that the next step computes.

    At most ``max_num_seqs`` of the items are in the batch already. Free slots go to the first of those that wait, of
    each class those whose next token is due before the others. Then,
    in one step, at most half of the batch is displaced, the last in the order first. ``now_s``: unix time.
    """
    if len(items) <= max_num_seqs:
        return list(items)
    batch = [item for item in items if item.is_batched]
    assert len(batch) <= max_num_seqs, "more sequences are in the batch than it holds"

    def position(item: _Item) -> tuple[int, bool, SortKey]:
        key = policy.sort_key(item.scheduling, now_s)
        return key[0], item.slack_s > 0, key

    waiting = sorted((item for item in items if not item.is_batched), key=position)
    num_free = max_num_seqs - len(batch)
    batch, waiting = batch + waiting[:num_free], waiting[num_free:]
    reach = Reach(batch, policy, now_s)
    held: list[_Item] | None = None
    num_displaced = 0
    for newcomer in waiting:
        if num_displaced >= max(1, max_num_seqs // 2):
            break
        is_due = newcomer.slack_s <= 0
        if not is_due and not reach.may_displace(newcomer.scheduling):
            continue
        if held is None:
            held = sorted(batch, key=lambda item: policy.sort_key(item.scheduling, now_s), reverse=True)
        victim = next((item for item in held if displaces(newcomer.scheduling, item, policy, now_s, is_due)), None)
        if victim is not None:
            held.remove(victim)
            batch[batch.index(victim)] = newcomer
            num_displaced += 1
    return batch


class Reach:
    """Which sequences may displace others of one batch at one time, without looking at each of it again.

    Of the batch's sequences that their own class may displace it keeps the remaining work, the longest first, and the
    last position in the order up to each.
    """

    def __init__(self, batch: Sequence[Batchable], policy: SchedulingPolicy, now_s: float) -> None:
        """``now_s``: unix time."""
        self._batch, self._policy, self._now_s = batch, policy, now_s
        self._worst_class = max((item.scheduling.priority for item in batch), default=-math.inf)
        states = [item.scheduling for item in batch if item.num_preemptions < MAX_PREEMPTIONS and not item.is_protected]
        self._states = sorted(states, key=lambda state: -state.remaining_s)
        self._negated_bounds = [-DISPLACING_RATIO * state.remaining_s for state in self._states]
        """Negated, so that they increase: the newcomer's remaining work has to be less."""
        self._keys: list[SortKey] = []
        """Of the first of ``_states``, as far as they were needed."""
        self._last_keys: list[SortKey] = []
        """The maximum of the keys up to each."""

    def may_displace(self, newcomer: SchedulingState) -> bool:
        """Whether ``newcomer`` displaces at least one of the batch."""
        return self.may_displace_more_than(0, newcomer)

    def may_displace_more_than(self, number: int, newcomer: SchedulingState) -> bool:
        """Whether there are more than ``number`` sequences of which ``newcomer`` displaces any one."""
        policy, now_s = self._policy, self._now_s
        if newcomer.priority < self._worst_class or policy.is_overdue(newcomer, now_s):
            victims = (one for one in self._batch if displaces(newcomer, one, policy, now_s))
            return next(islice(victims, number, None), None) is not None
        num_longer = bisect_left(self._negated_bounds, -newcomer.remaining_s)
        if num_longer <= number:
            return False
        for state in self._states[len(self._keys) : num_longer]:
            key = policy.sort_key(state, now_s)
            self._last_keys.append(max(key, self._last_keys[-1]) if self._last_keys else key)
            self._keys.append(key)
        own = policy.sort_key(newcomer, now_s)
        if not own < self._last_keys[num_longer - 1]:
            return False
        return number == 0 or sum(own < key for key in self._keys[:num_longer]) > number
