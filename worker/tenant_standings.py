"""The standings of tenants that the unit tells a worker about the sequences that it has, or is about to have. Pure.

The unit tells it on another stream than the request comes on, so either may come first.
"""

from __future__ import annotations

from muxmesh.engine.sequence import SequenceRecord
from muxmesh.types import TenantStanding
from worker.lease_client import LeaseStandings

_MAX_EARLY = 4096
"""Standings of leases whose requests have not come: so many are kept."""


class TenantStandings:
    """Owns which sequences are told of the standing of their tenant. Invariant: a lease has a sequence or is early."""

    def __init__(self) -> None:
        self._sequences: dict[int, SequenceRecord] = {}
        """By the id of their lease."""
        self._early: dict[int, TenantStanding] = {}
        """Of leases that have no sequence here, the oldest first."""

    def begin(self, lease_id: int, sequence: SequenceRecord) -> None:
        """The worker has the sequence of a lease, and orders it by what it was told of it before."""
        self._sequences[lease_id] = sequence
        if (standing := self._early.pop(lease_id, None)) is not None:
            sequence.work.set_standing(standing)

    def end(self, lease_id: int) -> None:
        """The worker has the sequence no longer."""
        self._sequences.pop(lease_id, None)

    def change(self, change: LeaseStandings) -> None:
        """The tenant of some leases stands elsewhere. Their sequences are ordered by it from the next step on."""
        for lease_id in change.lease_ids:
            if (sequence := self._sequences.get(lease_id)) is not None:
                sequence.work.set_standing(change.standing)
                continue
            self._early.pop(lease_id, None)
            self._early[lease_id] = change.standing
            if len(self._early) > _MAX_EARLY:
                del self._early[next(iter(self._early))]
