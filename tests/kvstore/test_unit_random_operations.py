"""A unit under random operations, against the transitions of leases and the contents of blocks."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvstore.admission import AdmissionEntry
from kvstore.leases import TRANSITIONS, LeaseRecord, LeaseState
from kvstore.model_states import AwakeLimits
from kvstore.router_loads import router_loads
from kvstore.sequence_progress import SequenceProgress
from kvstore.unit import CREDIT_TTL_S, AdmissionDecisions, IssuedCredit, Unit
from kvstore.unit_model import UnitModel
from kvstore.victim_choice import MAX_PREEMPTION_REQUESTS
from kvstore.wait_times import EntryKey
from muxmesh.batch_choice import MAX_CLASS_PREEMPTIONS
from muxmesh.block_hashes import block_hashes
from muxmesh.errors import InvalidRequest, LeaseLost, Overloaded, WorkerLost
from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.types import (
    SWAP_PAGE_BYTES,
    KvDemand,
    Lease,
    LeaseRef,
    PreemptionMode,
    QueuedRequest,
    Role,
    SchedulingState,
    blocks_for,
)
from tests.kvstore.small_unit import SHAPES, SLAB_BYTES, attach_ready, queued
from tests.kvstore.unit_drain import UnitDrain

ROOT = b"root"
NUM_SLABS, NUM_SLOTS, NUM_PAUSED = 3, 4, 2


def succeeds(operation: Callable[..., None], *arguments: Any) -> bool:
    operation(*arguments)
    return True


class UnitMachine(RuleBasedStateMachine):
    """A unit under random calls: requests, credits, every operation on leases, exits, late calls, models that change.

    An operation on a lease has to succeed exactly where the table of transitions allows it. ``contents`` records which
    prefix each block holds, so that a block that is shared or overwritten by mistake is found. ``waiting`` and
    ``leases`` are the entries and leases that exist. At the end workers do what they are to, and everything finishes.
    """

    issued = Bundle("issued")
    held = Bundle("held")
    ended = Bundle("ended")

    @initialize(
        max_awake=st.sampled_from([None, None, 1, 2]),
        policy=st.sampled_from(["fcfs", "fcfs", "srtf-aged"]),
        max_wait_s=st.sampled_from([math.inf, 5.0]),
        mode=st.sampled_from(["auto", "auto", "keep", "swap", "recompute"]),
    )
    def start(self, max_awake: int | None, policy: PolicyName, max_wait_s: float, mode: PreemptionMode) -> None:
        self.policy = SchedulingPolicy(policy, 20.0, 1e9, 1.0, max_wait_s)
        models = {
            name: UnitModel(shape, NUM_SLOTS, 512, max_resident_seqs=NUM_SLOTS + NUM_PAUSED)
            for name, shape in SHAPES.items()
        }
        self.unit = Unit(
            NUM_SLABS * SLAB_BYTES,
            SLAB_BYTES,
            models,
            swap_bytes=6 * SWAP_PAGE_BYTES,
            policy=self.policy,
            awake=AwakeLimits(max_awake),
            preemption_mode=mode,
        )
        self.published = set[tuple[str, bytes]]()
        self.unit.blocks.on_published = self.note_published
        self.now_s = 0.0
        self.waiting: dict[EntryKey, str] = {}
        self.leases: set[int] = set()
        self.credit_ends_s: dict[int, float] = {}
        self.num_requested = Counter[int]()
        self.num_displaced = Counter[int]()
        self.last_entry = 0
        self.just_scheduled = False
        self.workers = {model: attach_ready(self.unit, model) for model in SHAPES}
        self.hashes_of_entry: dict[int, tuple[bytes, ...]] = {}
        self.requests: dict[int, QueuedRequest] = {}
        """Lease → the request that it is for."""
        self.requests_of_entry: dict[int, QueuedRequest] = {}
        self.hashes_of_lease: dict[int, tuple[bytes, ...]] = {}
        self.contents: dict[tuple[str, int], bytes | None] = {}

    # What the rules use

    def apply(self, operation: str, lease: Lease, owner: str, call: Callable[[], Any]) -> Any:
        """Calls an operation on a lease; None if it was refused or the unit had no memory for it."""
        self.just_scheduled = False
        record = self.unit.leases._records.get(lease.ref.lease_id)
        before = self.state_of(lease, owner)
        allowed = TRANSITIONS[operation]
        try:
            result = call()
        except WorkerLost:
            assert lease.model == "c", "only `c` is ever removed"
            return None
        except LeaseLost:
            assert before not in allowed, f"{operation} of a lease that is {before} was refused"
            return None
        assert record is not None
        assert before in allowed, f"{operation} of a lease that is {before} was not refused"
        assert before is not None
        assert record.state is (before if result is None and "begin" in operation else allowed[before])
        return result

    def state_of(self, lease: Lease, owner: str) -> LeaseState | None:
        """The state of a lease; None if it has ended, or has another epoch or owner by now."""
        record = self.unit.leases._records.get(lease.ref.lease_id)
        is_current = record is not None and record.lease.ref == lease.ref and record.owner == owner
        return record.state if record is not None and is_current else None

    def current(self, lease_id: int) -> Lease | None:
        record = self.unit.leases._records.get(lease_id)
        return record.lease if record else None

    def check_new_blocks(self, lease: Lease, num_cached: int) -> None:
        """Cached blocks hold the prefix of the request; no other lease has one of the remaining blocks."""
        hashes = self.hashes_of_lease[lease.ref.lease_id]
        cached, private = lease.block_ids[:num_cached], lease.block_ids[num_cached:]
        assert [self.contents[lease.model, block] for block in cached] == list(hashes[:num_cached])
        others = [r.lease for r in self.unit.leases._records.values() if r.lease.ref.lease_id != lease.ref.lease_id]
        in_use = {block for other in others if other.model == lease.model for block in other.block_ids}
        for block in private:
            assert block not in in_use
            self.contents[lease.model, block] = None

    def mark_computed(self, lease: Lease, num_blocks: int) -> None:
        """A worker has computed the first blocks of the lease: they hold its prefix."""
        for block, name in zip(lease.block_ids, self.hashes_of_lease[lease.ref.lease_id][:num_blocks], strict=False):
            assert self.contents[lease.model, block] in {None, name}, "a block that others may read was overwritten"
            self.contents[lease.model, block] = name

    def records(self) -> list[LeaseRecord]:
        return list(self.unit.leases._records.values())

    def worker_exits(self, name: str) -> None:
        """Ends the leases of the worker, and drops its entries."""
        ended = {record.lease.ref.lease_id for record in self.records() if record.owner == name}
        assert self.unit.worker_exited(name) == len(ended)
        self.forget(ended)
        self.waiting = {key: model for key, model in self.waiting.items() if key[0] != name}

    def forget(self, lease_ids: set[int]) -> None:
        self.leases -= lease_ids
        for lease_id in lease_ids:
            self.credit_ends_s.pop(lease_id, None)

    # Routers

    @rule(
        model=st.sampled_from(sorted(SHAPES)),
        num_tokens=st.sampled_from([1, 30, 64, 96]),
        priority=st.integers(-1, 1),
        topic=st.integers(0, 1),
        num_prompt_tokens=st.sampled_from([0, 40, 96]),
        work_s=st.sampled_from([0.0, 1.0, 40.0]),
    )
    def offer(
        self, model: str, num_tokens: int, priority: int, topic: int, num_prompt_tokens: int, work_s: float
    ) -> None:
        """Prompts of one topic have a common prefix."""
        self.just_scheduled = False
        self.last_entry += 1
        num_known = min(num_prompt_tokens, num_tokens)
        hashes = block_hashes([topic] * num_known, SHAPES[model].block_size, ROOT)
        self.hashes_of_entry[self.last_entry] = hashes
        request = queued(self.last_entry, model, num_tokens, priority, self.now_s, hashes, max(0, num_known - 1))
        request = replace(request, scheduling=replace(request.scheduling, decode_s=work_s, mean_work_s=10.0))
        self.requests_of_entry[self.last_entry] = request
        try:
            self.unit.offer("router", request)
            self.waiting["router", self.last_entry] = model
        except InvalidRequest:
            assert model == "c", "only `c` is ever removed"

    @rule(age=st.integers(0, 5))
    def withdraw(self, age: int) -> None:
        self.just_scheduled = False
        self.unit.admission.withdraw("router", self.last_entry - age)
        self.waiting.pop(("router", self.last_entry - age), None)

    @rule()
    def a_router_is_lost(self) -> None:
        self.just_scheduled = False
        self.unit.router_gone("router")
        self.forget(set(self.credit_ends_s))
        self.waiting = {key: model for key, model in self.waiting.items() if key[0] != "router"}

    @rule(target=issued, seconds=st.sampled_from([0.0, 1.0, CREDIT_TTL_S]))
    def schedule(self, seconds: float) -> object:
        self.now_s += seconds
        self.just_scheduled = True
        decisions = self.unit.schedule(self.now_s, self.now_s)
        self.forget({lease_id for lease_id, end_s in self.credit_ends_s.items() if end_s <= self.now_s})
        self.check_order(decisions)
        self.check_displacing(decisions)
        for preemption in decisions.preemptions:
            self.num_requested[preemption.lease_id] += 1
            assert self.num_requested[preemption.lease_id] <= MAX_PREEMPTION_REQUESTS
        assert all(self.unit.states.admits(credit.lease.model) for credit in decisions.credits)
        for credit in decisions.credits:
            lease_id = credit.lease.ref.lease_id
            assert self.waiting.pop(("router", credit.entry_id)) == credit.lease.model
            self.leases.add(lease_id)
            self.credit_ends_s[lease_id] = self.now_s + CREDIT_TTL_S
            self.requests[lease_id] = self.requests_of_entry[credit.entry_id]
            self.hashes_of_lease[lease_id] = self.hashes_of_entry[credit.entry_id]
            num_cached = credit.lease.num_computed_tokens // SHAPES[credit.lease.model].block_size
            self.check_new_blocks(credit.lease, num_cached)
        for swap_in in decisions.swap_ins:
            del self.waiting[swap_in.worker, swap_in.lease_id]
            lease = self.current(swap_in.lease_id)
            assert lease is not None
            assert lease.block_ids == swap_in.block_ids
            self.check_new_blocks(lease, swap_in.num_cached)
        decode_workers = {names[1] for names in self.workers.values()}
        assert all(request.worker in decode_workers for request in decisions.preemptions)
        return multiple(*decisions.credits)

    def check_order(self, decisions: AdmissionDecisions) -> None:
        """A request that is overdue was not overtaken."""
        for entry in self.unit.admission._entries.values():
            state = entry.request.scheduling
            if entry.swapped is None and self.policy.is_overdue(state, self.now_s):
                own = self.policy.sort_key(state, self.now_s)
                for credit in decisions.credits:
                    assert credit.lease.model != entry.model or (
                        self.policy.sort_key(credit.scheduling, self.now_s) <= own
                    ), f"{credit} overtook {entry}"

    def check_displacing(self, decisions: AdmissionDecisions) -> None:
        """A request was admitted to a full batch only if that has a sequence which may be displaced still."""
        if decisions.swap_ins:
            return
        batched, resident = self.unit.leases.count_assigned()
        for credit in decisions.credits:
            name = credit.decode.name
            assert resident[name] <= NUM_SLOTS + NUM_PAUSED
            victims = [
                record
                for record in self.unit.leases.decoding_in(name)
                if self.num_displaced[record.lease.ref.lease_id] < MAX_CLASS_PREEMPTIONS
            ]
            if resident[name] > NUM_SLOTS:
                assert batched[name] - NUM_SLOTS <= min(NUM_SLOTS // 2, len(victims))

    # Leases

    @rule(target=held, credit=consumes(issued))
    def acquire(self, credit: IssuedCredit) -> object:
        prefill = self.workers[credit.lease.model][0]
        lease = self.apply("acquire", credit.lease, "router", lambda: self.unit.acquire(credit.lease.ref, prefill))
        if lease is None:
            return multiple()
        assert lease.block_ids == credit.lease.block_ids
        assert lease.num_computed_tokens <= 95
        del self.credit_ends_s[lease.ref.lease_id]
        return (lease, prefill)

    @rule(target=held, lease_of=consumes(held))
    def move(self, lease_of: tuple[Lease, str]) -> object:
        lease, owner = lease_of
        decode, block_size = self.workers[lease.model][1], SHAPES[lease.model].block_size
        computed = max(lease.num_computed_tokens, len(lease.block_ids) * block_size // 2)
        moved = self.apply("move", lease, owner, lambda: self.unit.move(lease.ref, owner, decode, computed, (1,)))
        if moved is None:
            return multiple() if self.current(lease.ref.lease_id) is None else lease_of
        self.mark_computed(moved, computed // block_size)
        return (moved, decode)

    @rule(lease_of=held, num_blocks=st.integers(1, 6), claims=st.booleans())
    def grow(self, lease_of: tuple[Lease, str], num_blocks: int, claims: bool) -> None:
        lease, owner = lease_of
        grow: Callable[[], Any] = lambda: self.unit.grow(lease.ref, owner, num_blocks, claims, self.now_s)  # noqa: E731
        for block in self.apply("grow", lease, owner, grow) or ():
            self.contents[lease.model, block] = None

    @rule(
        lease_of=held,
        is_batched=st.booleans(),
        decode_s=st.sampled_from([None, 0.5, 30.0]),
        is_protected=st.booleans(),
        num_displaced=st.sampled_from([0, 1, 4]),
    )
    def report(
        self,
        lease_of: tuple[Lease, str],
        is_batched: bool,
        decode_s: float | None,
        is_protected: bool,
        num_displaced: int,
    ) -> None:
        """A decode worker reports a sequence, which was displaced ``num_displaced`` times since the last report."""
        self.just_scheduled = False
        lease_id = lease_of[0].ref.lease_id
        record = self.unit.leases._records.get(lease_id)
        if record is not None and record.owner == record.assignment.decode:
            self.num_displaced[lease_id] += num_displaced
            number = self.num_displaced[lease_id]
            self.unit.report({lease_id: SequenceProgress(is_batched, decode_s, 1.0, is_protected, number)})

    @rule(lease_of=held, operation=st.sampled_from(["pause", "resume"]))
    def pause_or_resume(self, lease_of: tuple[Lease, str], operation: str) -> None:
        lease, owner = lease_of
        self.apply(operation, lease, owner, lambda: succeeds(getattr(self.unit.leases, operation), lease.ref, owner))

    @rule(lease_of=held, num_bytes=st.sampled_from([1, SWAP_PAGE_BYTES, 4 * SWAP_PAGE_BYTES]), by_cost=st.booleans())
    def begin_swap_out(self, lease_of: tuple[Lease, str], num_bytes: int, by_cost: bool) -> None:
        lease, owner = lease_of
        unit = self.unit

        def begin() -> tuple[int, ...] | None:
            if not by_cost or self.state_of(lease, owner) not in TRANSITIONS["begin_swap_out"]:
                return unit.leases.begin_swap_out(lease.ref, owner, num_bytes)
            try:
                return unit.reclaim.begin_swap_out(lease.ref, owner, num_bytes, self.now_s)
            except Overloaded:
                return None

        pages = self.apply("begin_swap_out", lease, owner, begin)
        assert pages is None or len(pages) == blocks_for(num_bytes, SWAP_PAGE_BYTES)

    @rule(lease_of=held, num_published=st.integers(0, 12))
    def finish_swap_out(self, lease_of: tuple[Lease, str], num_published: int) -> None:
        lease, owner = lease_of
        before = self.current(lease.ref.lease_id)
        hashes = self.hashes_of_lease[lease.ref.lease_id][:num_published]
        finish = self.unit.leases.finish_swap_out
        if self.apply("finish_swap_out", lease, owner, lambda: succeeds(finish, lease.ref, owner, hashes)):
            assert before is not None
            self.mark_computed(before, num_published)
            self.num_requested[lease.ref.lease_id] = 0

    @rule(lease_of=held, num_tokens=st.sampled_from([1, 30, 64, 96]))
    def request_swap_in(self, lease_of: tuple[Lease, str], num_tokens: int) -> None:
        self.just_scheduled = False
        lease, owner = lease_of
        hashes = self.hashes_of_lease[lease.ref.lease_id]
        demand = KvDemand(num_tokens, 512, hashes, min(num_tokens, len(hashes) * SHAPES[lease.model].block_size))
        is_allowed = self.state_of(lease, owner) in TRANSITIONS["begin_swap_in"]
        with contextlib.nullcontext() if is_allowed else pytest.raises(LeaseLost):
            self.unit.request_swap_in(lease.ref, owner, demand, SchedulingState(0, self.now_s))
            self.waiting[owner, lease.ref.lease_id] = lease.model

    @rule(lease_of=held)
    def finish_swap_in(self, lease_of: tuple[Lease, str]) -> None:
        lease, owner = lease_of
        finish = self.unit.leases.finish_swap_in
        self.apply("finish_swap_in", lease, owner, lambda: succeeds(finish, lease.ref, owner))

    @rule(target=ended, lease_of=consumes(held), num_published=st.integers(0, 12))
    def release(self, lease_of: tuple[Lease, str], num_published: int) -> object:
        self.just_scheduled = False
        lease, owner = lease_of
        state, before = self.state_of(lease, owner), self.current(lease.ref.lease_id)
        with contextlib.nullcontext() if state else pytest.raises(LeaseLost):
            self.unit.release(lease.ref, owner, self.hashes_of_lease[lease.ref.lease_id][:num_published])
        if state is None:
            return multiple()
        assert before is not None
        self.leases.remove(lease.ref.lease_id)
        self.waiting.pop((owner, lease.ref.lease_id), None)
        if state is not LeaseState.SWAPPING_IN:  # its blocks are not filled
            self.mark_computed(before, num_published)
        return lease_of

    @rule(lease_of=ended)
    def a_late_call_is_refused(self, lease_of: tuple[Lease, str]) -> None:
        lease, owner = lease_of
        with pytest.raises(LeaseLost):
            self.unit.leases.release(lease.ref, owner)
        with pytest.raises((LeaseLost, WorkerLost) if lease.model == "c" else LeaseLost):
            self.unit.acquire(LeaseRef(lease.ref.lease_id, lease.ref.epoch), self.workers[lease.model][0])

    @rule()
    def the_device_fails(self) -> None:
        """Blocks in use keep their contents, but nothing is found in them later, nor in any other block."""
        self.just_scheduled = False
        assert self.unit.device_failed() == len(self.credit_ends_s)
        self.forget(set(self.credit_ends_s))
        for model in self.unit.models:
            assert self.unit.blocks.num_cached(model) == 0
            for hashes in self.hashes_of_entry.values():
                assert self.unit.blocks.count_cached(model, hashes) == 0

    # Workers and models

    @rule(model=st.sampled_from(sorted(SHAPES)), drop_weights=st.booleans())
    def a_model_is_told_to_sleep(self, model: str, drop_weights: bool) -> None:
        self.just_scheduled = False
        if model in self.unit.models:
            self.unit.states.sleep(model, self.now_s, drop_weights)

    @rule(model=st.sampled_from(sorted(SHAPES)))
    def a_model_is_told_to_wake(self, model: str) -> None:
        self.just_scheduled = False
        if model in self.unit.models:
            self.unit.states.wake(model)

    @rule(age=st.integers(0, 1))
    def the_workers_do_what_they_were_told(self, age: int) -> None:
        """``age``: 1 for a report that is too late."""
        self.just_scheduled = False
        for worker in self.unit.workers.values():
            worker.report(worker.num_told - age)

    @rule(model=st.sampled_from(sorted(SHAPES)), index=st.integers(0, 1))
    def a_worker_is_restarted(self, model: str, index: int) -> None:
        self.just_scheduled = False
        names = list(self.workers[model])
        self.worker_exits(names[index])
        try:
            worker = self.unit.attach((Role.PREFILL, Role.DECODE)[index], model, "x", 1)
        except InvalidRequest:
            assert model == "c"
            return
        worker.ready = True
        names[index] = worker.name
        self.workers[model] = (names[0], names[1])

    @rule()
    def a_model_is_removed(self) -> None:
        self.just_scheduled = False
        if "c" in self.unit.models:
            of_model = {key for key, model in self.waiting.items() if key[0] == "router" and model == "c"}
            assert {entry.key for entry in self.unit.remove_model("c")} == of_model, "each is to be refused"
            for key in of_model:
                del self.waiting[key]

    @rule()
    def a_model_is_added(self) -> None:
        self.just_scheduled = False
        if "c" not in self.unit.models:
            self.unit.add_model("c", UnitModel(SHAPES["c"], NUM_SLOTS, 512, max_resident_seqs=NUM_SLOTS + NUM_PAUSED))
            self.contents = {key: content for key, content in self.contents.items() if key[0] != "c"}
            for name in self.workers["c"]:
                self.worker_exits(name)
            self.workers["c"] = attach_ready(self.unit, "c")

    # Invariants

    @invariant()
    def the_state_is_consistent(self) -> None:
        if hasattr(self, "unit"):
            self.unit.check_integrity()

    def note_published(self, model: str, block_hash: bytes, is_held: bool) -> None:
        assert ((model, block_hash) in self.published) is not is_held, "each report is a change"
        self.published ^= {(model, block_hash)}

    @invariant()
    def every_change_of_the_prefix_cache_is_reported(self) -> None:
        if hasattr(self, "unit"):
            held = {(model, block_hash) for model, hashes in self.unit.blocks.published() for block_hash in hashes}
            assert held == self.published

    @invariant()
    def every_sequence_counts_in_the_load_of_one_router(self) -> None:
        if hasattr(self, "unit"):
            loads = router_loads(self.unit)
            total = sum(load.num_sequences for by_router in loads.values() for load in by_router.values())
            num_queued = sum(entry.swapped is None for entry in self.unit.admission.entries())
            assert total == len(self.leases) + num_queued

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "unit"):
            assert self.unit.admission.waiting == self.waiting.keys()
            assert self.unit.leases._records.keys() == self.leases
            assert self.unit.leases._credits.keys() == self.credit_ends_s.keys()

    @invariant()
    def reservations_fit_the_pool_and_the_swap_region(self) -> None:
        """Counted from the leases: a block belongs to a slab, a slab to one model."""
        if not hasattr(self, "unit"):
            return
        slabs: dict[int, str] = {}
        pages = list[int]()
        for record in self.records():
            model = record.lease.model
            blocks_per_slab = SLAB_BYTES // SHAPES[model].token_block_bytes
            for block in record.lease.block_ids:
                assert slabs.setdefault(block // blocks_per_slab, model) == model
            pages += record.swap_pages
        assert slabs.keys() <= set(range(NUM_SLABS))
        assert len(pages) == len(set(pages)) and set(pages) <= set(range(6))
        assert self.unit.leased_bytes() <= NUM_SLABS * SLAB_BYTES

    @invariant()
    def an_entry_within_its_quota_waits_only_for_a_loan(self) -> None:
        """After scheduling, if a slot is free, it waits only while another model is above its quota."""
        if not hasattr(self, "unit") or not self.just_scheduled:
            return
        unit = self.unit
        has_loans = any(unit.blocks.num_used_slabs(model) > unit.quotas.slabs[model] for model in unit.models)
        _, resident = unit.leases.count_assigned()

        def has_slot(worker: str, model: UnitModel) -> bool:
            return resident[worker] < model.max_num_seqs

        for entry in unit.admission._entries.values():
            limits = unit.models[entry.model]
            if not all(unit.ready_workers(role, entry.model) for role in Role):
                continue  # its model sleeps, or wakes
            if entry.swapped is None and not unit.states.admits(entry.model):
                continue
            decode = entry.source if entry.swapped else self.workers[entry.model][1]
            first = self.first_waiting(entry.model)
            if unit.reclaim.follows_a_claim(first.model, first.request.scheduling, self.now_s):
                continue  # a growing sequence waits for memory
            needed = blocks_for(first.request.demand.num_tokens, SHAPES[entry.model].block_size)
            fits = unit.blocks.num_slabs_with(first.model, needed) <= unit.quotas.slabs[first.model]
            if has_slot(decode, limits) and has_slot(self.workers[entry.model][1], limits) and fits:
                assert has_loans, f"{first} waits, though no model is above its quota"

    def first_waiting(self, model: str) -> AdmissionEntry:
        entries = [entry for entry in self.unit.admission._entries.values() if entry.model == model]
        return min(entries, key=lambda entry: self.policy.sort_key(entry.request.scheduling, self.now_s))

    def teardown(self) -> None:
        if not hasattr(self, "unit"):
            return
        UnitDrain(self.unit, self.policy, self.requests_of_entry, self.requests, self.now_s).run()
        self.unit.router_gone("router")
        for names in self.workers.values():
            for name in names:
                self.unit.worker_exited(name)
        self.unit.check_integrity()
        for model in self.unit.models:
            assert self.unit.blocks.num_in_use(model) == 0
            assert self.unit.blocks.num_available(model) == self.unit.pool.capacity_blocks(model)
        assert self.unit.swap.num_free_pages == self.unit.swap.num_pages


UnitMachine.TestCase.settings = settings(stateful_step_count=250)
TestUnitUnderRandomOperations = UnitMachine.TestCase
