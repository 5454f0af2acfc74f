"""Leases: who owns a request's token blocks, and in which state they are. Pure.

A lease is created as a credit, owned by the router that may use it. The prefill worker acquires it and moves it to the
decode worker, which releases it. Credit, lease and allocation are one record with one owner at a time, so no block is
lost between them. Each change of owner raises the epoch. A call with another epoch, by another owner or in a state
without the transition raises LeaseLost and changes nothing.

    operation        from                to              the lease then holds
    issue_credit     -                   credit          blocks, until it expires
    acquire          credit              resident        blocks, with a new owner
    move             resident            resident        blocks, with a new owner
    grow             resident            resident        more blocks
    grow             paused              paused          more blocks
    pause            resident            paused          blocks, but no slot of the batch
    resume           paused              resident        blocks
    begin_swap_out   resident, paused    swapping_out    blocks and swap pages
    finish_swap_out  swapping_out        swapped         swap pages
    begin_swap_in    swapped             swapping_in     blocks and swap pages
    finish_swap_in   swapping_in         resident        blocks
    release          any                 -               nothing

`LeaseTable.drop_owner`, `drop_expired` and `device_failed` end leases as release does. This module does not know when
to pre-empt or to swap, nor which processes live: its callers decide that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from kvstore.block_table import AllocatedBlocks, BlockTable
from kvstore.sequence_progress import SequenceProgress
from kvstore.swap_space import SwapSpace
from kvstore.tenant_service import NO_PAYER, Payer, TenantService
from muxmesh.errors import LeaseLost
from muxmesh.quoting import named
from muxmesh.types import SOLE_TENANT, KvDemand, Lease, LeaseRef, SchedulingState, TenantStanding, blocks_for


class LeaseState(StrEnum):
    """The states of a lease; see the table at the head of this module."""

    CREDIT = "credit"
    RESIDENT = "resident"
    PAUSED = "paused"
    SWAPPING_OUT = "swapping_out"
    SWAPPED = "swapped"
    SWAPPING_IN = "swapping_in"


TRANSITIONS: Mapping[str, Mapping[LeaseState, LeaseState]] = {
    "acquire": {LeaseState.CREDIT: LeaseState.RESIDENT},
    "move": {LeaseState.RESIDENT: LeaseState.RESIDENT},
    "grow": {LeaseState.RESIDENT: LeaseState.RESIDENT, LeaseState.PAUSED: LeaseState.PAUSED},
    "pause": {LeaseState.RESIDENT: LeaseState.PAUSED},
    "resume": {LeaseState.PAUSED: LeaseState.RESIDENT},
    "begin_swap_out": {
        LeaseState.RESIDENT: LeaseState.SWAPPING_OUT,
        LeaseState.PAUSED: LeaseState.SWAPPING_OUT,
    },
    "finish_swap_out": {LeaseState.SWAPPING_OUT: LeaseState.SWAPPED},
    "begin_swap_in": {LeaseState.SWAPPED: LeaseState.SWAPPING_IN},
    "finish_swap_in": {LeaseState.SWAPPING_IN: LeaseState.RESIDENT},
}
"""Operation → state before → state after."""

_MAX_CHANGES = 64
"""If so many leases of a worker have changed, it takes less time to read all of them."""
BATCHED = frozenset({LeaseState.CREDIT, LeaseState.RESIDENT, LeaseState.SWAPPING_OUT, LeaseState.SWAPPING_IN})
"""States in which a lease takes a slot of its workers' batches, at once or soon."""
_HAS_VALID_BLOCKS = frozenset({LeaseState.RESIDENT, LeaseState.PAUSED, LeaseState.SWAPPING_OUT})
"""States in which the lease's token blocks hold its computed KV."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Names of the workers that serve a request."""

    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class StandingChange:
    """The tenant of some leases of ``worker`` stands elsewhere beside other tenants than the worker knows."""

    worker: str
    standing: TenantStanding
    lease_ids: tuple[int, ...]


