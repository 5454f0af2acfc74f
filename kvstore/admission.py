"""Which queued request gets the next credit, and which swapped lease gets token blocks again. Pure.

Order is decided late. Routers show a unit only their best queued requests. The best one of all routers gets a credit as
soon as the unit has free capacity for it. So decode capacity is reserved before prefill starts.

This module knows the order and the quotas' part in it. It does not know how capacity is counted or how blocks are
reserved: the caller of `Admission.admit` passes that in as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from kvstore.wait_times import EntryKey
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy, SortKey
from muxmesh.types import LeaseRef, QueuedRequest


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
    def worker(self) -> str | None:
        """The worker that has to continue it; None: any."""
        return self.source if self.swapped else None


class Admission:
    """Owns the waiting entries of all routers and workers of a unit.

    Invariant: there is one entry for each source and id. It stays until it is admitted, withdrawn or dropped.
    """

    def __init__(self, policy: SchedulingPolicy = FCFS) -> None:
        self._policy = policy
        self._entries: dict[EntryKey, AdmissionEntry] = {}
        self._first: dict[str, AdmissionEntry] = {}
        """Cache of `first_entries`."""

    def offer(self, entry: AdmissionEntry) -> None:
        """Adds an entry; replaces an earlier one with the same source and id."""
        self._entries[entry.key] = entry
        self._first.pop(entry.model, None)

    def withdraw(self, source: str, entry_id: int) -> None:
        """Removes an entry; an unknown one is ignored."""
        entry = self._entries.pop((source, entry_id), None)
        if entry is not None and self._first.get(entry.model) is entry:
            del self._first[entry.model]

    def drop_source(self, source: str) -> None:
        """Removes all entries of one router or worker."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry.source != source}
        self._first.clear()

    def take_requests(self, model: str) -> list[AdmissionEntry]:
        """Removes and returns the queued requests of ``model``. Its swapped leases stay."""
        taken = [entry for entry in self._entries.values() if entry.model == model and entry.swapped is None]
        for entry in taken:
            self.withdraw(*entry.key)
        return taken

    @property
    def waiting(self) -> Set[EntryKey]:
        """The keys of all waiting entries."""
        return self._entries.keys()

    def count(self, model: str) -> int:
        """Queued requests and waiting swapped leases of ``model``."""
        return sum(entry.model == model for entry in self._entries.values())

    def num_overtaken(self, admitted: AdmissionEntry) -> int:
        """Waiting entries of the same model and priority that arrived before ``admitted``."""
        first = admitted.request.scheduling
        waiting = (e.request.scheduling for e in self._entries.values() if e.model == admitted.model)
        return sum(state.priority == first.priority and state.arrived_at_s < first.arrived_at_s for state in waiting)

    def admit(
        self,
        unix_s: float,
        has_slot: Callable[[AdmissionEntry], bool],
        is_within_quota: Callable[[AdmissionEntry], bool],
        try_admit: Callable[[AdmissionEntry, bool], bool],
    ) -> bool:
        """Admits entries in scheduling order while there is free capacity.

        ``has_slot(entry)``: a worker of its model can batch one more sequence. ``is_within_quota(entry)``: its model
        would use no more slabs than its quota. ``try_admit(entry, lend)``: reserves the token blocks, or returns False
        if there are too few; only with ``lend`` may the model exceed its quota.

        The first pass admits entries within their model's quota. An entry that lacks memory blocks the later entries
        of its model. If no entry of the first pass lacks memory, a second pass lends free slabs to models that are
        past their quota, and ends at the first entry that lacks memory. So smaller entries cannot overtake a larger
        one for ever, and memory that returns goes to models within their quota before it is lent again.

        Returns True if an entry within its model's quota lacks memory: the caller has to reclaim loans.
        """
        entries = sorted(filter(has_slot, self._entries.values()), key=self._order_at(unix_s))
        blocked: set[str] = set()
        lacks_memory = False
        for entry in entries:
            if entry.model in blocked or not has_slot(entry):
                continue
            if not is_within_quota(entry):
                blocked.add(entry.model)
            elif try_admit(entry, False):
                self.withdraw(*entry.key)
            else:
                blocked.add(entry.model)
                lacks_memory = True
        if lacks_memory:
            return True
        for entry in entries:
            if entry.key in self._entries and has_slot(entry):
                if not try_admit(entry, True):
                    break
                self.withdraw(*entry.key)
        return False

    def first_entries(self, unix_s: float) -> list[AdmissionEntry]:
        """The first waiting entry of each model. It waits for capacity, and the others of its model wait for it."""
        if self._policy.changes_with_time:
            self._first.clear()
        stale = {entry.model for entry in self._entries.values()} - self._first.keys()
        for model in stale:
            entries = (entry for entry in self._entries.values() if entry.model == model)
            self._first[model] = min(entries, key=self._order_at(unix_s))
        return list(self._first.values())

    def _order_at(self, unix_s: float) -> Callable[[AdmissionEntry], tuple[SortKey, EntryKey]]:
        return lambda entry: (self._policy.sort_key(entry.request.scheduling, unix_s), entry.key)
