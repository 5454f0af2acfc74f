"""Which sequences form the batch of a step when a worker has more of them than its batch holds. Pure.

A sequence that is in the batch stays there until it ends, unless one that waits displaces it. It keeps its KV and its
position in the order, and returns when a slot is free or it displaces another one in turn. The engine's scheduler and
the simulator choose the batch here. Admission asks the same rules whether a queued request would get a slot
(`kvstore.worker_slots`).

Within one priority class a sequence displaces another one only if it precedes it by the policy, its remaining work is
less than half of the other's, and the other has sampled at most 80 % of its expected output (TRAIL, Shahout et al.
2025: pre-empting shortly before the end costs more than it gains). A better class displaces without these conditions,
and so does a sequence of a tenant that had less service (`SchedulingState.precedence`): what holds for classes below
holds for groups of tenants too.

**Slack goes before remaining work.** A sequence with a TPOT target that could miss it by waiting is not displaced by
its own class: its slack has to be at least the longest work of a sequence that may displace it. One that waits and
whose next token is due goes before the others that wait, and displaces a sequence of its class that is not protected,
however much work it has. Once it is ahead of its target, remaining work decides again. One that has missed its SLO is
treated as if it had none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from muxmesh.execution import PreemptionReason
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
    if _is_same_class(newcomer, held) and not policy.precedes_all(newcomer, now_s):
        if newcomer.remaining_s >= DISPLACING_RATIO * held.remaining_s and not is_due:  # it decides most often
            return False
        if victim.num_preemptions >= MAX_PREEMPTIONS or victim.is_protected or policy.precedes_all(held, now_s):
            return False
        return is_due or policy.sort_key(newcomer, now_s) < policy.sort_key(held, now_s)
    if victim.num_preemptions >= MAX_CLASS_PREEMPTIONS or policy.precedes_all(held, now_s):
        return False
    return newcomer.precedence < held.precedence or policy.precedes_all(newcomer, now_s)


def _is_same_class(newcomer: SchedulingState, held: SchedulingState) -> bool:
    """Whether classes and tenants leave it to the policy which of the two goes first; of one tenant, classes alone."""
    if newcomer.precedence == held.precedence:
        return True
    is_same_tenant = newcomer.standing.tenant_number == held.standing.tenant_number
    return is_same_tenant and newcomer.class_rank == held.class_rank


def displacement_reason(
    newcomer: SchedulingState, victim: Batchable, policy: SchedulingPolicy, now_s: float, is_due: bool
) -> PreemptionReason:
    """Why a sequence that waits takes the slot of ``victim``; `displaces` holds for the same arguments."""
    if policy.precedes_all(newcomer, now_s):
        return PreemptionReason.OVERDUE
    held = victim.scheduling
    if not _is_same_class(newcomer, held):
        is_fairness = newcomer.standing.tenant_number != held.standing.tenant_number
        return PreemptionReason.FAIRNESS if is_fairness else PreemptionReason.PRIORITY
    return PreemptionReason.SLO if is_due else PreemptionReason.ORDER


def _ignore(victim: object, reason: PreemptionReason) -> None:
    pass


def choose_batch(
    items: Sequence[_Item],
    policy: SchedulingPolicy,
    now_s: float,
    max_num_seqs: int,
    on_displaced: Callable[[_Item, PreemptionReason], None] = _ignore,
) -> list[_Item]:
    """Returns the ``max_num_seqs`` items, or all if they are fewer, that the next step computes.

    At most ``max_num_seqs`` of the items are in the batch already. Free slots go to the first of those that wait, of
    each class those whose next token is due before the others. Then,
    in one step, at most half of the batch is displaced, the last in the order first; ``on_displaced`` is called with
    each of them. ``now_s``: unix time.
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
    reach = Reach(dict(enumerate(batch)), policy, now_s)
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
            on_displaced(victim, displacement_reason(newcomer.scheduling, victim, policy, now_s, is_due))
            held.remove(victim)
            batch[batch.index(victim)] = newcomer
            num_displaced += 1
    return batch