@dataclass(slots=True)
class LeaseRecord:
    """One lease and what it holds.

    ``block_hashes``: hashes of its first blocks, valid once these are computed. ``expires_at_s`` applies to a credit
    only. ``router``: whose request it is. ``swap_pages``: pages for the copy of its KV, filled or not.
    ``num_preemption_requests``: how often its worker was asked to free its token blocks, until it did.
    ``num_preemptions``: how often it was displaced from a batch, in earlier attempts too; that and ``is_protected``
    are as its decode worker reports them. ``has_valid_kv``: the device has not failed. ``charged_s``: work done, as in
    `SchedulingState.served_s`, for which ``payer`` has been charged or that was charged to an earlier attempt.
    ``prefill_charge_s``: what its prefill costs. ``credited`` and ``told``: the tenant's standing that came with the
    credit, and that which the owner knows.
    """

    lease: Lease
    state: LeaseState
    owner: str
    assignment: Assignment
    block_hashes: Sequence[bytes]
    block_size: int
    scheduling: SchedulingState
    expires_at_s: float
    router: str = ""
    swap_pages: tuple[int, ...] = ()
    num_preemption_requests: int = 0
    num_preemptions: int = 0
    is_protected: bool = False
    has_valid_kv: bool = True
    payer: Payer = NO_PAYER
    prefill_charge_s: float = 0.0
    charged_s: float = 0.0
    credited: TenantStanding = SOLE_TENANT
    told: TenantStanding = SOLE_TENANT

    @property
    def is_batched(self) -> bool:
        """Whether it has a slot of the batch of its decode worker, or will soon."""
        return self.state in BATCHED


