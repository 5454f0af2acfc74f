"""Leases: who owns a request's token blocks. Pure.

A lease is born as a **credit**, owned by the router that may use it; the prefill worker acquires it, moves it to the
decode worker, and that one releases it. So "credit", "lease" and "allocation" are one record with one owner at a
time, and nothing can fall between them. Each change of owner raises the epoch; a call with another epoch, or by
another owner, is refused with LeaseLost.

A lease may be **swapped**: its owner copied the KV to pages of host memory and gave the token blocks back. Between
`swap_out` and `swapped_out`, and between `swap_in` and `swapped_in`, it has both, and its owner copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from kvstore.blocks import BlockTable, Taken
from kvstore.swap import SwapSpace
from muxmesh.errors import LeaseLost
from muxmesh.order import Key
from muxmesh.types import KvDemand, Lease, LeaseRef, Standing, blocks_for

MOST_ASKS = 20
"""After so many, another lease is asked to give way."""


@dataclass(slots=True)
class LeaseRecord:
    """One lease. ``expires_at_s`` is set while it is a credit.

    ``block_hashes`` name the prefixes that its first blocks hold, or will hold once they are computed. ``standing``
    is its request's. ``swap_pages`` hold a copy of its KV, or will. ``times_asked``: to give way.
    """

    lease: Lease
    owner: str
    block_hashes: Sequence[bytes]
    block_size: int
    standing: Standing
    expires_at_s: float | None = None
    swap_pages: tuple[int, ...] = ()
    times_asked: int = 0

    @property
    def is_swapped(self) -> bool:
        """Its KV is nowhere but in swap pages."""
        return bool(self.swap_pages) and not self.lease.block_ids


class LeaseTable:
    """Owns all leases of a unit and, through them, every token block and swap page in use.

    Invariant: each token block in use belongs to at least one lease; those of several hold a common prefix, which
    nobody writes any more. Each swap page in use belongs to one lease.
    """

    def __init__(self, blocks: BlockTable, swap: SwapSpace, last_id: int = 0) -> None:
        """``last_id``: ids go on from here, so that those of an earlier life of the unit never come again."""
        self._blocks = blocks
        self._swap = swap
        self._records: dict[int, LeaseRecord] = {}
        self._last_id = last_id
        self.num_handoffs = 0
        self.num_expired = 0
        self.num_orphaned = 0

    def __len__(self) -> int:
        return len(self._records)

    def grant_credit(
        self,
        model: str,
        block_size: int,
        demand: KvDemand,
        standing: Standing,
        router: str,
        expires_at_s: float,
        max_new_slabs: int | None = None,
    ) -> Lease | None:
        """A new lease owned by ``router``, or None if the pool has no room. What is cached of it is computed."""
        taken = self._take(model, block_size, demand, max_new_slabs)
        if taken is None:
            return None
        self._last_id += 1
        lease = Lease(LeaseRef(self._last_id, 1), model, taken.block_ids, taken.num_cached * block_size)
        self._records[self._last_id] = LeaseRecord(
            lease, router, demand.block_hashes, block_size, standing, expires_at_s
        )
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
        record = self._resident(ref, owner)
        self._publish(record, record.block_hashes[: num_computed_tokens // record.block_size])
        record.lease = replace(
            record.lease, num_computed_tokens=num_computed_tokens, sampled_token_ids=sampled, handoff=handoff
        )
        self.num_handoffs += 1
        return self._hand_to(record, to)

    def grow(
        self, ref: LeaseRef, owner: str, num_blocks: int, max_new_slabs: int | None = None
    ) -> tuple[int, ...] | None:
        """Adds token blocks to a lease; None if there is no room. Raises LeaseLost."""
        record = self._resident(ref, owner)
        taken = self._blocks.take(record.lease.model, num_blocks, max_new_slabs=max_new_slabs)
        if taken is None:
            return None
        record.lease = replace(record.lease, block_ids=record.lease.block_ids + taken.block_ids)
        return taken.block_ids

    def swap_out(self, ref: LeaseRef, owner: str, num_bytes: int) -> tuple[int, ...] | None:
        """Pages for a copy of the lease's KV; None if there is no room. Raises LeaseLost."""
        record = self._resident(ref, owner)
        pages = self._swap.take(num_bytes)
        record.swap_pages = pages or ()
        return pages

    def swapped_out(self, ref: LeaseRef, owner: str, computed: Sequence[bytes] = ()) -> None:
        """The copy is made: the token blocks are free, or cached under the hashes of ``computed``. Raises LeaseLost."""
        record = self._owned(ref, owner)
        if not record.swap_pages:
            raise LeaseLost(f"lease {ref.lease_id} has no swap pages to live in")
        self._publish(record, computed)
        self._blocks.give_back(record.lease.model, record.lease.block_ids)
        record.lease = replace(record.lease, block_ids=())
        record.times_asked = 0

    def swap_in(self, ref: LeaseRef, demand: KvDemand, max_new_slabs: int | None = None) -> Taken | None:
        """Token blocks for a swapped lease, of which the cached ones need no copy; None if there is no room.

        Raises LeaseLost.
        """
        record = self._at(ref)
        if not record.is_swapped:
            raise LeaseLost(f"lease {ref.lease_id} is not swapped")
        taken = self._take(record.lease.model, record.block_size, demand, max_new_slabs)
        if taken is not None:
            record.lease = replace(record.lease, block_ids=taken.block_ids)
        return taken

    def swapped_in(self, ref: LeaseRef, owner: str) -> None:
        """The KV is copied back: the pages are free. Raises LeaseLost."""
        record = self._owned(ref, owner)
        if record.is_swapped:
            raise LeaseLost(f"lease {ref.lease_id} has no token blocks to live in")
        self._swap.give_back(record.swap_pages)
        record.swap_pages = ()

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
        num_ended = self._end_all(lambda record: record.owner == owner)
        self.num_orphaned += num_ended
        return num_ended

    def drop_expired(self, now_s: float) -> int:
        """Ends credits that were not used in time; returns how many."""
        num_ended = self._end_all(lambda record: record.expires_at_s is not None and record.expires_at_s <= now_s)
        self.num_expired += num_ended
        return num_ended

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

    def count_swapped(self, model: str) -> int:
        """Leases of one model that have no token blocks now."""
        return sum(r.lease.model == model and r.is_swapped for r in self._records.values())

    def ask_to_give_way(
        self, owners: Collection[str], models: Collection[str], key: Callable[[Standing], Key]
    ) -> tuple[str, int] | None:
        """Chooses the last in order of the leases that ``owners`` have of ``models``: owner and id, or None.

        It is the same one again until it has given its token blocks back, or was asked `MOST_ASKS` times: its worker
        may be held up by a client that does not read.
        """
        possible = [
            record
            for record in self._records.values()
            if record.owner in owners and record.lease.model in models and record.times_asked < MOST_ASKS
        ]
        asked = next((record for record in possible if record.times_asked), None)
        free = (record for record in possible if record.lease.block_ids and not record.swap_pages)
        chosen = asked or max(free, key=lambda record: key(record.standing), default=None)
        if chosen is None:
            return None
        chosen.times_asked += 1
        return chosen.owner, chosen.lease.ref.lease_id

    def model_of(self, ref: LeaseRef, owner: str) -> str:
        """The model of a lease. Raises LeaseLost if it is not there or not its owner's."""
        return self._owned(ref, owner).lease.model

    def swapped_model(self, ref: LeaseRef, owner: str) -> str:
        """The model of a swapped lease. Raises LeaseLost if it is not there, not its owner's, or not swapped."""
        record = self._owned(ref, owner)
        if not record.is_swapped:
            raise LeaseLost(f"lease {ref.lease_id} is not swapped")
        return record.lease.model

    def check_integrity(self) -> None:
        """Proves the invariant; raises AssertionError."""
        held: dict[str, Counter[int]] = {}
        for record in self._records.values():
            held.setdefault(record.lease.model, Counter()).update(record.lease.block_ids)
        self._blocks.check_integrity(held)
        self._swap.check_integrity(page for record in self._records.values() for page in record.swap_pages)

    def _take(self, model: str, block_size: int, demand: KvDemand, max_new_slabs: int | None) -> Taken | None:
        needed, max_cached = blocks_for(demand.num_tokens, block_size), demand.max_cached_tokens // block_size
        return self._blocks.take(model, needed, demand.block_hashes, max_cached, max_new_slabs)

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

    def _resident(self, ref: LeaseRef, owner: str) -> LeaseRecord:
        record = self._owned(ref, owner)
        if record.swap_pages:
            raise LeaseLost(f"lease {ref.lease_id} is swapped, or on its way")
        return record

    def _publish(self, record: LeaseRecord, hashes: Sequence[bytes]) -> None:
        self._blocks.publish(record.lease.model, record.lease.block_ids, hashes)

    def _hand_to(self, record: LeaseRecord, owner: str) -> Lease:
        ref = record.lease.ref
        record.owner = owner
        record.lease = replace(record.lease, ref=replace(ref, epoch=ref.epoch + 1))
        return record.lease

    def _end(self, lease_id: int) -> None:
        record = self._records.pop(lease_id)
        self._blocks.give_back(record.lease.model, record.lease.block_ids)
        self._swap.give_back(record.swap_pages)

    def _end_all(self, chosen: Callable[[LeaseRecord], bool]) -> int:
        ending = [lease_id for lease_id, record in self._records.items() if chosen(record)]
        for lease_id in ending:
            self._end(lease_id)
        return len(ending)
