"""The queued requests of one unit's admission, and which of them the unit is shown. Pure."""

from __future__ import annotations

import bisect
import math
from collections import Counter

from muxmesh.scheduling_policy import FCFS, SchedulingPolicy, SortKey
from muxmesh.types import QueuedRequest, SchedulingState

SHOWN_PER_MODEL = 64
"""Queued requests that a unit sees of each tenant of a model: at least as many as it can issue credits for at once."""
MAX_SHOWN_PER_MODEL = 1024
"""While a unit sees so many of a model, it is shown only the first one of each tenant. So it sees at most this many and
one of each tenant."""
SORT_EVERY_S = 0.1
"""Maximum age of the order under a policy that changes with time, or while a request is overdue."""

_Lane = tuple[str, str]
"""Model and tenant."""


class RequestQueue:
    """Owns the requests that wait for a credit of one unit, ordered for each model and tenant.

    The unit decides between tenants, as it alone knows their service, so no tenant's requests may hide those of
    another. Within a tenant classes and policy order them as in the unit: the best of them precede whatever their class
    is.

    Invariant: after `show_next`, the first ``shown_per_model`` requests of each model and tenant are shown, or only the
    first one where `MAX_SHOWN_PER_MODEL` is reached, in the order of the last sorting. Under a policy that does not
    change with time, that is the current order unless a request has become overdue since.
    """

    def __init__(
        self, policy: SchedulingPolicy = FCFS, shown_per_model: int = SHOWN_PER_MODEL, is_fair: bool = True
    ) -> None:
        """``shown_per_model``: requests of a model that the unit sees if all are of one tenant.

        ``is_fair``: whether the unit divides its service between tenants.
        """
        self._is_fair = is_fair
        self._policy = policy
        self._limit = shown_per_model
        self._requests: dict[int, QueuedRequest] = {}
        self._ordered: dict[_Lane, list[tuple[SortKey, int]]] = {}
        self._shown: set[int] = set()
        self._num_queued: Counter[str] = Counter()
        self._num_shown: Counter[str] = Counter()
        """By model."""
        self._changed: dict[_Lane, None] = {}
        """Models and tenants of which a request may have to be shown, in the order of their change."""
        self._sorted_at_s = 0.0
        self._oldest_s = math.inf
        """No queued request arrived before this."""

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: QueuedRequest) -> None:
        lane = (request.model, request.tenant)
        self._requests[request.entry_id] = request
        self._num_queued[request.model] += 1
        self._changed[lane] = None
        self._oldest_s = min(self._oldest_s, request.scheduling.arrived_at_s)
        bisect.insort(self._ordered.setdefault(lane, []), self._sort_entry(request))

    def remove(self, entry_id: int) -> bool:
        """Removes a request, if it is queued. Returns True if the unit has been shown it."""
        request = self._requests.pop(entry_id, None)
        if request is None:
            return False
        lane = (request.model, request.tenant)
        self._num_queued[request.model] -= 1
        self._changed[lane] = None
        ordered = self._ordered[lane]
        del ordered[bisect.bisect_left(ordered, self._sort_entry(request))]
        if not ordered:
            del self._ordered[lane]
        shown = entry_id in self._shown
        if shown:
            self._shown.discard(entry_id)
            self._num_shown[request.model] -= 1
        return shown

    def hide_all(self) -> None:
        """Marks every request as not shown: the unit was restarted."""
        self._shown.clear()
        self._num_shown.clear()
        self._changed.update(dict.fromkeys(self._ordered))

    def count(self, model: str) -> int:
        """Number of queued requests for ``model``."""
        return self._num_queued[model]

    def num_before(self, model: str, tenant: str, scheduling: SchedulingState, weight: float = 1.0) -> int:
        """Queued requests for ``model`` that precede one of ``tenant``, of this weight, with ``scheduling``.

        Of the tenant by the order of the last sorting. If tenants share the unit (``is_fair``), of each other one as
        many, in proportion to its weight: a router does not know which of them had more service until now.
        """
        key, own = self._policy.sort_key(scheduling, self._sorted_at_s), 0
        others: list[tuple[int, float]] = []  # length of the queue and weight of each other tenant
        for (name, other), queue in self._ordered.items():
            if name == model and (other == tenant or not self._is_fair):
                own += bisect.bisect_left(queue, (key, 0))
            elif name == model:
                others.append((len(queue), self._requests[queue[0][1]].tenant_weight))
        return own + sum(min(number, int(own * other_weight / weight)) for number, other_weight in others)

    def oldest_arrival_s(self, model: str) -> float | None:
        """Arrival (unix time) of the queued request for ``model`` that arrived first; None without one. Linear."""
        of_model = (ordered for (name, _), ordered in self._ordered.items() if name == model)
        return min((key[-1] for ordered in of_model for key, _ in ordered), default=None)

    def show_next(self, unix_s: float) -> list[QueuedRequest]:
        """Returns the best requests that are not shown yet, and marks them as shown."""
        if abs(unix_s - self._sorted_at_s) >= SORT_EVERY_S and self._order_changes(unix_s):  # the clock may jump
            self._sorted_at_s = unix_s
            self._oldest_s = min((one.scheduling.arrived_at_s for one in self._requests.values()), default=math.inf)
            for lane, ordered in self._ordered.items():
                self._ordered[lane] = sorted(self._sort_entry(self._requests[entry_id]) for _, entry_id in ordered)
            self._changed.update(dict.fromkeys(self._ordered))
        fresh = [request for lane in self._changed for request in self._show(lane)]
        self._changed.clear()
        return fresh

    def _show(self, lane: _Lane) -> list[QueuedRequest]:
        """Returns the best requests of one model and tenant that are not shown yet, and marks them as shown."""
        fresh: list[QueuedRequest] = []
        for position, (_, entry_id) in enumerate(self._ordered.get(lane, ())[: self._limit]):
            if position and self._num_shown[lane[0]] >= MAX_SHOWN_PER_MODEL:
                break
            if entry_id not in self._shown:
                self._shown.add(entry_id)
                self._num_shown[lane[0]] += 1
                fresh.append(self._requests[entry_id])
        return fresh

    def _order_changes(self, unix_s: float) -> bool:
        """Whether the order may be another one at ``unix_s``, because time has passed."""
        return self._policy.changes_with_time or unix_s - self._oldest_s >= self._policy.max_wait_s

    def _sort_entry(self, request: QueuedRequest) -> tuple[SortKey, int]:
        return self._policy.sort_key(request.scheduling, self._sorted_at_s), request.entry_id
