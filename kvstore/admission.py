"""Which waiting request gets the next credit. Pure.

Order is decided late: routers show only keys, and a credit goes to the best key of all routers as soon as the unit
has room for it, so that decode room is reserved before prefill starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from muxmesh.types import KvDemand, OrderKey


@dataclass(frozen=True, slots=True)
class WaitingKey:
    """What a unit knows of a waiting request."""

    router: str
    key_id: int
    model: str
    order: OrderKey
    demand: KvDemand


class Admission:
    """Owns the keys that routers show. Invariant: a key is here once, until it gets a credit or is withdrawn."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, int], WaitingKey] = {}

    def offer(self, key: WaitingKey) -> None:
        """A request waits. Offering it again replaces what was known."""
        self._waiting[key.router, key.key_id] = key

    def withdraw(self, router: str, key_id: int) -> None:
        """A request waits no longer; one that got its credit meanwhile is fine."""
        self._waiting.pop((router, key_id), None)

    def drop_router(self, router: str) -> None:
        """A router is gone, and its requests with it."""
        self._waiting = {place: key for place, key in self._waiting.items() if key.router != router}

    def count(self, model: str) -> int:
        """Keys that wait for ``model``."""
        return sum(key.model == model for key in self._waiting.values())

    def admit(
        self,
        has_slot: Callable[[str], bool],
        is_within_quota: Callable[[WaitingKey], bool],
        try_credit: Callable[[WaitingKey, bool], bool],
    ) -> None:
        """Gives credits in order for as long as there is room.

        ``has_slot(model)``: its workers can take one more. ``is_within_quota(key)``: with it, its model would use no
        more than its quota. ``try_credit(key, lend)``: reserves the blocks and sends the credit, or says that there is
        no room; with ``lend``, past the model's quota.

        First come the keys within their model's quota. Only if none of them lacks room, what is left is lent to the
        others, so that loans come back to those who can claim them. No key is overtaken for ever by smaller ones:
        within a quota, one without room holds up its own model; past it, the whole round.
        """
        keys = sorted(self._waiting.values(), key=lambda key: (key.order, key.router, key.key_id))
        passed: set[str] = set()
        claims_wait = False
        for key in keys:
            if key.model in passed or not has_slot(key.model):
                continue
            if not is_within_quota(key):
                passed.add(key.model)
            elif try_credit(key, False):
                del self._waiting[key.router, key.key_id]
            else:
                passed.add(key.model)
                claims_wait = True
        if claims_wait:
            return
        for key in keys:
            if (key.router, key.key_id) in self._waiting and has_slot(key.model):
                if not try_credit(key, True):
                    return
                del self._waiting[key.router, key.key_id]
