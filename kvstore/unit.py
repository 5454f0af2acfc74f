"""The brain of a unit: pool, leases, admission and the workers that are attached. Pure; time is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvstore.admission import Admission, WaitingKey
from kvstore.blocks import BlockTable
from kvstore.leases import LeaseTable
from kvstore.quotas import ADAPT_EVERY_S, Use, adapted, initial_quotas
from kvstore.slab_pool import SlabPool
from kvstore.swap import SwapSpace
from muxmesh.config.runtime import Role
from muxmesh.errors import InvalidRequest, WorkerLost
from muxmesh.models.spec import KvShape
from muxmesh.order import FCFS, Order
from muxmesh.types import KvDemand, Lease, LeaseRef, Standing, blocks_for

_ID_BITS = 16
CREDIT_TTL_S = 30.0
"""A credit that no worker acquired for so long is taken back."""
RECLAIM_AFTER_S = 1.0
"""A key within its model's quota that waits for so long makes answers of models past theirs give way, ..."""
RECLAIM_EVERY_S = 0.1
"""... one by one, at least so far apart."""


@dataclass(slots=True)
class WorkerRecord:
    """An attached worker. ``name`` carries its incarnation, so a restarted worker is another one."""

    name: str
    role: Role
    model: str
    address: str
    pid: int
    ready: bool = False


@dataclass(frozen=True, slots=True)
class ModelShare:
    """What a unit needs to know of one model."""

    shape: KvShape
    max_num_seqs: int
    max_model_len: int
    guaranteed_slabs: int = 0


@dataclass(frozen=True, slots=True)
class CreditGiven:
    """A credit for a router, with the workers that are to serve it."""

    router: str
    key_id: int
    lease: Lease
    prefill: WorkerRecord
    decode: WorkerRecord
    decision: int
    num_overtaken: int
    standing: Standing


@dataclass(frozen=True, slots=True)
class SwapInGiven:
    """Token blocks for a swapped lease of ``worker``; the first ``num_cached`` hold its beginning already."""

    worker: str
    lease_id: int
    block_ids: tuple[int, ...]
    num_cached: int


@dataclass(frozen=True, slots=True)
class GiveWay:
    """``worker`` is to give back the token blocks of a lease: to swap them, or to let the request begin anew."""

    worker: str
    lease_id: int


@dataclass(frozen=True, slots=True)
class RoomGiven:
    """What `Unit.give_room` decided: whoever is named here has to be told."""

    credits: list[CreditGiven] = field(default_factory=list)
    swap_ins: list[SwapInGiven] = field(default_factory=list)
    give_way: list[GiveWay] = field(default_factory=list)


def first_id(unix_s: float) -> int:
    """A ``last_id`` for a unit that starts now: above all that an earlier life of it gave out."""
    return int(unix_s * 1000) << _ID_BITS