class Reach:
    """Which sequences may displace others of one batch, without looking at each of it again.

    Of the batch's sequences that their own class may displace it keeps the remaining work, the longest first, and the
    last position in the order up to each.
    """

    def __init__(self, batch: Mapping[int, Batchable], policy: SchedulingPolicy, now_s: float) -> None:
        """``batch``: number, at least 0, → sequence. ``now_s``: unix time.

        It is right at other times too if the policy's order is (`SchedulingPolicy.is_timeless`).
        """
        self._policy, self._now_s = policy, now_s
        self._batch = dict(batch)
        self._states = {number: item.scheduling for number, item in batch.items()}
        self._classes = Counter(state.precedence for state in self._states.values())
        self._worst_class = max(self._classes, default=-math.inf)
        self._bounds = {number: _bound(item.scheduling) for number, item in batch.items() if _is_displaceable(item)}
        self._longest = sorted((bound, number) for number, bound in self._bounds.items())
        self._keys: dict[int, SortKey] = {}
        """Of those of ``_longest`` for which they were needed."""
        self._last_keys: list[SortKey] = []
        """The maximum of the keys up to each of the first of ``_longest``, as far as they were needed."""

    def update(self, number: int, item: Batchable | None) -> None:
        """The sequence ``number`` has changed, is new in the batch, or (None) has left it."""
        if (old := self._states.pop(number, None)) is not None:
            del self._batch[number]
            self._classes[old.precedence] -= 1
            if not self._classes[old.precedence]:
                del self._classes[old.precedence]
            self._keys.pop(number, None)
            if (bound := self._bounds.pop(number, None)) is not None:
                position = bisect_left(self._longest, (bound, number))
                del self._longest[position], self._last_keys[position:]
        if item is not None:
            self._batch[number], self._states[number] = item, item.scheduling
            self._classes[item.scheduling.precedence] += 1
            if _is_displaceable(item):
                bound = self._bounds[number] = _bound(item.scheduling)
                position = bisect_left(self._longest, (bound, number))
                self._longest.insert(position, (bound, number))
                del self._last_keys[position:]
        self._worst_class = max(self._classes, default=-math.inf)

    def may_displace(self, newcomer: SchedulingState) -> bool:
        """Whether ``newcomer`` displaces at least one of the batch."""
        return self.may_displace_more_than(0, newcomer)

    def may_displace_more_than(self, number: int, newcomer: SchedulingState) -> bool:
        """Whether there are more than ``number`` sequences of which ``newcomer`` displaces any one."""
        policy, now_s = self._policy, self._now_s
        if newcomer.precedence < self._worst_class or policy.precedes_all(newcomer, now_s):
            victims = (one for one in self._batch.values() if displaces(newcomer, one, policy, now_s))
            return next(islice(victims, number, None), None) is not None
        num_longer = bisect_left(self._longest, (-newcomer.remaining_s, -1))
        if num_longer <= number:
            return False
        own = policy.sort_key(newcomer, now_s)
        if not own < self._last_key(num_longer):
            return False
        return number == 0 or sum(own < self._key_of(one) for _, one in self._longest[:num_longer]) > number

    def ends_before(self, key: SortKey) -> bool:
        """Whether no sequence that is at ``key`` in the order, or later, displaces any."""
        return not (key[0] < self._worst_class or (self._longest and key < self._last_key(len(self._longest))))

    def _last_key(self, num_longest: int) -> SortKey:
        """The last position in the order of the first ones of ``_longest``; at least 1 of them."""
        keys, last_keys = self._keys, self._last_keys
        last = last_keys[-1] if last_keys else None
        for _, number in self._longest[len(last_keys) : num_longest]:
            key = keys.get(number) or self._key_of(number)
            if last is None or last < key:
                last = key
            last_keys.append(last)
        return last_keys[num_longest - 1]

    def _key_of(self, number: int) -> SortKey:
        key = self._keys.get(number)
        if key is None:
            key = self._keys[number] = self._policy.sort_key(self._states[number], self._now_s)
        return key


def _is_displaceable(item: Batchable) -> bool:
    """Whether its own class may displace a sequence."""
    return item.num_preemptions < MAX_PREEMPTIONS and not item.is_protected


def _bound(held: SchedulingState) -> float:
    """The work that a sequence has to have less of to displace ``held``; negated, so that the longest is first."""
    return -DISPLACING_RATIO * held.remaining_s
