"""The router's waiting requests, and which of them a unit is shown. Pure."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from muxmesh.order import FCFS, Key, Order
from muxmesh.types import KvDemand, Standing

SHOWN_PER_MODEL = 64
"""A unit needs to see only as many keys as it could give credits for at once."""
SORT_EVERY_S = 0.1
"""How stale an order that moves by waiting alone may get."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for a credit."""

    key_id: int
    model: str
    standing: Standing
    demand: KvDemand


class WaitingRequests:
    """Owns the requests that wait.

    Invariant: of each model, the best as of the last sorting are shown. Under an order that does not move with time
    they are no worse than any that is not shown.
    """

    def __init__(self, order: Order = FCFS, shown_per_model: int = SHOWN_PER_MODEL) -> None:
        self._order = order
        self._limit = shown_per_model
        self._waiting: dict[int, Waiting] = {}
        self._ordered: dict[str, list[tuple[Key, int]]] = {}
        self._shown: set[int] = set()
        self._sorted_at_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting) -> None:
        """A request begins to wait."""
        self._waiting[waiting.key_id] = waiting
        bisect.insort(self._ordered.setdefault(waiting.model, []), self._entry(waiting))

    def remove(self, key_id: int) -> bool:
        """A request waits no longer; True if the unit was shown it."""
        waiting = self._waiting.pop(key_id, None)
        if waiting is None:
            return False
        ordered = self._ordered[waiting.model]
        del ordered[bisect.bisect_left(ordered, self._entry(waiting))]
        shown = key_id in self._shown
        self._shown.discard(key_id)
        return shown

    def hide_all(self) -> None:
        """The unit forgot everything (it was restarted)."""
        self._shown.clear()

    def count(self, model: str) -> int:
        """Requests that wait for ``model``."""
        return len(self._ordered.get(model, ()))

    def show_next(self, unix_s: float) -> list[Waiting]:
        """Requests that the unit should see now and has not seen; they count as shown from here on."""
        if self._order.moves and abs(unix_s - self._sorted_at_s) >= SORT_EVERY_S:  # the clock may jump
            self._sorted_at_s = unix_s
            for model, ordered in self._ordered.items():
                self._ordered[model] = sorted(self._entry(self._waiting[key_id]) for _, key_id in ordered)
        best = (key_id for ordered in self._ordered.values() for _, key_id in ordered[: self._limit])
        fresh = [self._waiting[key_id] for key_id in best if key_id not in self._shown]
        self._shown.update(waiting.key_id for waiting in fresh)
        return fresh

    def _entry(self, waiting: Waiting) -> tuple[Key, int]:
        return self._order.key(waiting.standing, self._sorted_at_s), waiting.key_id
