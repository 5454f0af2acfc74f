"""The router's waiting requests, and which of them a unit is shown. Pure."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from muxmesh.types import KvDemand, OrderKey

SHOWN_PER_MODEL = 64
"""A unit needs to see only as many keys as it could give credits for at once."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for a credit."""

    key_id: int
    model: str
    order: OrderKey
    demand: KvDemand


class WaitingRequests:
    """Owns the requests that wait. Invariant: of each model, the shown ones are no worse than any that is not shown."""

    def __init__(self, shown_per_model: int = SHOWN_PER_MODEL) -> None:
        self._limit = shown_per_model
        self._waiting: dict[int, Waiting] = {}
        self._ordered: dict[str, list[tuple[OrderKey, int]]] = {}
        self._shown: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting) -> None:
        """A request begins to wait."""
        self._waiting[waiting.key_id] = waiting
        bisect.insort(self._ordered.setdefault(waiting.model, []), (waiting.order, waiting.key_id))

    def remove(self, key_id: int) -> bool:
        """A request waits no longer; True if the unit was shown it."""
        waiting = self._waiting.pop(key_id, None)
        if waiting is None:
            return False
        ordered = self._ordered[waiting.model]
        del ordered[bisect.bisect_left(ordered, (waiting.order, key_id))]
        shown = key_id in self._shown
        self._shown.discard(key_id)
        return shown

    def hide_all(self) -> None:
        """The unit forgot everything (it was restarted)."""
        self._shown.clear()

    def count(self, model: str) -> int:
        """Requests that wait for ``model``."""
        return len(self._ordered.get(model, ()))

    def show_next(self) -> list[Waiting]:
        """Requests that the unit should see now and has not seen; they count as shown from here on."""
        best = (key_id for ordered in self._ordered.values() for _, key_id in ordered[: self._limit])
        fresh = [self._waiting[key_id] for key_id in best if key_id not in self._shown]
        self._shown.update(waiting.key_id for waiting in fresh)
        return fresh
