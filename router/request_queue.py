"""The queued requests of one unit's admission, and which of them the unit is shown. Pure."""

from __future__ import annotations

import bisect
import math

from muxmesh.scheduling_policy import FCFS, SchedulingPolicy, SortKey
from muxmesh.types import QueuedRequest, SchedulingState

SHOWN_PER_MODEL = 64
"""Queued requests that a unit sees of a model: at least as many as it can issue credits for at once."""
SORT_EVERY_S = 0.1
"""Maximum age of the order under a policy that changes with time, or while a request is overdue."""


class RequestQueue:
    """Owns the requests that wait for a credit of one unit, ordered for each model.

    Invariant: after `show_next`, the first ``shown_per_model`` requests of each model are shown, in the order of the
    last sorting. Under a policy that does not change with time, that is the current order unless a request has become
    overdue since.
    """

    def __init__(self, policy: SchedulingPolicy = FCFS, shown_per_model: int = SHOWN_PER_MODEL) -> None:
        self._policy = policy
        self._limit = shown_per_model
        self._requests: dict[int, QueuedRequest] = {}
        self._ordered: dict[str, list[tuple[SortKey, int]]] = {}
        self._shown: set[int] = set()
        self._changed: set[str] = set()
        """Models of which a request may have to be shown."""
        self._sorted_at_s = 0.0
        self._oldest_s = math.inf
        """No queued request arrived before this."""

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: QueuedRequest) -> None:
        self._requests[request.entry_id] = request
        self._changed.add(request.model)
        self._oldest_s = min(self._oldest_s, request.scheduling.arrived_at_s)
        bisect.insort(self._ordered.setdefault(request.model, []), self._sort_entry(request))

    def remove(self, entry_id: int) -> bool:
        """Removes a request, if it is queued. Returns True if the unit has been shown it."""
        request = self._requests.pop(entry_id, None)
        if request is None:
            return False
        self._changed.add(request.model)
        ordered = self._ordered[request.model]
        del ordered[bisect.bisect_left(ordered, self._sort_entry(request))]
        if not ordered:
            del self._ordered[request.model]
        shown = entry_id in self._shown
        self._shown.discard(entry_id)
        return shown

    def hide_all(self) -> None:
        """Marks every request as not shown: the unit was restarted."""
        self._shown.clear()
        self._changed.update(self._ordered)

    def count(self, model: str) -> int:
        """Number of queued requests for ``model``."""
        return len(self._ordered.get(model, ()))

    def num_before(self, model: str, scheduling: SchedulingState) -> int:
        """Queued requests for ``model`` that precede one with ``scheduling``, in the order of the last sorting."""
        key = self._policy.sort_key(scheduling, self._sorted_at_s)
        return bisect.bisect_left(self._ordered.get(model, []), (key, 0))

    def oldest_arrival_s(self, model: str) -> float | None:
        """Arrival (unix time) of the queued request for ``model`` that arrived first; None without one. Linear."""
        return min((key[-1] for key, _ in self._ordered.get(model, ())), default=None)

    def show_next(self, unix_s: float) -> list[QueuedRequest]:
        """Returns the best requests that are not shown yet, and marks them as shown."""
        if abs(unix_s - self._sorted_at_s) >= SORT_EVERY_S and self._order_changes(unix_s):  # the clock may jump
            self._sorted_at_s = unix_s
            self._oldest_s = min((one.scheduling.arrived_at_s for one in self._requests.values()), default=math.inf)
            for model, ordered in self._ordered.items():
                self._ordered[model] = sorted(self._sort_entry(self._requests[entry_id]) for _, entry_id in ordered)
            self._changed.update(self._ordered)
        changed = [ordered for model, ordered in self._ordered.items() if model in self._changed]
        self._changed.clear()
        best = (entry_id for ordered in changed for _, entry_id in ordered[: self._limit])
        fresh = [self._requests[entry_id] for entry_id in best if entry_id not in self._shown]
        self._shown.update(request.entry_id for request in fresh)
        return fresh

    def _order_changes(self, unix_s: float) -> bool:
        """Whether the order may be another one at ``unix_s``, because time has passed."""
        return self._policy.changes_with_time or unix_s - self._oldest_s >= self._policy.max_wait_s

    def _sort_entry(self, request: QueuedRequest) -> tuple[SortKey, int]:
        return self._policy.sort_key(request.scheduling, self._sorted_at_s), request.entry_id
