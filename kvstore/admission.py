"""Which waiting request gets the next credit, and which swapped lease its blocks. Pure.

Order is decided late: routers show only keys, and a credit goes to the best key of all routers as soon as the unit
has room for it, so that decode room is reserved before prefill starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from muxmesh.order import FCFS, Order
from muxmesh.types import KvDemand, LeaseRef, Standing


@dataclass(frozen=True, slots=True)
class WaitingKey:
    """What a unit knows of a waiting request, or of a swapped lease that wants token blocks again.

    ``asker`` is the router, or the worker that has the lease ``swapped``; ``key_id`` is its own.
    """

    asker: str
    key_id: int
    model: str
    standing: Standing
    demand: KvDemand
    swapped: LeaseRef | None = None


class Admission:
    """Owns the keys that routers and workers show.

    Invariant: a key is here once, until it gets what it waits for or is withdrawn.
    """

    def __init__(self, order: Order = FCFS) -> None:
        self._order = order
        self._waiting: dict[tuple[str, int], WaitingKey] = {}

    def offer(self, key: WaitingKey) -> None:
        """A request waits. Offering it again replaces what was known."""
        self._waiting[key.asker, key.key_id] = key

    def withdraw(self, asker: str, key_id: int) -> None:
        """A request waits no longer; one that got its credit meanwhile is fine."""
        self._waiting.pop((asker, key_id), None)

    def drop_asker(self, asker: str) -> None:
        """A router or a worker is gone, and its keys with it."""
        self._waiting = {place: key for place, key in self._waiting.items() if key.asker != asker}

    def count(self, model: str) -> int:
        """Keys that wait for ``model``."""
        return sum(key.model == model for key in self._waiting.values())

    def num_overtaken(self, winner: WaitingKey) -> int:
        """Keys of the same model and priority that came before ``winner`` and wait on."""
        alike = (k for k in self._waiting.values() if k.model == winner.model)
        won = winner.standing
        return sum(k.standing.priority == won.priority and k.standing.arrived_at_s < won.arrived_at_s for k in alike)

    def admit(
        self,
        unix_s: float,
        has_slot: Callable[[WaitingKey], bool],
        is_within_quota: Callable[[WaitingKey], bool],
        try_credit: Callable[[WaitingKey, bool], bool],
    ) -> bool:
        """Gives credits in order for as long as there is room.

        ``has_slot(key)``: its model's workers can take one more. ``is_within_quota(key)``: with it, its model would
        use no more than its quota. ``try_credit(key, lend)``: reserves the blocks and sends the credit, or says that
        there is no room; with ``lend``, past the model's quota.

        First come the keys within their model's quota. Only if none of them lacks room, what is left is lent to the
        others, so that loans come back to those who can claim them. No key is overtaken for ever by smaller ones:
        within a quota, one without room holds up its own model; past it, the whole round.

        Returns True if a key within its model's quota waits for room: what is lent has to come back.
        """
        keys = sorted(
            filter(has_slot, self._waiting.values()),
            key=lambda key: (self._order.key(key.standing, unix_s), key.asker, key.key_id),
        )
        passed: set[str] = set()
        claims_wait = False
        for key in keys:
            if key.model in passed or not has_slot(key):
                continue
            if not is_within_quota(key):
                passed.add(key.model)
            elif try_credit(key, False):
                del self._waiting[key.asker, key.key_id]
            else:
                passed.add(key.model)
                claims_wait = True
        if claims_wait:
            return True
        for key in keys:
            if (key.asker, key.key_id) in self._waiting and has_slot(key):
                if not try_credit(key, True):
                    break
                del self._waiting[key.asker, key.key_id]
        return False
