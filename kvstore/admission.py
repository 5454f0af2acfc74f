"""Which queued request gets the next credit, and which swapped lease gets token blocks again. Pure.

Order is decided late. Routers show a unit only their best queued requests. The best one of all routers gets a credit as
soon as the unit has free capacity for it. So decode capacity is reserved before prefill starts.

This module knows the order and the quotas' part in it. It does not know how capacity is counted or how blocks are
reserved: the caller of `Admission.admit` passes that in as functions.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace

from kvstore.tenant_service import Payer, TenantService
from kvstore.wait_times import EntryKey
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy, SortKey
from muxmesh.types import LeaseRef, QueuedRequest, SchedulingState, TenantStanding


@dataclass(frozen=True, slots=True)
class AdmissionEntry:
    """A queued request, or a swapped lease that waits for token blocks.

    ``source`` is the router of the request, or the worker that owns the lease ``swapped``.
    """

    source: str
    request: QueuedRequest
    swapped: LeaseRef | None = None

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def key(self) -> EntryKey:
        """Source and id, unique among the waiting entries."""
        return self.source, self.request.entry_id

    @property
    def payer(self) -> Payer:
        """Who is charged for it."""
        return Payer(self.request.tenant, self.request.model, self.request.tenant_weight)

    @property
    def worker(self) -> str | None:
        """The worker that has to continue it; None: any."""
        return self.source if self.swapped else None


_Order = tuple[SortKey, EntryKey]
"""The lowest goes first."""


class Admission:
    """Owns the waiting entries of all routers and workers of a unit.

    Invariant: there is one entry for each source and id. It stays until it is admitted, withdrawn or dropped. The
    entries of one queue need a slot of the same workers: the queue of a model, or of a worker's swapped leases.
    """

    def __init__(self, policy: SchedulingPolicy = FCFS, tenants: TenantService | None = None) -> None:
        """``tenants``: where queued requests are counted. Swapped leases are counted as leases."""
        self._policy = policy
        self._tenants = tenants or TenantService()
        self._entries: dict[EntryKey, AdmissionEntry] = {}
        self._orders: dict[EntryKey, _Order] = {}
        """Order of each entry at time 0: its present one too, unless the policy changes with time or one is overdue."""
        self._queues: dict[tuple[str, str | None], list[_Order]] = {}
        """Model and worker → the orders of their entries, at least one, sorted."""
        self._oldest_s = math.inf
        """No entry arrived before this."""

    def offer(self, entry: AdmissionEntry) -> None:
        """Adds an entry; replaces an earlier one with the same source and id."""
        self.withdraw(*entry.key)
        order = self._order(entry, 0.0)
        self._entries[entry.key], self._orders[entry.key] = entry, order
        self._oldest_s = min(self._oldest_s, entry.request.scheduling.arrived_at_s)
        if entry.swapped is None:
            self._tenants.queue(entry.payer, entry.request.scheduling.priority)
        insort(self._queues.setdefault((entry.model, entry.worker), []), order)

    def withdraw(self, source: str, entry_id: int) -> None:
        """Removes an entry; an unknown one is ignored."""
        entry = self._entries.pop((source, entry_id), None)
        if entry is None:
            return
        if entry.swapped is None:
            self._tenants.unqueue(entry.payer, entry.request.scheduling.priority)
        queue = self._queues[entry.model, entry.worker]
        del queue[bisect_left(queue, self._orders.pop(entry.key))]
        if not queue:
            del self._queues[entry.model, entry.worker]

    def set_standings(self, standing_of: Callable[[AdmissionEntry], TenantStanding]) -> None:
        """Gives each entry the standing of its tenant, and sorts the queues of those for which it is another one."""
        changed: set[tuple[str, str | None]] = set()
        for key, entry in self._entries.items():
            scheduling, standing = entry.request.scheduling, standing_of(entry)
            if standing is not scheduling.standing and standing != scheduling.standing:
                request = replace(entry.request, scheduling=scheduling.with_standing(standing))
                self._entries[key] = restood = replace(entry, request=request)
                self._orders[key] = self._order(restood, 0.0)
                changed.add((entry.model, entry.worker))
        for queue in changed:
            self._queues[queue] = sorted(self._orders[key] for _, key in self._queues[queue])

    def with_scores(self, unix_s: float) -> Iterator[tuple[AdmissionEntry, float]]:
        """All waiting entries, each with its score by the policy at ``unix_s``."""
        for key, entry in self._entries.items():
            if self._policy.changes_with_time:
                yield entry, self._policy.score(entry.request.scheduling, unix_s)
            else:
                yield entry, self._orders[key][0][1]

    def drop_source(self, source: str) -> None:
        """Removes all entries of one router or worker."""
        for key in [key for key in self._entries if key[0] == source]:
            self.withdraw(*key)

    def take_requests(self, model: str) -> list[AdmissionEntry]:
        """Removes and returns the queued requests of ``model``. Its swapped leases stay."""
        taken = [entry for entry in self._entries.values() if entry.model == model and entry.swapped is None]
        for entry in taken:
            self.withdraw(*entry.key)
        return taken

    def entries(self) -> Iterable[AdmissionEntry]:
        """All waiting entries, in no order."""
        return self._entries.values()

    @property
    def waiting(self) -> Set[EntryKey]:
        """The keys of all waiting entries."""
        return self._entries.keys()

    def count(self, model: str) -> int:
        """Queued requests and waiting swapped leases of ``model``."""
        return sum(len(queue) for (of_model, _), queue in self._queues.items() if of_model == model)

    def requests_of(self, model: str) -> list[SchedulingState]:
        """The states of the queued requests of ``model``, without swapped leases."""
        return [self._entries[key].request.scheduling for _, key in self._queues.get((model, None), ())]

    def count_requests(self) -> dict[str, int]:
        """Model → number of its queued requests, without swapped leases; no entry without any."""
        return {model: len(queue) for (model, worker), queue in self._queues.items() if worker is None}

    def num_overtaken(self, admitted: AdmissionEntry) -> int:
        """Waiting entries of the same model and priority that arrived before ``admitted``."""
        first = admitted.request.scheduling
        queues = (queue for (model, _), queue in self._queues.items() if model == admitted.model)
        waiting = (self._entries[key].request.scheduling for queue in queues for _, key in queue)
        return sum(state.priority == first.priority and state.arrived_at_s < first.arrived_at_s for state in waiting)

    def admit(
        self,
        unix_s: float,
        has_slot: Callable[[AdmissionEntry], bool],
        is_within_quota: Callable[[AdmissionEntry], bool],
        try_admit: Callable[[AdmissionEntry, bool], bool],
        ends: Callable[[AdmissionEntry, SortKey], bool],
    ) -> bool:
        """Admits entries in scheduling order while there is free capacity.

        ``has_slot(entry)``: a worker of its model can batch it; of two entries of one queue the later one may have a
        slot and the earlier one not, since it displaces a running sequence. An entry that has none is not asked for
        again: admitting others frees none. ``is_within_quota(entry)``: its model would use no more slabs than its
        quota. ``try_admit(entry, lend)``: reserves the token blocks, or returns False if there are too few; only with
        ``lend`` may the model exceed its quota. ``ends(entry, key)``: ``entry``, at ``key`` in the order, has no
        slot, nor has any later entry of its queue.

        The first pass admits entries within their model's quota. An entry that lacks memory blocks the later entries
        of its model. If no entry of the first pass lacks memory, a second pass lends free slabs to models that are
        past their quota, and ends at the first entry that lacks memory. So smaller entries cannot overtake a larger
        one for ever, and memory that returns goes to models within their quota before it is lent again.

        Returns True if an entry within its model's quota lacks memory: the caller has to reclaim loans.
        """
        blocked: set[str] = set()
        without_slot: set[EntryKey] = set()
        lacks_memory = False

        def has_slot_yet(entry: AdmissionEntry) -> bool:
            if entry.key in without_slot:
                return False
            if has_slot(entry):
                return True
            without_slot.add(entry.key)
            return False

        for entry in self._in_order(unix_s, lambda model: model in blocked, has_slot_yet, ends):
            if not is_within_quota(entry):
                blocked.add(entry.model)
            elif try_admit(entry, False):
                self.withdraw(*entry.key)
            else:
                blocked.add(entry.model)
                lacks_memory = True
        if lacks_memory:
            return True
        if not blocked:  # those that are left have no slot
            return False
        for entry in self._in_order(unix_s, lambda model: False, has_slot_yet, ends):
            if not try_admit(entry, True):
                break
            self.withdraw(*entry.key)
        return False

    def first_entries(self, unix_s: float) -> list[AdmissionEntry]:
        """The first waiting entry of each model. It waits for capacity, and the others of its model wait for it."""
        first: dict[str, _Order] = {}
        for (model, _), queue in self._queues.items():
            order = self._sorted(queue, unix_s)[0]
            first[model] = min(order, first.get(model, order))
        return [self._entries[key] for _, key in first.values()]

    def _in_order(
        self,
        unix_s: float,
        is_blocked: Callable[[str], bool],
        has_slot: Callable[[AdmissionEntry], bool],
        ends: Callable[[AdmissionEntry, SortKey], bool],
    ) -> Iterator[AdmissionEntry]:
        """Yields the entries with a slot in order, which the caller may withdraw. The queue of a blocked model ends."""
        nexts = [(queue[0], 0, queue) for queue in (list(self._sorted(one, unix_s)) for one in self._queues.values())]
        heapify(nexts)
        while nexts:
            (sort_key, key), index, queue = nexts[0]
            entry = self._entries[key]
            if is_blocked(entry.model):
                heappop(nexts)
                continue
            if has_slot(entry):
                yield entry
            elif ends(entry, sort_key):
                heappop(nexts)
                continue
            if index + 1 == len(queue):
                heappop(nexts)
            else:
                heapreplace(nexts, (queue[index + 1], index + 1, queue))

    def _sorted(self, queue: list[_Order], unix_s: float) -> list[_Order]:
        """The orders of a queue's entries at ``unix_s``, sorted."""
        if unix_s - self._oldest_s >= self._policy.max_wait_s:
            self._oldest_s = min(entry.request.scheduling.arrived_at_s for entry in self._entries.values())
        elif not self._policy.changes_with_time:
            return queue
        return sorted(self._order(self._entries[key], unix_s) for _, key in queue)

    def _order(self, entry: AdmissionEntry, unix_s: float) -> _Order:
        return self._policy.sort_key(entry.request.scheduling, unix_s), entry.key
