"""Leases: who owns a request's token blocks. Pure.

A lease is born as a **credit**, owned by the router that may use it; the prefill worker acquires it, moves it to the
decode worker, and that one releases it. So "credit", "lease" and "allocation" are one record with one owner at a
time, and nothing can fall between them. Each change of owner raises the epoch; a call with another epoch, or by
another owner, is refused with LeaseLost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvstore.blocks import BlockTable
from muxmesh.errors import LeaseLost
from muxmesh.types import KvDemand, Lease, LeaseRef, blocks_for


@dataclass(slots=True)
class LeaseRecord:
    """One lease. ``expires_at_s`` is set while it is a credit.

    ``block_hashes`` name the prefixes that its first blocks hold, or will hold once they are computed.
    """

    lease: Lease
    owner: str
    block_hashes: Sequence[bytes]
    block_size: int
    expires_at_s: float | None = None


class LeaseTable:
    """Owns all leases of a unit and, through them, every token block in use.

    Invariant: each token block in use belongs to at least one lease; those of several hold a common prefix, which
    nobody writes any more.
    """

    def __init__(self, blocks: BlockTable, last_id: int = 0) -> None:
        """``last_id``: ids go on from here, so that those of an earlier life of the unit never come again."""
        self._blocks = blocks
        self._records: dict[int, LeaseRecord] = {}
        self._last_id = last_id
        self.num_handoffs = 0

    def __len__(self) -> int:
        return len(self._records)

    def grant_credit(
        self,
        model: str,
        block_size: int,
        demand: KvDemand,
        router: str,
        expires_at_s: float,
        max_new_slabs: int | None = None,
    ) -> Lease | None:
        """A new lease owned by ``router``, or None if the pool has no room. What is cached of it is computed."""
        needed, max_cached = blocks_for(demand.num_tokens, block_size), demand.max_cached_tokens // block_size
        taken = self._blocks.take(model, needed, demand.block_hashes, max_cached, max_new_slabs)
        if taken is None:
            return None
        self._last_id += 1
        lease = Lease(LeaseRef(self._last_id, 1), model, taken.block_ids, taken.num_cached * block_size)
        self._records[self._last_id] = LeaseRecord(lease, router, demand.block_hashes, block_size, expires_at_s)
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
        """The hand-off: ``to`` owns the same blocks from now on, and others may use what is full. Raises LeaseLost."""
        record = self._owned(ref, owner)
        self._publish(record, record.block_hashes[: num_computed_tokens // record.block_size])
        record.lease = replace(
            record.lease, num_computed_tokens=num_computed_tokens, sampled_token_ids=sampled, handoff=handoff
        )
        self.num_handoffs += 1
        return self._hand_to(record, to)

    def grow(self, ref: LeaseRef, owner: str, num_blocks: int) -> tuple[int, ...] | None:
        """Adds token blocks to a lease; None if there is no room. Raises LeaseLost."""
        record = self._owned(ref, owner)
        taken = self._blocks.take(record.lease.model, num_blocks)
        if taken is None:
            return None
        record.lease = replace(record.lease, block_ids=record.lease.block_ids + taken.block_ids)
        return taken.block_ids

    def release(self, ref: LeaseRef, owner: str, computed: Sequence[bytes] = ()) -> None:
        """Ends the lease; its blocks are free, or cached under the hashes of ``computed``. Raises LeaseLost."""
        self._publish(self._owned(ref, owner), computed)
        self._end(ref.lease_id)

    def drop_owner(self, owner: str, computed: Mapping[int, Sequence[bytes]] | None = None) -> int:
        """Ends every lease of an owner that is certainly gone; returns how many.

        ``computed``: lease id → hashes of the blocks that it had computed, which stay as cache.
        """
        for lease_id, hashes in (computed or {}).items():
            record = self._records.get(lease_id)
            if record is not None and record.owner == owner:
                self._publish(record, hashes)
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

    def check_integrity(self) -> None:
        """Proves the invariant; raises AssertionError."""
        held: dict[str, Counter[int]] = {}
        for record in self._records.values():
            held.setdefault(record.lease.model, Counter()).update(record.lease.block_ids)
        self._blocks.check_integrity(held)

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

    def _publish(self, record: LeaseRecord, hashes: Sequence[bytes]) -> None:
        self._blocks.publish(record.lease.model, record.lease.block_ids, hashes)

    def _hand_to(self, record: LeaseRecord, owner: str) -> Lease:
        ref = record.lease.ref
        record.owner = owner
        record.lease = replace(record.lease, ref=replace(ref, epoch=ref.epoch + 1))
        return record.lease

    def _end(self, lease_id: int) -> None:
        lease = self._records.pop(lease_id).lease
        self._blocks.give_back(lease.model, lease.block_ids)

    def _end_all(self, chosen: Callable[[LeaseRecord], bool]) -> int:
        ending = [lease_id for lease_id, record in self._records.items() if chosen(record)]
        for lease_id in ending:
            self._end(lease_id)
        return len(ending)
