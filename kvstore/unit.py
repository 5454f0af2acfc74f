"""The brain of a unit: pool, leases, admission and the workers that are attached. Pure; time is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.admission import Admission, WaitingKey
from kvstore.blocks import BlockTable
from kvstore.leases import LeaseTable
from kvstore.quotas import ADAPT_EVERY_S, Use, adapted, initial_quotas
from kvstore.slab_pool import SlabPool
from muxmesh.config.runtime import Role
from muxmesh.errors import InvalidRequest, WorkerLost
from muxmesh.models.spec import KvShape
from muxmesh.types import Lease, LeaseRef, blocks_for

_ID_BITS = 16
CREDIT_TTL_S = 30.0
"""A credit that no worker acquired for so long is taken back."""


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


def first_id(unix_s: float) -> int:
    """A ``last_id`` for a unit that starts now: above all that an earlier life of it gave out."""
    return int(unix_s * 1000) << _ID_BITS


class Unit:
    """Owns the unit's state. Whoever changes it calls `give_credits` afterwards and sends what that returns."""

    def __init__(self, pool_bytes: int, slab_bytes: int, models: Mapping[str, ModelShare], last_id: int = 0) -> None:
        """Raises ValueError if a slab does not hold one token block of each model.

        ``last_id``: lease ids go on from here, and incarnations from its upper bits; see `first_id`.
        """
        blocks = {name: slab_bytes // share.shape.token_block_bytes for name, share in models.items()}
        self.models = models
        self.slab_bytes = slab_bytes
        self.pool = SlabPool(pool_bytes // slab_bytes, blocks)
        self.blocks = BlockTable(self.pool)
        self.leases = LeaseTable(self.blocks, last_id)
        self.admission = Admission()
        self.quotas = initial_quotas(self.pool.num_slabs, self._guaranteed())
        self._slab_seconds = dict.fromkeys(models, 0.0)
        self._counted_until_s: float | None = None
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
        return self.leases.drop_owner(name, computed)

    def router_gone(self, router: str) -> None:
        """A router's stream broke: its keys and unused credits end. Workers end their own leases."""
        self.admission.drop_router(router)
        self.leases.drop_owner(router)

    def offer(self, key: WaitingKey) -> None:
        """A router shows a key. Raises InvalidRequest if this unit can never serve it."""
        if key.model not in self.models:
            raise InvalidRequest("model", f"{key.model!r} is not of this unit")
        block_size, capacity = self.models[key.model].shape.block_size, self.pool.capacity_blocks(key.model)
        most_tokens = key.demand.most_tokens
        if blocks_for(most_tokens, block_size) > capacity:
            raise InvalidRequest(
                "stopping.max_new_tokens",
                f"prompt and longest answer are {most_tokens} tokens; the KV pool holds {capacity * block_size}",
            )
        self.admission.offer(key)

    def give_credits(self, now_s: float) -> list[CreditGiven]:
        """Drops expired credits, adapts the quotas when it is time, then gives credits while there is room."""
        self._count_use(now_s)
        self.leases.drop_expired(now_s)
        self._adapt(now_s)
        given: list[CreditGiven] = []
        taken = {model: self._num_taken(model) for model in self.models}

        def has_slot(model: str) -> bool:
            ready = all(self.ready_worker(role, model) for role in Role)
            return ready and taken[model] < self.models[model].max_num_seqs

        def is_within_quota(key: WaitingKey) -> bool:
            needed = blocks_for(key.demand.num_tokens, self.models[key.model].shape.block_size)
            return self.blocks.num_slabs_with(key.model, needed) <= self.quotas[key.model]

        def try_credit(key: WaitingKey, lend: bool) -> bool:
            block_size, expires_at_s = self.models[key.model].shape.block_size, now_s + CREDIT_TTL_S
            most = None if lend else self.quotas[key.model] - self.blocks.num_used_slabs(key.model)
            lease = self.leases.grant_credit(key.model, block_size, key.demand, key.router, expires_at_s, most)
            if lease is None:
                return False
            taken[key.model] += 1
            prefill, decode = (self.ready_worker(role, key.model) for role in (Role.PREFILL, Role.DECODE))
            assert prefill and decode
            given.append(CreditGiven(key.router, key.key_id, lease, prefill, decode))
            return True

        self.admission.admit(has_slot, is_within_quota, try_credit)
        return given

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
        return self.leases.count(model, credits=True) + self.leases.count(model, credits=False)

    def _attached(self, worker: str) -> None:
        if worker not in self.workers:
            raise WorkerLost(f"worker {worker} is not attached")
