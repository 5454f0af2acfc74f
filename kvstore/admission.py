"""Which queued request gets the next credit, and which swapped lease its token blocks. Pure.

Order is decided late: routers show a unit only their best queued requests, and a credit is issued to the best one of
all routers as soon as the unit has free capacity for it, so that decode capacity is reserved before prefill starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.types import LeaseRef, QueuedRequest


@dataclass(frozen=True, slots=True)
class AdmissionEntry:
    """A queued request, or a swapped lease whose worker needs token blocks for it again.

    ``source`` is the router of the request, or the worker of the lease ``swapped``.
    """

    source: str
    request: QueuedRequest
    swapped: LeaseRef | None = None

    @property
    def model(self) -> str:
        """The model of the request."""
        return self.request.model


class Admission:
    """Owns the entries that routers and workers show.

    Invariant: an entry is here once, until it is admitted or withdrawn.
    """

    def __init__(self, policy: SchedulingPolicy = FCFS) -> None:
        self._policy = policy
        self._entries: dict[tuple[str, int], AdmissionEntry] = {}

    def offer(self, entry: AdmissionEntry) -> None:
        """Adds an entry, or replaces the one with its source and id."""
        self._entries[entry.source, entry.request.entry_id] = entry

    def withdraw(self, source: str, entry_id: int) -> None:
        """Removes an entry if it is there."""
        self._entries.pop((source, entry_id), None)

    def drop_source(self, source: str) -> None:
        """Removes all entries of a router or a worker that is gone."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry.source != source}

    def take_requests(self, model: str) -> list[AdmissionEntry]:
        """Removes and returns the queued requests for ``model``; swapped leases stay."""
        taken = [entry for entry in self._entries.values() if entry.model == model and entry.swapped is None]
        for entry in taken:
            self.withdraw(entry.source, entry.request.entry_id)
        return taken

    def count(self, model: str) -> int:
        """Entries for ``model``."""
        return sum(entry.model == model for entry in self._entries.values())

    def num_overtaken(self, admitted: AdmissionEntry) -> int:
        """Entries of the same model and priority that arrived before ``admitted`` and still wait."""
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
        """Admits entries in order for as long as there is free capacity.

        ``has_slot(entry)``: its model's workers can take one more sequence. ``is_within_quota(entry)``: with it, its
        model would use no more than its quota. ``try_admit(entry, lend)``: reserves the blocks, or returns False if
        the pool is full; with ``lend``, past the model's quota.

        Entries within their model's quota go first. Only if none of them lacks memory, what is left is lent to the
        others, so that loans return to the models that can claim them. No entry is overtaken for ever by smaller ones:
        within a quota, one that lacks memory blocks its own model; past it, all.

        Returns True if an entry within its model's quota waits for memory: loans have to return.
        """
        entries = sorted(
            filter(has_slot, self._entries.values()),
            key=lambda e: (self._policy.sort_key(e.request.scheduling, unix_s), e.source, e.request.entry_id),
        )
        blocked: set[str] = set()
        claims_wait = False
        for entry in entries:
            if entry.model in blocked or not has_slot(entry):
                continue
            if not is_within_quota(entry):
                blocked.add(entry.model)
            elif try_admit(entry, False):
                self.withdraw(entry.source, entry.request.entry_id)
            else:
                blocked.add(entry.model)
                claims_wait = True
        if claims_wait:
            return True
        for entry in entries:
            if (entry.source, entry.request.entry_id) in self._entries and has_slot(entry):
                if not try_admit(entry, True):
                    break
                self.withdraw(entry.source, entry.request.entry_id)
        return False
