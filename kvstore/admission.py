"""Which queued request gets the next credit, and which swapped lease gets token blocks again. Pure.

Order is decided late. Routers show a unit only their best queued requests. The best one of all routers gets a credit as
soon as the unit has free capacity for it. So decode capacity is reserved before prefill starts.

This module knows the order and the quotas' part in it. It does not know how capacity is counted or how blocks are
reserved: the caller of `Admission.admit` passes that in as functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
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


class Admission:
    """Owns the waiting entries of all routers and workers of a unit.

    Invariant: there is one entry for each source and id. It stays until it is admitted, withdrawn or dropped.
    """

    def __init__(self, policy: SchedulingPolicy = FCFS) -> None:
        self._policy = policy
        self._entries: dict[tuple[str, int], AdmissionEntry] = {}

    def offer(self, entry: AdmissionEntry) -> None:
        """Adds an entry; replaces an earlier one with the same source and id."""
        self._entries[entry.source, entry.request.entry_id] = entry

    def withdraw(self, source: str, entry_id: int) -> None:
        """Removes an entry; an unknown one is ignored."""
        self._entries.pop((source, entry_id), None)

    def drop_source(self, source: str) -> None:
        """Removes all entries of one router or worker."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry.source != source}

    def take_requests(self, model: str) -> list[AdmissionEntry]:
        """Removes and returns the queued requests of ``model``. Its swapped leases stay."""
        taken = [entry for entry in self._entries.values() if entry.model == model and entry.swapped is None]
        for entry in taken:
            self.withdraw(entry.source, entry.request.entry_id)
        return taken

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
        entries = sorted(
            filter(has_slot, self._entries.values()),
            key=lambda e: (self._policy.sort_key(e.request.scheduling, unix_s), e.source, e.request.entry_id),
        )
        blocked: set[str] = set()
        lacks_memory = False
        for entry in entries:
            if entry.model in blocked or not has_slot(entry):
                continue
            if not is_within_quota(entry):
                blocked.add(entry.model)
            elif try_admit(entry, False):
                self.withdraw(entry.source, entry.request.entry_id)
            else:
                blocked.add(entry.model)
                lacks_memory = True
        if lacks_memory:
            return True
        for entry in entries:
            if (entry.source, entry.request.entry_id) in self._entries and has_slot(entry):
                if not try_admit(entry, True):
                    break
                self.withdraw(entry.source, entry.request.entry_id)
        return False
