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

    def admit(self, has_slot: Callable[[str], bool], try_credit: Callable[[WaitingKey], bool]) -> None:
        """Gives credits in order for as long as there is room.

        ``has_slot(model)``: its workers can take one more. ``try_credit(key)``: reserves the blocks and sends the
        credit, or says that there is no room. A model without a slot is passed over; a key without room ends the
        round, so that a small request never overtakes a large one for ever.
        """
        for key in sorted(self._waiting.values(), key=lambda key: (key.order, key.router, key.key_id)):
            if not has_slot(key.model):
                continue
            if not try_credit(key):
                return
            del self._waiting[key.router, key.key_id]
