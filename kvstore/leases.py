"""Leases: who owns a request's token blocks. Pure.

A lease is born as a **credit**, owned by the router that may use it; the prefill worker acquires it, moves it to the
decode worker, and that one releases it. So "credit", "lease" and "allocation" are one record with one owner at a
time, and nothing can fall between them. Each change of owner raises the epoch; a call with another epoch, or by
another owner, is refused with LeaseLost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.slab_pool import SlabPool
from muxmesh.errors import LeaseLost
from muxmesh.types import Lease, LeaseRef


@dataclass(slots=True)
class LeaseRecord:
    """One lease. ``expires_at_s`` is set while it is a credit."""

    lease: Lease
    owner: str
    expires_at_s: float | None = None


class LeaseTable:
    """Owns all leases of a unit and, through them, every token block in use.

    Invariant: each token block in use belongs to exactly one lease.
    """

    def __init__(self, pool: SlabPool, last_id: int = 0) -> None:
        """``last_id``: ids go on from here, so that those of an earlier life of the unit never come again."""
        self._pool = pool
        self._records: dict[int, LeaseRecord] = {}
        self._last_id = last_id
        self.num_handoffs = 0

    def __len__(self) -> int:
        return len(self._records)

    def grant_credit(self, model: str, num_blocks: int, router: str, expires_at_s: float) -> Lease | None:
        """A new lease owned by ``router``, or None if the pool has no room."""
        block_ids = self._pool.allocate(model, num_blocks)
        if block_ids is None:
            return None
        self._last_id += 1
        lease = Lease(LeaseRef(self._last_id, 1), model, block_ids)
        self._records[self._last_id] = LeaseRecord(lease, router, expires_at_s)
        return lease

    def acquire(self, ref: LeaseRef, worker: str) -> Lease:
        """A credit becomes the lease of ``worker``. Raises LeaseLost if it is not a credit (any more)."""
        record = self._at(ref)
        if record.expires_at_s is None:
            raise LeaseLost(f"lease {ref.lease_id} is no credit: {record.owner} has it")
        record.expires_at_s = None
        return self._hand_to(record, worker)

    def move(
        self, ref: LeaseRef, owner: str, to: str, num_computed_tokens: int, sampled: tuple[int, ...], handoff: bytes
    ) -> Lease:
        """The hand-off: ``to`` owns the same blocks from now on. Raises LeaseLost."""
        record = self._owned(ref, owner)
        lease = record.lease
        record.lease = Lease(lease.ref, lease.model, lease.block_ids, num_computed_tokens, sampled, handoff)
        self.num_handoffs += 1
        return self._hand_to(record, to)

    def release(self, ref: LeaseRef, owner: str) -> None:
        """Ends the lease and frees its blocks. Raises LeaseLost."""
        self._owned(ref, owner)
        self._end(ref.lease_id)

    def drop_owner(self, owner: str) -> int:
        """Ends every lease of an owner that is certainly gone; returns how many."""
        return self._end_all(lambda record: record.owner == owner)

    def drop_expired(self, now_s: float) -> int:
        """Ends credits that were not used in time; returns how many."""
        return self._end_all(lambda record: record.expires_at_s is not None and record.expires_at_s <= now_s)

    def next_expiry_s(self) -> float | None:
        """When the next credit expires, or None."""
        return min((r.expires_at_s for r in self._records.values() if r.expires_at_s is not None), default=None)

    def of_owner(self, owner: str) -> list[Lease]:
        """The leases that ``owner`` has."""
        return [record.lease for record in self._records.values() if record.owner == owner]

    def count_by_owner(self) -> Counter[str]:
        """Owner → its leases."""
        return Counter(record.owner for record in self._records.values())

    def count(self, model: str, *, credits: bool) -> int:
        """Credits, or leases of workers, of one model."""
        return sum(r.lease.model == model and (r.expires_at_s is not None) is credits for r in self._records.values())

    def num_blocks(self, model: str) -> int:
        """Token blocks of ``model`` in use."""
        return sum(len(r.lease.block_ids) for r in self._records.values() if r.lease.model == model)

    def check_integrity(self) -> None:
        """Proves the invariant; raises AssertionError."""
        in_use: dict[str, list[int]] = {}
        for record in self._records.values():
            in_use.setdefault(record.lease.model, []).extend(record.lease.block_ids)
        self._pool.check_integrity(in_use)

    def _at(self, ref: LeaseRef) -> LeaseRecord:
        record = self._records.get(ref.lease_id)
        if record is None:
            raise LeaseLost(f"lease {ref.lease_id} does not exist (any more)")
        if record.lease.ref.epoch != ref.epoch:
            raise LeaseLost(f"lease {ref.lease_id} is at epoch {record.lease.ref.epoch}, not {ref.epoch}")
        return record

    def _owned(self, ref: LeaseRef, owner: str) -> LeaseRecord:
        record = self._at(ref)
        if record.owner != owner:
            raise LeaseLost(f"lease {ref.lease_id} belongs to {record.owner}, not {owner}")
        return record

    def _hand_to(self, record: LeaseRecord, owner: str) -> Lease:
        old = record.lease
        ref = LeaseRef(old.ref.lease_id, old.ref.epoch + 1)
        record.owner = owner
        record.lease = Lease(ref, old.model, old.block_ids, old.num_computed_tokens, old.sampled_token_ids, old.handoff)
        return record.lease

    def _end(self, lease_id: int) -> None:
        lease = self._records.pop(lease_id).lease
        self._pool.free(lease.model, lease.block_ids)

    def _end_all(self, chosen: Callable[[LeaseRecord], bool]) -> int:
        ending = [lease_id for lease_id, record in self._records.items() if chosen(record)]
        for lease_id in ending:
            self._end(lease_id)
        return len(ending)
