"""The state of a unit: pool, leases, admission and attached workers. Pure; time is an argument.

It combines the parts: which worker serves a request, when a model gets more than its quota, when a sequence is
pre-empted. It knows neither sockets nor gRPC nor shared memory: `service` and `attach_server` call it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvstore.admission import Admission, AdmissionEntry
from kvstore.block_table import BlockTable
from kvstore.leases import Assignment, LeaseRecord, LeaseState, LeaseTable, StandingChange
from kvstore.memory_reclaim import MemoryLack, MemoryReclaim, PreemptionRequest
from kvstore.model_states import NO_LIMITS, AwakeLimits, ModelState, ModelStates, ModelUse, WorkerCommand
from kvstore.quotas import Quotas
from kvstore.reaches import Reaches
from kvstore.sequence_progress import SequenceProgress
from kvstore.slab_pool import SlabPool
from kvstore.swap_space import SwapSpace
from kvstore.tenant_order import TenantOrder
from kvstore.tenant_service import Payer, TenantService, TenantUse
from kvstore.unit_model import UnitModel
from kvstore.victim_choice import NO_LEASE
from kvstore.wait_times import EntryKey, WaitTimes
from kvstore.worker_slots import WorkerRecord, WorkerSlots, ready_workers
from muxmesh.errors import InvalidRequest, LeaseLost, WorkerLost
from muxmesh.fairness import Fairness
from muxmesh.quoting import named, quoted
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy, SortKey
from muxmesh.step_cost import COSTS_EVERY_S, context_of
from muxmesh.types import (
    KvDemand,
    Lease,
    LeaseRef,
    PreemptionMode,
    QueuedRequest,
    Role,
    SchedulingState,
    WaitCause,
    Waits,
    blocks_for,
)

_ID_BITS = 16
"""Lease ids start at a multiple of 2**16: see `first_id`."""
CREDIT_TTL_S = 30.0
"""A credit expires if no worker acquires it within this time."""
SLOT_CHECK_EVERY_S = 0.1
"""While a request waits for a slot, what workers report of their sequences is looked at this often."""


@dataclass(frozen=True, slots=True)
class IssuedCredit:
    """A credit for ``router``, and the workers that will serve the request.

    ``decision`` counts the credits of the unit from 1. ``num_overtaken``: see `Admission.num_overtaken`. ``waits``:
    what the request waited for since it was offered.
    """

    router: str
    entry_id: int
    lease: Lease
    prefill: WorkerRecord
    decode: WorkerRecord
    decision: int
    num_overtaken: int
    scheduling: SchedulingState
    waits: Waits


@dataclass(frozen=True, slots=True)
class IssuedSwapIn:
    """Token blocks for a swapped lease of ``worker``. The first ``num_cached`` already hold the KV of its prefix."""

    worker: str
    lease_id: int
    block_ids: tuple[int, ...]
    num_cached: int


@dataclass(frozen=True, slots=True)
class AdmissionDecisions:
    """What `Unit.schedule` decided. The caller sends each part to the router or worker that it names.

    ``standings``: the worker has to order these leases by another standing of their tenant.
    """

    credits: list[IssuedCredit] = field(default_factory=list)
    swap_ins: list[IssuedSwapIn] = field(default_factory=list)
    preemptions: list[PreemptionRequest] = field(default_factory=list)
    commands: list[WorkerCommand] = field(default_factory=list)
    standings: list[StandingChange] = field(default_factory=list)


def first_id(unix_s: float) -> int:
    """A ``last_id`` for a unit that starts at ``unix_s``: above all ids that it issued before a restart.

    It holds as long as the unit issued fewer than 2**16 ids per millisecond.
    """
    return int(unix_s * 1000) << _ID_BITS


class Unit:
    """Owns the unit's state. After each change, the caller calls `schedule` and sends what it returns.

    Invariant: each model of ``models`` has a quota; each lease belongs to one of the models. A model that is being
    removed stays in ``models`` until its last lease has ended.
    """

    def __init__(
        self,
        pool_bytes: int,
        slab_bytes: int,
        models: Mapping[str, UnitModel],
        last_id: int = 0,
        swap_bytes: int = 0,
        policy: SchedulingPolicy = FCFS,
        awake: AwakeLimits = NO_LIMITS,
        now_s: float = 0.0,
        preemption_mode: PreemptionMode = "auto",
        fairness: Fairness | None = None,
    ) -> None:
        """Raises ValueError as `add_model` does. ``now_s``: monotonic time of the start.

        ``last_id``: lease ids continue from here, and incarnations of workers from its upper bits; see `first_id`.
        ``swap_bytes``: size of the swap region; 0: nothing can be swapped. ``preemption_mode``: see `PreemptionMode`.
        ``fairness``: between tenants; None: they are not told apart.
        """
        self.models: dict[str, UnitModel] = {}
        self.slab_bytes = slab_bytes
        self.pool = SlabPool(pool_bytes // slab_bytes)
        self.blocks = BlockTable(self.pool)
        self.swap = SwapSpace(swap_bytes)
        self._fairness = fairness
        self._tenants = TenantService()
        self.leases = LeaseTable(self.blocks, self.swap, last_id, self._tenants)
        self.policy = policy
        self.num_decisions = 0
        self.admission = Admission(policy, self._tenants)
        self._tenant_order = TenantOrder(
            self._tenants,
            self.admission,
            self.leases,
            policy,
            fairness,
            self._num_slots,
            lambda model: self.models[model].max_num_seqs,
        )
        self._reaches = Reaches(self.leases, policy)
        self._waits = WaitTimes()
        self.quotas = Quotas(self.pool.num_slabs)
        self.states = ModelStates(awake)
        self.workers: dict[str, WorkerRecord] = {}
        self._removing: set[str] = set()
        self._slots_due_s: float | None = None
        """While a request waits for a slot: when running sequences may have changed so that it displaces one."""
        self._costs_due_s = 0.0
        self._prefill_token_costs: dict[str, tuple[float, float]] = {}
        """Model → when its prefill cost was read, and the cost of a token."""
        self._incarnations = last_id >> _ID_BITS
        for name, model in sorted(models.items(), key=lambda one: not one[1].is_pinned):  # the first ones are awake
            self.add_model(name, model, now_s)
        self.models = {name: self.models[name] for name in models}
        self.reclaim = MemoryReclaim(
            self.leases, self.blocks, self.swap, self.admission, self.models, policy, preemption_mode
        )

    def add_model(self, name: str, model: UnitModel, now_s: float = 0.0) -> None:
        """Adds a model and resets all quotas to their initial values. It sleeps if no more models may be awake.

        Raises ValueError if the name is taken, the guaranteed slabs of all models exceed the pool, or a slab does not
        hold one token block of the model.
        """
        if name in self.models:
            raise ValueError(
                f"model {quoted(name)} " + ("is still being removed" if name in self._removing else "exists")
            )
        self.blocks.add_model(name, self.slab_bytes // model.shape.token_block_bytes)
        try:
            self.quotas.add_model(name, model.guaranteed_slabs, model.kv_need)
        except ValueError:
            self.blocks.remove_model(name)
            raise
        self.models[name] = model
        self.states.add_model(name, model.is_pinned, model.starts_asleep, now_s)
        if not self.states.admits(name):
            self.quotas.sleep(name)

    def remove_model(self, name: str) -> list[AdmissionEntry]:
        """Stops admitting requests of a model. Its leases continue; after the last one has ended, the model is removed.

        Returns its queued requests, which the caller has to refuse.
        """
        self._removing.add(name)
        refused = self.admission.take_requests(name)
        self._remove_drained_models()
        return refused

    def attach(self, role: Role, model: str, address: str, pid: int) -> WorkerRecord:
        """Adds a worker that is not ready. Raises InvalidRequest for a model that the unit does not serve.

        The worker has to be told what its engine is to be (``told``): one that starts asleep loads nothing.
        """
        self._check_served(model)
        self._incarnations += 1
        engine = self.states.engine_of(model)
        name = f"{role.value}-{model}#{self._incarnations:x}"
        worker = WorkerRecord(name, role, model, address, pid, told=engine, engine=engine)
        self.workers[worker.name] = worker
        return worker

    def worker_exited(self, name: str, computed: Mapping[int, Sequence[bytes]] | None = None) -> int:
        """Removes a worker whose processes have exited, and ends its leases; returns their number.

        ``computed``: lease id → hashes of the blocks that it had computed, which stay in the prefix cache.
        """
        self.workers.pop(name, None)
        self._reaches.drop(name)
        self.admission.drop_source(name)
        return self.leases.drop_owner(name, computed)

    def router_gone(self, router: str) -> None:
        """Drops the queued requests and the unused credits of a router. Leases that workers acquired continue."""
        self.admission.drop_source(router)
        self.leases.drop_owner(router)

    def offer(self, router: str, request: QueuedRequest) -> None:
        """Adds a queued request of a router. Raises InvalidRequest if this unit can never serve it.

        The part of its prompt that is in the prefix cache counts as work that is done. Its tenant's standing is the
        unit's to determine, whatever the router sends.
        """
        self._check_served(request.model)
        block_size = self.models[request.model].shape.block_size
        capacity, max_tokens = self.pool.capacity_blocks(request.model), request.demand.max_tokens
        if blocks_for(max_tokens, block_size) > capacity:
            raise InvalidRequest(
                "stopping.max_new_tokens",
                f"prompt and longest output are {max_tokens} tokens; the KV pool holds {capacity * block_size}",
            )
        request = self._tenant_order.with_standing(self._with_cached_fraction(request))
        self.admission.offer(AdmissionEntry(router, request))

    def request_swap_in(self, ref: LeaseRef, owner: str, demand: KvDemand, scheduling: SchedulingState) -> None:
        """Adds a swapped lease that needs token blocks again; `schedule` issues them. Raises LeaseLost."""
        record = self.leases.owned(ref, owner)
        if record.state is not LeaseState.SWAPPED:
            raise LeaseLost(f"lease {ref.lease_id} is {record.state}, not swapped")
        if scheduling.standing != (standing := record.scheduling.standing):
            scheduling = scheduling.with_standing(standing)
        request = QueuedRequest(ref.lease_id, record.lease.model, scheduling, demand, record.payer.tenant)
        self.admission.offer(AdmissionEntry(owner, request, ref))

    def schedule(self, now_s: float, unix_s: float) -> AdmissionDecisions:
        """Allocates free capacity in scheduling order: credits to queued requests, token blocks to swapped leases.

        First drops expired credits and adapts the quotas if that is due; at the end reclaims loans. ``now_s`` is
        monotonic time; ``unix_s`` is the same moment on the clock of the requests' arrivals.
        """
        decisions = AdmissionDecisions()
        self._pass_time(now_s, decisions)
        self._tenant_order.update(now_s, unix_s)
        batched, resident = self.leases.count_assigned()
        slots = WorkerSlots(
            tuple(self.workers.values()),
            self.models,
            batched,
            resident,
            lambda worker: self._reaches.of(worker, unix_s),
            self.leases.prefilling_for,
        )
        lacks_memory, lacking = self._admit(slots, decisions, now_s, unix_s)
        decisions.preemptions.extend(
            self.reclaim.reclaim_loans(lacks_memory, self._borrowed_leases, now_s, unix_s)
            + self.reclaim.reclaim_followers(lacking, now_s, unix_s)
        )
        self._note_waits(slots, now_s, unix_s)
        decisions.standings.extend(self.leases.take_standing_changes())
        return decisions

    def _pass_time(self, now_s: float, decisions: AdmissionDecisions) -> None:
        """Makes the changes that are due by ``now_s``: of credits, removed models, models' states and quotas."""
        self.quotas.count_use(now_s, self.blocks.num_used_slabs)
        self.leases.drop_expired(now_s)
        self._remove_drained_models()
        self._update_states(now_s, decisions.commands)
        self.quotas.adapt(now_s, self.admission.count)

    def _admit(
        self, slots: WorkerSlots, decisions: AdmissionDecisions, now_s: float, unix_s: float
    ) -> tuple[bool, list[MemoryLack]]:
        """Admits waiting entries as far as there are slots and memory.

        Returns whether an entry within its model's quota lacks memory, and the first of each model that does.
        """
        lacking: dict[str, MemoryLack] = {}

        def has_slot(entry: AdmissionEntry) -> bool:
            state, lease_id = entry.request.scheduling, entry.swapped.lease_id if entry.swapped else NO_LEASE
            if not self._admits(entry) or self.reclaim.follows_a_claim(entry.model, state, unix_s, lease_id):
                return False
            return slots.has_slot(entry.model, state, entry.worker) or (
                entry.swapped is not None and self._is_due_soon(entry, slots, unix_s)
            )

        def ends(entry: AdmissionEntry, key: SortKey) -> bool:
            if entry.swapped is not None:
                return False
            return not self._admits(entry) or slots.ends_before(entry.model, key)

        def is_within_quota(entry: AdmissionEntry) -> bool:
            return self.blocks.num_slabs_with(entry.model, self._num_blocks(entry)) <= self.quotas.slabs[entry.model]

        def try_admit(entry: AdmissionEntry, lend: bool) -> bool:
            max_new_slabs = None if lend else self._num_spare_slabs(entry.model)
            if self._try_admit(entry, max_new_slabs, slots, decisions, now_s):
                return True
            if entry.model not in lacking:  # the first in order that lacks memory is the first that is tried
                num_blocks, num_waiting = self._num_blocks(entry), self.admission.count(entry.model)
                lacking[entry.model] = MemoryLack(entry.model, entry.request.scheduling, num_blocks, num_waiting)
            return False

        lacks_memory = self.admission.admit(unix_s, has_slot, is_within_quota, try_admit, ends)
        return lacks_memory, list(lacking.values())

    def _try_admit(
        self,
        entry: AdmissionEntry,
        max_new_slabs: int | None,
        slots: WorkerSlots,
        decisions: AdmissionDecisions,
        now_s: float,
    ) -> bool:
        """Reserves token blocks and a slot for an entry that has one; False if the pool has too few blocks."""
        if entry.swapped is not None:
            swap_in = self._begin_swap_in(entry, entry.swapped, max_new_slabs)
            if swap_in is None:
                return False
            decisions.swap_ins.append(swap_in)
            slots.take(entry.source)
            return True
        prefill, decode = slots.choose(entry.model, entry.request.scheduling)
        credit = self._issue_credit(entry, prefill, decode, max_new_slabs, now_s)
        if credit is None:
            return False
        decisions.credits.append(credit)
        slots.take(prefill.name, decode.name)
        return True

    def _note_waits(self, slots: WorkerSlots, now_s: float, unix_s: float) -> None:
        """Notes what waiting entries wait for from now on, and when to look again at sequences for a slot."""
        causes = self._first_causes(unix_s, slots)
        if WaitCause.SLOT not in causes.values():
            self._slots_due_s = None
        elif self._slots_due_s is None or now_s >= self._slots_due_s:
            self._slots_due_s = now_s + SLOT_CHECK_EVERY_S
        self._waits.update(self.admission.waiting, causes, now_s)

    def _update_states(self, now_s: float, commands: list[WorkerCommand]) -> None:
        """Lets models fall asleep, which returns cached KV and quota once no lease is left, and wake."""
        leases, requests = self.leases.count_by_model(), self.admission.count_requests()
        use = {name: ModelUse(leases.get(name, 0), requests.get(name, 0)) for name in {**leases, **requests}}
        changes = self.states.update(now_s, use, self.workers.values())
        for model in changes.returned:
            self.blocks.drop_prefixes_of(model)
            self.quotas.sleep(model)
        for model in changes.claiming:
            self.quotas.wake(model)
        commands.extend(changes.commands)

    def _num_blocks(self, entry: AdmissionEntry) -> int:
        """Token blocks that are reserved when it is admitted."""
        return blocks_for(entry.request.demand.num_tokens, self.models[entry.model].shape.block_size)

    def _is_due_soon(self, entry: AdmissionEntry, slots: WorkerSlots, unix_s: float) -> bool:
        """Whether a swapped lease gets a slot so soon that its KV is copied back now."""
        has_room = slots.has_room(entry.source, entry.model)
        return has_room and self.reclaim.is_due_soon(entry, SLOT_CHECK_EVERY_S, unix_s)

    def _admits(self, entry: AdmissionEntry) -> bool:
        """Whether its model may continue it: one that falls asleep finishes its leases, swapped ones too."""
        return entry.swapped is not None or self.states.admits(entry.model)

    def _first_causes(self, unix_s: float, slots: WorkerSlots) -> dict[EntryKey, WaitCause]:
        """What the first waiting entry of each model waits for."""
        causes = {}
        for entry in self.admission.first_entries(unix_s):
            if not self._admits(entry):
                causes[entry.key] = WaitCause.WORKER
            elif slots.has_slot(entry.model, entry.request.scheduling, entry.worker):
                causes[entry.key] = WaitCause.KV
            else:
                causes[entry.key] = WaitCause.SLOT if slots.has_workers(entry.model) else WaitCause.WORKER
        return causes

    def report(self, progress: Mapping[int, SequenceProgress]) -> None:
        """What decode workers report of their sequences, by lease id. To be called before `schedule`."""
        for lease_id, one in progress.items():
            self.leases.report(lease_id, one)

    def next_change_s(self) -> float | None:
        """Monotonic time at which `schedule` has to be called even if nothing changes; None: at no time."""
        times = (
            self.leases.next_expiry_s(),
            *self.reclaim.next_change_s(),
            self._slots_due_s,
            self.states.next_change_s(),
        )
        return min((time for time in times if time is not None), default=None)

    def costs_are_due(self, now_s: float) -> bool:
        """Whether the caller has to send step costs to routers: true at most once every `COSTS_EVERY_S`."""
        if now_s < self._costs_due_s:
            return False
        self._costs_due_s = now_s + COSTS_EVERY_S
        return True

    def acquire(self, ref: LeaseRef, worker: str) -> Lease:
        """Makes a credit the lease of a prefill worker. Raises LeaseLost; WorkerLost if it is not attached."""
        self._check_attached(worker)
        return self.leases.acquire(ref, worker)

    def move(self, ref: LeaseRef, owner: str, to: str, num_computed_tokens: int, sampled: tuple[int, ...]) -> Lease:
        """The hand-off. Raises LeaseLost; WorkerLost if ``to`` is not attached: then ``owner`` keeps the lease."""
        self._check_attached(to)
        return self.leases.move(ref, owner, to, num_computed_tokens, sampled)

    def grow(
        self, ref: LeaseRef, owner: str, num_blocks: int, claims: bool = False, unix_s: float = 0.0
    ) -> tuple[int, ...] | None:
        """Adds token blocks to a lease and returns them; None if it may have no more now. Raises LeaseLost.

        After None the caller calls `schedule`, which pre-empts a sequence that the lease precedes; with ``claims`` one
        of a batch too. Then `MemoryReclaim.serves` tells whether one frees its blocks for it.

        While an entry within its model's quota waits for memory, leases do not grow past the quota of their own model.
        """
        record = self.leases.owned(ref, owner)
        model = record.lease.model
        num_spare = self._num_spare_slabs(model)
        max_new_slabs = max(0, num_spare) if self.reclaim.is_claimed else None
        block_ids = None
        if not self.reclaim.follows_a_claim(model, record.scheduling, unix_s, ref.lease_id):
            block_ids = self.leases.grow(ref, owner, num_blocks, max_new_slabs)
        if block_ids is not None or (self.reclaim.is_claimed and num_spare < 0):
            self.reclaim.claim_ends(ref)
        else:
            lack = MemoryLack(model, record.scheduling, num_blocks, lease_id=ref.lease_id, claims_batched=claims)
            self.reclaim.growth_failed(lack, unix_s)
        return block_ids

    def release(self, ref: LeaseRef, owner: str, computed: Sequence[bytes] = (), served_s: float = 0.0) -> None:
        """Ends a lease in any state. Raises LeaseLost. ``computed``, ``served_s``: see `LeaseTable.release`."""
        self.leases.release(ref, owner, computed, served_s)
        self.admission.withdraw(owner, ref.lease_id)

    def device_failed(self) -> int:
        """Lets no request use KV that was computed before now; returns the number of credits that ended for that.

        Empties the prefix cache. The leases of workers end with their workers, all of which the caller ends.
        """
        num_ended = self.leases.device_failed()
        self.blocks.drop_prefixes()
        return num_ended

    def ready_workers(self, role: Role, model: str) -> list[WorkerRecord]:
        """The ready workers of a role and model, the youngest first."""
        return ready_workers(self.workers.values(), role, model)

    def tenant_use(self) -> Mapping[str, TenantUse]:
        """What each tenant with queued requests or leases uses."""
        return self._tenants.use(self._fairness.band_s if self._fairness else math.inf)

    def leased_bytes(self) -> int:
        """Bytes of the token blocks in use; a block that several leases share counts once."""
        return sum(self.blocks.num_in_use(name) * model.shape.token_block_bytes for name, model in self.models.items())

    def cached_bytes(self) -> int:
        return sum(self.blocks.num_cached(name) * model.shape.token_block_bytes for name, model in self.models.items())

    def check_integrity(self) -> None:
        """Proves the invariants of the unit and of its parts. Raises AssertionError."""
        self.leases.check_integrity()
        self._tenants.check_integrity()
        assert self.models.keys() == self.quotas.slabs.keys() >= self._removing, "models and quotas differ"
        self.quotas.check_integrity()
        self.states.check_integrity()
        assert self.models.keys() == self.states.models.keys(), "models and their states differ"
        for name, record in self.states.models.items():
            if record.state is ModelState.ASLEEP:
                assert not self.blocks.num_cached(name), f"{name} sleeps, but has cached blocks"
                assert not self.blocks.num_in_use(name), f"{name} sleeps, but has blocks in use"

    def serves(self, model: str) -> bool:
        """Whether requests of a model are admitted, at once or when it wakes."""
        return model in self._served()

    def _served(self) -> set[str]:
        return self.models.keys() - self._removing

    def _check_served(self, model: str) -> None:
        if model not in (served := self._served()):
            raise InvalidRequest(
                "model", f"{quoted(model)} is not served by this unit; it serves: {', '.join(sorted(served))}"
            )

    def _remove_drained_models(self) -> None:
        for name in [name for name in self._removing if not self.leases.count_states(name)]:
            self._removing.discard(name)
            for worker in self.workers.values():
                worker.is_retired |= worker.model == name
            self.blocks.remove_model(name)
            self.quotas.remove_model(name)
            self.states.remove_model(name)
            del self.models[name]

    def _with_cached_fraction(self, request: QueuedRequest) -> QueuedRequest:
        demand, shape = request.demand, self.models[request.model].shape
        num_cached = self.blocks.count_cached(request.model, demand.block_hashes) * shape.block_size
        fraction = min(num_cached, demand.max_cached_tokens) / (demand.max_cached_tokens + 1)
        return replace(request, scheduling=request.scheduling.with_cached_fraction(fraction)) if fraction else request

    def _prefill_token_s(self, model: str, now_s: float) -> float:
        """Seconds of the device that a token of a prompt takes in a full step of ``model``; 0 without fairness."""
        if self._fairness is None:
            return 0.0
        known = self._prefill_token_costs.get(model)
        if known is None or now_s >= known[0] + COSTS_EVERY_S:
            costs, num_tokens = self.reclaim.costs_of(model).prefill, self.models[model].prefill_token_budget
            token_s = costs.step_s(num_tokens, context_of(0, num_tokens)) / num_tokens
            known = self._prefill_token_costs[model] = (now_s, token_s)
        return known[1]

    def _num_slots(self) -> dict[str, int]:
        """Model → slots of the batches of its ready decode workers."""
        return {
            name: model.max_num_seqs * len(self.ready_workers(Role.DECODE, name)) for name, model in self.models.items()
        }

    def _issue_credit(
        self,
        entry: AdmissionEntry,
        prefill: WorkerRecord,
        decode: WorkerRecord,
        max_new_slabs: int | None,
        now_s: float,
    ) -> IssuedCredit | None:
        request = entry.request
        lease = self.leases.issue_credit(
            request.model,
            self.models[request.model].shape.block_size,
            request.demand,
            request.scheduling,
            entry.source,
            Assignment(prefill.name, decode.name),
            now_s + CREDIT_TTL_S,
            max_new_slabs,
            Payer(request.tenant, request.model, request.tenant_weight, 1 / self.models[request.model].max_num_seqs),
            self._prefill_token_s(request.model, now_s),
        )
        if lease is None:
            return None
        self.num_decisions += 1
        return IssuedCredit(
            entry.source,
            request.entry_id,
            lease,
            prefill,
            decode,
            self.num_decisions,
            self.admission.num_overtaken(entry),
            request.scheduling,
            self._waits.of(entry.key, now_s),
        )

    def _begin_swap_in(self, entry: AdmissionEntry, ref: LeaseRef, max_new_slabs: int | None) -> IssuedSwapIn | None:
        allocated = self.leases.begin_swap_in(ref, entry.request.demand, max_new_slabs)
        if allocated is None:
            return None
        return IssuedSwapIn(entry.source, ref.lease_id, allocated.block_ids, allocated.num_cached)

    def _borrowed_leases(self) -> list[LeaseRecord]:
        """The leases of decode workers of models that use more than their quota."""
        past_quota = [model for model in self.models if self._num_spare_slabs(model) < 0]
        decoding = {worker.name for worker in self.workers.values() if worker.role is Role.DECODE}
        return [record for record in self.leases.of_models(past_quota) if record.owner in decoding]

    def _num_spare_slabs(self, model: str) -> int:
        """Slabs of the model's quota that it does not use; negative if it has borrowed some."""
        return self.quotas.slabs[model] - self.blocks.num_used_slabs(model)

    def _check_attached(self, worker: str) -> None:
        if worker not in self.workers:
            raise WorkerLost(f"worker {named(worker)} is not attached")