class LeaseTable:
    """Owns all leases of a unit and, through them, every token block and swap page in use.

    Invariant: each token block in use belongs to at least one lease. A block of several leases holds their common
    prefix and is never written again. Each swap page in use belongs to one lease. A lease holds what the table at the
    head of this module lists for its state.
    """

    def __init__(
        self, blocks: BlockTable, swap: SwapSpace, last_id: int = 0, tenants: TenantService | None = None
    ) -> None:
        """``last_id``: ids continue from here, so that a restarted unit never issues the id of an earlier lease.

        ``tenants``: where leases are counted and their service is charged.
        """
        self._tenants = tenants or TenantService()
        self._untold: set[int] = set()
        """Leases whose owner may have to be told of another standing of their tenant."""
        self._blocks = blocks
        self._swap = swap
        self._records: dict[int, LeaseRecord] = {}
        self._credits: dict[int, LeaseRecord] = {}
        """Those of the records whose state is CREDIT."""
        self._batched = Counter[str]()
        self._resident = Counter[str]()
        """See `count_assigned`."""
        self._of_model: dict[str, dict[int, LeaseRecord]] = {}
        """Model → its records by id, in the order of their ids; no entry without any."""
        self._computing: dict[str, dict[int, LeaseRecord]] = {}
        """Owner → its records whose state is RESIDENT, by id; no entry without any."""
        self._changed: dict[str, set[int]] = {}
        """See `changes_in`. No entry: it was not called for that worker, or too many have changed."""
        self._last_id = last_id
        self.num_handoffs = 0
        self.num_expired = 0
        self.num_orphaned = 0

    def __len__(self) -> int:
        return len(self._records)

    def issue_credit(
        self,
        model: str,
        block_size: int,
        demand: KvDemand,
        scheduling: SchedulingState,
        router: str,
        assignment: Assignment,
        expires_at_s: float,
        max_new_slabs: int | None = None,
        payer: Payer = NO_PAYER,
        prefill_token_s: float = 0.0,
    ) -> Lease | None:
        """Returns a new credit, owned by ``router``, or None if the pool is full.

        ``payer`` is charged for its service, with ``prefill_token_s`` for each token that prefill has to compute.

        Tokens that are in the prefix cache count as computed. ``max_new_slabs``: see `BlockTable.allocate`.
        """
        allocated = self._allocate(model, block_size, demand, max_new_slabs)
        if allocated is None:
            return None
        self._last_id += 1
        lease = Lease(LeaseRef(self._last_id, 1), model, allocated.block_ids, allocated.num_cached * block_size)
        record = LeaseRecord(
            lease,
            LeaseState.CREDIT,
            router,
            assignment,
            demand.block_hashes,
            block_size,
            scheduling,
            expires_at_s,
            router,
            num_preemptions=scheduling.num_preemptions,
            payer=payer,
            prefill_charge_s=prefill_token_s * max(0, demand.num_known_tokens - lease.num_computed_tokens),
            charged_s=scheduling.served_s + scheduling.prefill_s,
            credited=scheduling.standing,
            told=scheduling.standing,
        )
        self._tenants.lease(payer, scheduling.priority)
        self._records[self._last_id] = self._credits[self._last_id] = record
        self._of_model.setdefault(model, {})[self._last_id] = record
        self._enter(record)
        return lease

    def acquire(self, ref: LeaseRef, worker: str) -> Lease:
        """Makes a credit the lease of ``worker``, which may be another prefill worker than the credit names: the one
        that has taken its place. Raises LeaseLost.

        Charges its prefill, unless that computes again what others had freed.
        """
        record = self._at(ref)
        self._set_state(record, self._after("acquire", record))
        if record.scheduling.served_s == 0:
            self._tenants.charge_prefill(record.payer, record.prefill_charge_s)
        return self._change_owner(record, worker, replace(record.assignment, prefill=worker))

    def move(self, ref: LeaseRef, owner: str, to: str, num_computed_tokens: int, sampled: tuple[int, ...]) -> Lease:
        """The hand-off: makes ``to`` the owner of the same blocks. Raises LeaseLost.

        Publishes the blocks that ``num_computed_tokens`` fill: other requests may share them.
        """
        record = self.owned(ref, owner)
        self._set_state(record, self._after("move", record))
        self._publish(record, record.block_hashes[: num_computed_tokens // record.block_size])
        lease = record.lease
        record.lease = Lease(lease.ref, lease.model, lease.block_ids, num_computed_tokens, sampled)
        self.num_handoffs += 1
        return self._change_owner(record, to, replace(record.assignment, decode=to))

    def grow(
        self, ref: LeaseRef, owner: str, num_blocks: int, max_new_slabs: int | None = None
    ) -> tuple[int, ...] | None:
        """Adds token blocks to a lease and returns them; None if the pool is full. Raises LeaseLost."""
        record = self.owned(ref, owner)
        self._after("grow", record)
        allocated = self._blocks.allocate(record.lease.model, num_blocks, max_new_slabs=max_new_slabs)
        if allocated is None:
            return None
        lease, block_ids = record.lease, record.lease.block_ids + allocated.block_ids
        record.lease = Lease(lease.ref, lease.model, block_ids, lease.num_computed_tokens, lease.sampled_token_ids)
        return allocated.block_ids

    def pause(self, ref: LeaseRef, owner: str) -> None:
        """Takes the sequence out of the batch; it keeps its blocks. Raises LeaseLost."""
        record = self.owned(ref, owner)
        self._set_state(record, self._after("pause", record))

    def resume(self, ref: LeaseRef, owner: str) -> None:
        """Returns a paused sequence to the batch. Raises LeaseLost."""
        record = self.owned(ref, owner)
        self._set_state(record, self._after("resume", record))

    def report(self, lease_id: int, progress: SequenceProgress) -> None:
        """What its decode worker reports of a sequence, which may be some steps old: pauses or resumes its lease.

        Ignored if the lease has ended or is not that worker's.
        """
        record = self._records.get(lease_id)
        if record is None or record.owner != record.assignment.decode:
            return
        if record.state is LeaseState.RESIDENT and not progress.is_batched:
            self.pause(record.lease.ref, record.owner)
        elif record.state is LeaseState.PAUSED and progress.is_batched:
            self.resume(record.lease.ref, record.owner)
        self._charge(record, progress.served_s)
        num_preemptions = max(record.num_preemptions, progress.num_preemptions)  # the page begins at 0
        if (num_preemptions, progress.is_protected) != (record.num_preemptions, record.is_protected):
            record.num_preemptions, record.is_protected = num_preemptions, progress.is_protected
            self._note_change(record)
        if (decode_s := progress.decode_s) is not None and decode_s != record.scheduling.decode_s:
            record.scheduling = record.scheduling.with_work(decode_s, progress.served_s)
            self._note_change(record)

    def set_standings(self, standing_of: Callable[[LeaseRecord], TenantStanding]) -> None:
        """Gives each lease the standing of its tenant."""
        for lease_id, record in self._records.items():
            standing = standing_of(record)
            held = record.scheduling.standing
            if standing is not held and standing != held:
                record.scheduling = record.scheduling.with_standing(standing)
                self._untold.add(lease_id)
                self._note_change(record)

    def take_standing_changes(self) -> list[StandingChange]:
        """What workers have to be told of the tenants of their leases, since the last call.

        A credit is told with its lease: a worker learns the standing with the request, and changes since from here.
        """
        changes: dict[tuple[str, TenantStanding], list[int]] = {}
        for lease_id in sorted(self._untold):
            record = self._records.get(lease_id)
            if record is None or record.scheduling.standing == record.told:
                self._untold.discard(lease_id)
            elif record.state is not LeaseState.CREDIT:
                self._untold.discard(lease_id)
                record.told = record.scheduling.standing
                changes.setdefault((record.owner, record.told), []).append(lease_id)
        return [StandingChange(worker, standing, tuple(ids)) for (worker, standing), ids in changes.items()]

    def records(self) -> Collection[LeaseRecord]:
        """The records of all leases, to read."""
        return self._records.values()

    def decoding_in(self, decode_worker: str) -> list[LeaseRecord]:
        """The leases of the sequences that a decode worker computes."""
        return list(self._computing.get(decode_worker, {}).values())

    def prefilling_for(self, model: str, decode_worker: str) -> list[int]:
        """The precedence of each sequence that ``decode_worker`` gets from prefill, sorted; none of a sole tenant."""
        return sorted(
            record.scheduling.precedence
            for record in self._of_model.get(model, {}).values()
            if record.assignment.decode == decode_worker != record.owner and record.scheduling.standing.has_rivals
        )

    def changes_in(self, decode_worker: str) -> dict[int, LeaseRecord | None] | None:
        """What may have changed in `decoding_in` since the last call, by lease id: leases that are new, whose worker
        has reported something else, or (None) that are no longer there. None: read all of it.
        """
        changed = self._changed.get(decode_worker)
        self._changed[decode_worker] = set()
        if changed is None:
            return None
        computing = self._computing.get(decode_worker, {})
        return {lease_id: computing.get(lease_id) for lease_id in changed}

    def begin_swap_out(self, ref: LeaseRef, owner: str, num_bytes: int) -> tuple[int, ...] | None:
        """Returns swap pages for a copy of the lease's KV; None if the swap region is full. Raises LeaseLost."""
        record = self.owned(ref, owner)
        state = self._after("begin_swap_out", record)
        pages = self._swap.allocate(num_bytes)
        if pages is not None:
            self._set_state(record, state)
            record.swap_pages = pages
        return pages

    def finish_swap_out(self, ref: LeaseRef, owner: str, computed: Sequence[bytes] = ()) -> None:
        """The copy is complete: frees the token blocks, or caches those whose hash is in ``computed``.

        Raises LeaseLost.
        """
        record = self.owned(ref, owner)
        state = self._after("finish_swap_out", record)
        self._publish(record, computed)
        self._blocks.free(record.lease.model, record.lease.block_ids)
        record.lease = replace(record.lease, block_ids=())
        self._set_state(record, state)
        record.num_preemption_requests = 0

    def begin_swap_in(
        self, ref: LeaseRef, demand: KvDemand, max_new_slabs: int | None = None
    ) -> AllocatedBlocks | None:
        """Returns token blocks for a swapped lease; None if the pool is full. Raises LeaseLost.

        The KV of the cached ones need not be copied back.
        """
        record = self._at(ref)
        state = self._after("begin_swap_in", record)
        allocated = self._allocate(record.lease.model, record.block_size, demand, max_new_slabs)
        if allocated is not None:
            record.lease = replace(record.lease, block_ids=allocated.block_ids)
            self._set_state(record, state)
        return allocated

    def finish_swap_in(self, ref: LeaseRef, owner: str) -> None:
        """The KV is in the token blocks again: frees the swap pages. Raises LeaseLost."""
        record = self.owned(ref, owner)
        self._set_state(record, self._after("finish_swap_in", record))
        self._swap.free(record.swap_pages)
        record.swap_pages = ()

    def release(self, ref: LeaseRef, owner: str, computed: Sequence[bytes] = (), served_s: float = 0.0) -> None:
        """Ends the lease and frees what it holds. Raises LeaseLost.

        ``computed``: hashes of its first blocks whose KV is computed; these blocks stay in the prefix cache.
        ``served_s``: work done by now, as in `SchedulingState.served_s`; 0: as reported last.
        """
        record = self.owned(ref, owner)
        self._charge(record, served_s)
        if record.state in _HAS_VALID_BLOCKS:
            self._publish(record, computed)
        self._end(ref.lease_id)

    def drop_owner(self, owner: str, computed: Mapping[int, Sequence[bytes]] | None = None) -> int:
        """Ends every lease of an owner whose processes have exited; returns their number.

        ``computed``: lease id → as in `release`. Leases of other owners in it are ignored.
        """
        for lease_id, hashes in (computed or {}).items():
            record = self._records.get(lease_id)
            if record is not None and record.owner == owner and record.state in _HAS_VALID_BLOCKS:
                self._publish(record, hashes)
        num_ended = self._end_all([one for one, record in self._records.items() if record.owner == owner])
        self._changed.pop(owner, None)
        self.num_orphaned += num_ended
        return num_ended

    def drop_expired(self, now_s: float) -> int:
        """Ends the credits that have expired; returns their number."""
        num_ended = self._end_all([one for one, credit in self._credits.items() if credit.expires_at_s <= now_s])
        self.num_expired += num_ended
        return num_ended

    def device_failed(self) -> int:
        """Ends all credits; returns their number. What the other leases have computed is never published."""
        for record in self._records.values():
            record.has_valid_kv = False
        return self._end_all(list(self._credits))

    def next_expiry_s(self) -> float | None:
        """When the next credit expires; None without credits."""
        return min((credit.expires_at_s for credit in self._credits.values()), default=None)

    def of_owner(self, owner: str) -> list[Lease]:
        return [record.lease for record in self._records.values() if record.owner == owner]

    def state_of(self, ref: LeaseRef, owner: str) -> LeaseState:
        """The state of a lease of ``owner``. Raises LeaseLost."""
        return self.owned(ref, owner).state

    def find(self, lease_id: int) -> LeaseRecord | None:
        """The record of a lease, to read; None if it has ended."""
        return self._records.get(lease_id)

    def of_models(self, models: Collection[str]) -> list[LeaseRecord]:
        """The records of all leases of ``models``, to read, in the order of their ids."""
        found = [record for model in models for record in self._of_model.get(model, {}).values()]
        return found if len(models) == 1 else sorted(found, key=lambda record: record.lease.ref.lease_id)

    def model_of(self, ref: LeaseRef, owner: str) -> str:
        """The model of a lease of ``owner``. Raises LeaseLost."""
        return self.owned(ref, owner).lease.model

    def count_by_owner(self) -> Counter[str]:
        """Owner → number of its leases."""
        return Counter(record.owner for record in self._records.values())

    def count_by_model(self) -> dict[str, int]:
        """Model → number of its leases, in any state; no entry without any."""
        return {model: len(records) for model, records in self._of_model.items()}

    def count_states(self, model: str) -> Counter[LeaseState]:
        """State → number of leases of ``model``."""
        return Counter(record.state for record in self._of_model.get(model, {}).values())

    def count_assigned(self) -> tuple[Counter[str], Counter[str]]:
        """Two counts of the leases assigned to each worker: those that take a slot of its batch (`BATCHED`), and those
        that hold token blocks. After the hand-off a lease counts for its decode worker only.
        """
        return self._batched.copy(), self._resident.copy()

    def check_integrity(self) -> None:
        """Proves the invariant. Raises AssertionError."""
        held: dict[str, Counter[int]] = {}
        for record in self._records.values():
            lease_id, state = record.lease.ref.lease_id, record.state
            has_blocks = state is not LeaseState.SWAPPED
            has_pages = state in (LeaseState.SWAPPING_OUT, LeaseState.SWAPPED, LeaseState.SWAPPING_IN)
            assert bool(record.lease.block_ids) is has_blocks, f"lease {lease_id} is {state}: wrong token blocks"
            assert bool(record.swap_pages) is has_pages, f"lease {lease_id} is {state}: wrong swap pages"
            held.setdefault(record.lease.model, Counter()).update(record.lease.block_ids)
        self._blocks.check_integrity(held)
        assert self.count_by_model() == Counter(record.lease.model for record in self._records.values())
        assert self._credits == {one: r for one, r in self._records.items() if r.state is LeaseState.CREDIT}
        computing = [(r.owner, one) for one, r in self._records.items() if r.state is LeaseState.RESIDENT]
        assert sorted(computing) == sorted((owner, one) for owner, of in self._computing.items() for one in of)
        batched, resident = self._batched, self._resident
        self._batched, self._resident = Counter[str](), Counter[str]()
        for record in self._records.values():
            self._count(record, 1)
        assert (batched, resident) == (self._batched, self._resident), "counts of assigned leases are wrong"
        self._swap.check_integrity(page for record in self._records.values() for page in record.swap_pages)

    def _allocate(
        self, model: str, block_size: int, demand: KvDemand, max_new_slabs: int | None
    ) -> AllocatedBlocks | None:
        needed, max_cached = blocks_for(demand.num_tokens, block_size), demand.max_cached_tokens // block_size
        return self._blocks.allocate(model, needed, demand.block_hashes, max_cached, max_new_slabs)

    def _at(self, ref: LeaseRef) -> LeaseRecord:
        record = self._records.get(ref.lease_id)
        if record is None:
            raise LeaseLost(f"lease {ref.lease_id} does not exist or has ended")
        if record.lease.ref.epoch != ref.epoch:
            raise LeaseLost(f"lease {ref.lease_id} is at epoch {record.lease.ref.epoch}, not {ref.epoch}")
        return record

    def owned(self, ref: LeaseRef, owner: str) -> LeaseRecord:
        """The record of a lease of ``owner``, which only this table changes. Raises LeaseLost."""
        record = self._at(ref)
        if record.owner != owner:
            raise LeaseLost(f"lease {ref.lease_id} belongs to {record.owner}, not {named(owner)}")
        return record

    @staticmethod
    def _after(operation: str, record: LeaseRecord) -> LeaseState:
        """The state after an operation. Raises LeaseLost if the lease's state does not allow it."""
        allowed = TRANSITIONS[operation]
        if record.state not in allowed:
            needed = " or ".join(allowed)
            raise LeaseLost(f"lease {record.lease.ref.lease_id} is {record.state}; {operation} needs {needed}")
        return allowed[record.state]

    def _publish(self, record: LeaseRecord, hashes: Sequence[bytes]) -> None:
        if record.has_valid_kv:
            self._blocks.insert_prefix(record.lease.model, record.lease.block_ids, hashes)

    def _count(self, record: LeaseRecord, number: int) -> None:
        """Adds ``number`` to the counts of the workers that a lease is assigned to."""
        prefill, decode = record.assignment.prefill, record.assignment.decode
        for worker in (decode,) if record.owner == decode else (prefill, decode):
            if record.state in BATCHED:
                _add(self._batched, worker, number)
            if record.state is not LeaseState.SWAPPED:
                _add(self._resident, worker, number)

    def _charge(self, record: LeaseRecord, served_s: float) -> None:
        """Charges the decode steps of a lease up to ``served_s``; 0 or less than was charged: none."""
        if served_s > record.charged_s:
            self._tenants.charge_decode(record.payer, served_s - record.charged_s)
            record.charged_s = served_s

    def _enter(self, record: LeaseRecord) -> None:
        """Counts a lease with its owner and state of now."""
        self._count(record, 1)
        if record.state is LeaseState.RESIDENT:
            self._computing.setdefault(record.owner, {})[record.lease.ref.lease_id] = record
            self._note_change(record)

    def _leave(self, record: LeaseRecord) -> None:
        """The reverse of `_enter`."""
        self._count(record, -1)
        if record.state is LeaseState.RESIDENT:
            computing = self._computing[record.owner]
            del computing[record.lease.ref.lease_id]
            if not computing:
                del self._computing[record.owner]
            self._note_change(record)

    def _note_change(self, record: LeaseRecord) -> None:
        """For `changes_in`."""
        changed = self._changed.get(record.owner)
        if changed is not None:
            changed.add(record.lease.ref.lease_id)
            if len(changed) > _MAX_CHANGES:
                del self._changed[record.owner]

    def _set_state(self, record: LeaseRecord, state: LeaseState) -> None:
        self._leave(record)
        record.state = state
        self._enter(record)
        if state is not LeaseState.CREDIT:
            self._credits.pop(record.lease.ref.lease_id, None)

    def _change_owner(self, record: LeaseRecord, owner: str, assignment: Assignment) -> Lease:
        self._leave(record)
        record.owner, record.assignment = owner, assignment
        self._enter(record)
        record.told = record.credited
        if record.scheduling.standing != record.told:
            self._untold.add(record.lease.ref.lease_id)
        lease = record.lease
        ref = LeaseRef(lease.ref.lease_id, lease.ref.epoch + 1)
        record.lease = Lease(ref, lease.model, lease.block_ids, lease.num_computed_tokens, lease.sampled_token_ids)
        return record.lease

    def _end(self, lease_id: int) -> None:
        record = self._records.pop(lease_id)
        self._credits.pop(lease_id, None)
        self._leave(record)
        self._tenants.end_lease(record.payer, record.scheduling.priority)
        self._untold.discard(lease_id)
        of_model = self._of_model[record.lease.model]
        del of_model[lease_id]
        if not of_model:
            del self._of_model[record.lease.model]
        self._blocks.free(record.lease.model, record.lease.block_ids)
        self._swap.free(record.swap_pages)

    def _end_all(self, ending: Sequence[int]) -> int:
        for lease_id in ending:
            self._end(lease_id)
        return len(ending)


def _add(counts: Counter[str], key: str, number: int) -> None:
    """Adds to a count, which has no entry while it is 0: each worker that starts has another name."""
    counts[key] += number
    if not counts[key]:
        del counts[key]