class Unit:
    """Owns the unit's state. Whoever changes it calls `give_room` afterwards and sends what that returns."""

    def __init__(
        self,
        pool_bytes: int,
        slab_bytes: int,
        models: Mapping[str, ModelShare],
        last_id: int = 0,
        swap_bytes: int = 0,
        order: Order = FCFS,
    ) -> None:
        """Raises ValueError if a slab does not hold one token block of each model.

        ``last_id``: lease ids go on from here, and incarnations from its upper bits; see `first_id`.
        """
        blocks = {name: slab_bytes // share.shape.token_block_bytes for name, share in models.items()}
        self.models = models
        self.slab_bytes = slab_bytes
        self.pool = SlabPool(pool_bytes // slab_bytes, blocks)
        self.blocks = BlockTable(self.pool)
        self.swap = SwapSpace(swap_bytes)
        self.leases = LeaseTable(self.blocks, self.swap, last_id)
        self.order = order
        self.num_decisions = 0
        self.admission = Admission(order)
        self.quotas = initial_quotas(self.pool.num_slabs, self._guaranteed())
        self._slab_seconds = dict.fromkeys(models, 0.0)
        self._counted_until_s: float | None = None
        self._reclaim_at_s: float | None = None
        self._adapted_at_s: float | None = None
        self.workers: dict[str, WorkerRecord] = {}
        self._incarnations = last_id >> _ID_BITS

    def attach(self, role: Role, model: str, address: str, pid: int) -> WorkerRecord:
        """A worker process came. Raises InvalidRequest for a model that is not of this unit."""
        if model not in self.models:
            raise InvalidRequest("model", f"{model!r} is not of this unit; it has: {', '.join(sorted(self.models))}")
        self._incarnations += 1
        worker = WorkerRecord(f"{role.value}-{model}#{self._incarnations:x}", role, model, address, pid)
        self.workers[worker.name] = worker
        return worker

    def worker_exited(self, name: str, computed: Mapping[int, Sequence[bytes]] | None = None) -> int:
        """A worker's process is certainly gone: its leases end, and what it had computed stays as cache.

        Returns how many. ``computed``: see `ProgressPage.read`.
        """
        self.workers.pop(name, None)
        self.admission.drop_asker(name)
        return self.leases.drop_owner(name, computed)

    def router_gone(self, router: str) -> None:
        """A router's stream broke: its keys and unused credits end. Workers end their own leases."""
        self.admission.drop_asker(router)
        self.leases.drop_owner(router)

    def offer(self, key: WaitingKey) -> None:
        """A router shows a key. Raises InvalidRequest if this unit can never serve it.

        What the prefix cache has of its prompt now is no work.
        """
        if key.model not in self.models:
            raise InvalidRequest("model", f"{key.model!r} is not of this unit")
        block_size, capacity = self.models[key.model].shape.block_size, self.pool.capacity_blocks(key.model)
        most_tokens = key.demand.most_tokens
        if blocks_for(most_tokens, block_size) > capacity:
            raise InvalidRequest(
                "stopping.max_new_tokens",
                f"prompt and longest answer are {most_tokens} tokens; the KV pool holds {capacity * block_size}",
            )
        self.admission.offer(self._with_what_is_cached(key))

    def ask_swap_in(self, ref: LeaseRef, owner: str, demand: KvDemand, standing: Standing) -> None:
        """A worker wants token blocks for a swapped lease; they come with `give_room`. Raises LeaseLost."""
        model = self.leases.swapped_model(ref, owner)
        self.admission.offer(WaitingKey(owner, ref.lease_id, model, standing, demand, ref))

    def give_room(self, now_s: float, unix_s: float = 0.0) -> RoomGiven:
        """Drops expired credits, adapts the quotas when it is time, then gives out room while there is some: in order,
        to new requests as credits, and to swapped leases as token blocks. ``unix_s`` is the same moment as ``now_s``,
        on the clock of the arrivals.
        """
        self._count_use(now_s)
        self.leases.drop_expired(now_s)
        self._adapt(now_s)
        given = RoomGiven()
        taken = {model: self._num_taken(model) for model in self.models}
        ready = {model for model in self.models if all(self.ready_worker(role, model) for role in Role)}

        def has_slot(key: WaitingKey) -> bool:
            can_begin = key.swapped is not None or key.model in ready
            return can_begin and taken[key.model] < self.models[key.model].max_num_seqs

        def is_within_quota(key: WaitingKey) -> bool:
            needed = blocks_for(key.demand.num_tokens, self.models[key.model].shape.block_size)
            return self.blocks.num_slabs_with(key.model, needed) <= self.quotas[key.model]

        def try_credit(key: WaitingKey, lend: bool) -> bool:
            most = None if lend else self.quotas[key.model] - self.blocks.num_used_slabs(key.model)
            if key.swapped:
                swap_in = self._swap_in(key, key.swapped, most)
                given.swap_ins.extend([swap_in] if swap_in else [])
                fits = swap_in is not None
            else:
                credit = self._credit(key, most, now_s + CREDIT_TTL_S)
                given.credits.extend([credit] if credit else [])
                fits = credit is not None
            taken[key.model] += fits
            return fits

        claims_wait = self.admission.admit(unix_s, has_slot, is_within_quota, try_credit)
        self._reclaim(claims_wait, now_s, unix_s, given.give_way)
        return given

    def next_change_s(self) -> float | None:
        """When `give_room` has something to do though nothing happens, or None."""
        times = (self.leases.next_expiry_s(), self._reclaim_at_s)
        return min((time for time in times if time is not None), default=None)

    def _reclaim(self, claims_wait: bool, now_s: float, unix_s: float, give_way: list[GiveWay]) -> None:
        """What is lent comes back as requests end; if that takes too long, the last in order gives way."""
        if not claims_wait:
            self._reclaim_at_s = None
        elif self._reclaim_at_s is None:
            self._reclaim_at_s = now_s + RECLAIM_AFTER_S
        elif now_s >= self._reclaim_at_s:
            self._reclaim_at_s = now_s + RECLAIM_EVERY_S
            decoding = {worker.name for worker in self.workers.values() if worker.role is Role.DECODE}
            past = [model for model in self.models if self.blocks.num_used_slabs(model) > self.quotas[model]]
            chosen = self.leases.ask_to_give_way(decoding, past, lambda one: self.order.key(one, unix_s))
            give_way.extend([GiveWay(*chosen)] if chosen else [])

    def _with_what_is_cached(self, key: WaitingKey) -> WaitingKey:
        demand, shape = key.demand, self.models[key.model].shape
        num_cached = self.blocks.count_cached(key.model, demand.block_hashes) * shape.block_size
        share = min(num_cached, demand.max_cached_tokens) / (demand.max_cached_tokens + 1)
        return replace(key, standing=key.standing.prefilled(share)) if share else key

    def _credit(self, key: WaitingKey, max_new_slabs: int | None, expires_at_s: float) -> CreditGiven | None:
        block_size = self.models[key.model].shape.block_size
        lease = self.leases.grant_credit(
            key.model, block_size, key.demand, key.standing, key.asker, expires_at_s, max_new_slabs
        )
        if lease is None:
            return None
        prefill, decode = (self.ready_worker(role, key.model) for role in (Role.PREFILL, Role.DECODE))
        assert prefill and decode
        self.num_decisions += 1
        overtaken = self.admission.num_overtaken(key)
        return CreditGiven(key.asker, key.key_id, lease, prefill, decode, self.num_decisions, overtaken, key.standing)

    def _swap_in(self, key: WaitingKey, ref: LeaseRef, max_new_slabs: int | None) -> SwapInGiven | None:
        taken = self.leases.swap_in(ref, key.demand, max_new_slabs)
        return None if taken is None else SwapInGiven(key.asker, key.key_id, taken.block_ids, taken.num_cached)

    def grow(self, ref: LeaseRef, owner: str, num_blocks: int) -> tuple[int, ...] | None:
        """More token blocks for a lease; None if there is no room. Raises LeaseLost.

        While a key within its quota waits, what others give back is not lent anew.
        """
        model = self.leases.model_of(ref, owner)
        spare = max(0, self.quotas[model] - self.blocks.num_used_slabs(model))
        return self.leases.grow(ref, owner, num_blocks, None if self._reclaim_at_s is None else spare)

    def release(self, ref: LeaseRef, owner: str, computed: Sequence[bytes] = ()) -> None:
        """Ends a lease, whether it has token blocks or waits for them. Raises LeaseLost."""
        self.leases.release(ref, owner, computed)
        self.admission.withdraw(owner, ref.lease_id)

    def acquire(self, ref: LeaseRef, worker: str) -> Lease:
        """The prefill worker takes the credit. Raises LeaseLost, WorkerLost."""
        self._attached(worker)
        return self.leases.acquire(ref, worker)

    def move(
        self, ref: LeaseRef, owner: str, to: str, num_computed_tokens: int, sampled: tuple[int, ...], handoff: bytes
    ) -> Lease:
        """The hand-off. Raises LeaseLost; WorkerLost if ``to`` is gone, and then ``owner`` still has the lease."""
        self._attached(to)
        return self.leases.move(ref, owner, to, num_computed_tokens, sampled, handoff)

    def ready_worker(self, role: Role, model: str) -> WorkerRecord | None:
        """The youngest worker of a role that serves ``model`` now."""
        ready = [w for w in self.workers.values() if w.role is role and w.model == model and w.ready]
        return ready[-1] if ready else None

    def leased_bytes(self) -> int:
        """Bytes of the token blocks in use; one that several leases share counts once."""
        return sum(self.blocks.num_in_use(name) * share.shape.token_block_bytes for name, share in self.models.items())

    def cached_bytes(self) -> int:
        """Bytes of the token blocks that nobody has and that hold a prefix."""
        return sum(self.blocks.num_cached(name) * share.shape.token_block_bytes for name, share in self.models.items())

    def fragmented_bytes(self) -> int:
        """Bytes of lent slabs that are no token block in use or cached: what only their own models could take."""
        lent = (self.pool.num_slabs - self.pool.num_free_slabs) * self.slab_bytes
        return lent - self.leased_bytes() - self.cached_bytes()

    def check_integrity(self) -> None:
        """Proves that every token block is in one place; raises AssertionError."""
        self.leases.check_integrity()

    def _guaranteed(self) -> dict[str, int]:
        return {model: share.guaranteed_slabs for model, share in self.models.items()}

    def _count_use(self, now_s: float) -> None:
        """Adds up slabs x seconds since the last call, as if what is in use now had been in use since then."""
        if self._counted_until_s is not None:
            for model in self.models:
                self._slab_seconds[model] += (now_s - self._counted_until_s) * self.blocks.num_used_slabs(model)
        self._counted_until_s = now_s

    def _adapt(self, now_s: float) -> None:
        if self._adapted_at_s is None:
            self._adapted_at_s = now_s
        elapsed_s = now_s - self._adapted_at_s
        if elapsed_s < ADAPT_EVERY_S:
            return
        use = {model: Use(self._slab_seconds[model] / elapsed_s, self.admission.count(model)) for model in self.models}
        self.quotas = adapted(self.quotas, self._guaranteed(), use)
        self._slab_seconds = dict.fromkeys(self.models, 0.0)
        self._adapted_at_s = now_s

    def _num_taken(self, model: str) -> int:
        """Decode slots: a swapped lease has none, and needs one to come back."""
        has_any = self.leases.count(model, credits=True) + self.leases.count(model, credits=False)
        return has_any - self.leases.count_swapped(model)

    def _attached(self, worker: str) -> None:
        if worker not in self.workers:
            raise WorkerLost(f"worker {worker} is not attached")
