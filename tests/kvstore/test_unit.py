"""The state of a unit, example by example and under random operations."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvstore.leases import TRANSITIONS, LeaseState
from kvstore.unit import (
    CREDIT_TTL_S,
    RECLAIM_AFTER_S,
    RECLAIM_EVERY_S,
    AdmissionDecisions,
    IssuedCredit,
    PreemptionRequest,
    Unit,
    UnitModel,
)
from muxmesh.block_hashes import block_hashes
from muxmesh.errors import InvalidRequest, LeaseLost, WorkerLost
from muxmesh.models.model_spec import KvShape
from muxmesh.scheduling_policy import FCFS
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, LeaseRef, QueuedRequest, Role, SchedulingState

SHAPES = {
    "a": KvShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=8, dtype_bytes=4),
    "b": KvShape(num_layers=3, num_kv_heads=2, head_dim=32, block_size=16, dtype_bytes=4),
    "c": KvShape(num_layers=1, num_kv_heads=4, head_dim=64, block_size=16, dtype_bytes=4),
}
SLAB_BYTES = 64 * 1024
ROOT = b"root"


def make_unit(num_slabs: int = 4, max_num_seqs: int = 3, swap_bytes: int = 0) -> Unit:
    return Unit(
        num_slabs * SLAB_BYTES,
        SLAB_BYTES,
        {name: UnitModel(shape, max_num_seqs, 512) for name, shape in SHAPES.items()},
        swap_bytes=swap_bytes,
    )


def ready_workers(unit: Unit, model: str) -> tuple[str, str]:
    names = []
    for role in (Role.PREFILL, Role.DECODE):
        worker = unit.attach(role, model, f"unix:{role}", 1)
        worker.ready = True
        names.append(worker.name)
    return names[0], names[1]


def queued(entry_id: int, model: str = "a", num_tokens: int = 8, priority: int = 0, arrived: float = 0.0,
    hashes: tuple[bytes, ...] = (), max_cached: int = 0,
) -> QueuedRequest:  # fmt: skip
    demand = KvDemand(num_tokens, num_tokens, hashes, max_cached)
    return QueuedRequest(entry_id, model, SchedulingState(priority, arrived), demand)


def succeeds(operation: Callable[..., None], *arguments: Any) -> Any:
    operation(*arguments)
    return True


def schedule(unit: Unit, now_s: float = 0.0) -> AdmissionDecisions:
    return unit.schedule(now_s, now_s)


def test_no_credit_before_both_workers_are_ready() -> None:
    unit = make_unit()
    unit.offer("router", queued(1))
    unit.attach(Role.PREFILL, "a", "x", 1).ready = True
    assert schedule(unit, 0.0).credits == []
    unit.attach(Role.DECODE, "a", "x", 2).ready = True
    assert [given.entry_id for given in schedule(unit, 0.0).credits] == [1]


def test_credits_go_by_priority_then_arrival() -> None:
    unit = make_unit(max_num_seqs=2)
    ready_workers(unit, "a")
    for entry_id, priority, arrived in ((1, 0, 5.0), (2, 0, 3.0), (3, -1, 9.0), (4, 1, 0.0)):
        unit.offer("router", queued(entry_id, priority=priority, arrived=arrived))
    assert [given.entry_id for given in schedule(unit, 0.0).credits] == [3, 2]


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    unit = make_unit(num_slabs=1)
    ready_workers(unit, "a")
    capacity = unit.pool.capacity_blocks("a") * 8
    unit.offer("router", queued(1, num_tokens=8, arrived=0.0))
    (small,) = schedule(unit, 0.0).credits
    unit.offer("router", queued(2, num_tokens=capacity, arrived=1.0))
    unit.offer("router", queued(3, num_tokens=8, arrived=2.0))
    assert schedule(unit, 0.0).credits == []
    unit.leases.release(small.lease.ref, "router")
    assert [given.entry_id for given in schedule(unit, 0.0).credits] == [2]


def test_a_model_without_slots_does_not_hold_up_another() -> None:
    unit = make_unit(max_num_seqs=1)
    ready_workers(unit, "a")
    ready_workers(unit, "b")
    for entry_id, model in ((1, "a"), (2, "a"), (3, "b")):
        unit.offer("router", queued(entry_id, model, num_tokens=16, arrived=entry_id))
    assert [given.entry_id for given in schedule(unit, 0.0).credits] == [1, 3]


def test_a_request_that_never_fits_is_refused_by_field() -> None:
    unit = make_unit(num_slabs=1)
    with pytest.raises(InvalidRequest, match=r"stopping\.max_new_tokens: .* the KV pool holds"):
        unit.offer("router", queued(1, num_tokens=10**6))


def test_an_unused_credit_expires() -> None:
    unit = make_unit()
    ready_workers(unit, "a")
    unit.offer("router", queued(1))
    (given,) = schedule(unit, 0.0).credits
    assert unit.leases.next_expiry_s() == CREDIT_TTL_S
    schedule(unit, CREDIT_TTL_S)
    assert len(unit.leases) == 0
    with pytest.raises(LeaseLost, match="does not exist"):
        unit.acquire(given.lease.ref, given.prefill.name)


def test_the_hand_off_keeps_blocks_and_raises_the_epoch() -> None:
    unit = make_unit()
    prefill, decode = ready_workers(unit, "a")
    unit.offer("router", queued(1, num_tokens=30))
    (given,) = schedule(unit, 0.0).credits
    held = unit.acquire(given.lease.ref, prefill)
    moved = unit.move(held.ref, prefill, decode, 22, (7,))
    assert moved.block_ids == held.block_ids == given.lease.block_ids
    assert moved.ref.epoch == held.ref.epoch + 1 == given.lease.ref.epoch + 2
    assert (moved.num_computed_tokens, moved.sampled_token_ids) == (22, (7,))
    with pytest.raises(LeaseLost, match="epoch"):
        unit.leases.release(held.ref, prefill)
    unit.leases.release(moved.ref, decode)
    assert len(unit.leases) == 0


def test_a_hand_off_to_a_lost_worker_leaves_the_lease_where_it_is() -> None:
    unit = make_unit()
    prefill, decode = ready_workers(unit, "a")
    unit.offer("router", queued(1))
    held = unit.acquire(schedule(unit, 0.0).credits[0].lease.ref, prefill)
    unit.worker_exited(decode)
    with pytest.raises(WorkerLost, match="not attached"):
        unit.move(held.ref, prefill, decode, 8, (1,))
    unit.leases.release(held.ref, prefill)


def test_a_router_that_is_gone_loses_its_queued_requests_and_credits_only() -> None:
    unit = make_unit(max_num_seqs=2)
    prefill, _ = ready_workers(unit, "a")
    for entry_id in (1, 2, 3):
        unit.offer("router", queued(entry_id))
    first, _ = schedule(unit, 0.0).credits
    unit.acquire(first.lease.ref, prefill)
    unit.router_gone("router")
    assert unit.admission.count("a") == 0
    assert unit.leases.count_by_owner() == {prefill: 1}


def test_a_computed_prefix_is_found_by_the_next_request() -> None:
    unit = make_unit()
    prefill, decode = ready_workers(unit, "a")
    hashes = block_hashes(range(30), 8, ROOT)
    unit.offer("router", queued(1, num_tokens=40, hashes=hashes, max_cached=29))
    held = unit.acquire(schedule(unit, 0.0).credits[0].lease.ref, prefill)
    assert held.num_computed_tokens == 0
    unit.offer("router", queued(2, num_tokens=40, hashes=hashes, max_cached=29))
    (early,) = schedule(unit, 0.0).credits
    assert early.lease.num_computed_tokens == 0, "nothing is computed yet"
    unit.move(held.ref, prefill, decode, 30, (5,))
    unit.offer("router", queued(3, num_tokens=40, hashes=hashes, max_cached=29))
    (late,) = schedule(unit, 0.0).credits
    assert late.lease.num_computed_tokens == 24
    assert late.lease.block_ids[:3] == held.block_ids[:3]
    assert not set(late.lease.block_ids[3:]) & {*held.block_ids, *early.lease.block_ids}
    assert unit.blocks.num_in_use("a") == 5 + 5 + 2


def test_a_model_within_its_quota_goes_before_one_above_it() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=100)
    unit.quotas |= {"a": 2, "b": 2, "c": 0}
    for model in SHAPES:
        ready_workers(unit, model)
    slab_of_a, slab_of_b = (unit.pool.blocks_per_slab(model) * SHAPES[model].block_size for model in "ab")
    for entry_id in range(1, 5):
        unit.offer("router", queued(entry_id, "a", slab_of_a, arrived=entry_id))
    loans = schedule(unit, 0.0).credits
    assert [given.entry_id for given in loans] == [1, 2, 3, 4], "nobody else wants the other half: it is lent"
    unit.offer("router", queued(5, "a", slab_of_a, priority=-1, arrived=5))
    unit.offer("router", queued(6, "b", 2 * slab_of_b, arrived=6))
    for returned in loans[:2]:
        unit.leases.release(returned.lease.ref, "router")
        given = schedule(unit, 1.0).credits
        assert [given.entry_id for given in given] == ([] if returned is loans[0] else [6])
    unit.leases.release(loans[2].lease.ref, "router")
    assert [given.entry_id for given in schedule(unit, 2.0).credits] == [5]


def test_quotas_follow_the_load() -> None:
    unit = make_unit(num_slabs=12, max_num_seqs=100)
    assert unit.quotas == {"a": 4, "b": 4, "c": 4}
    prefill, _ = ready_workers(unit, "a")
    slab_of_a = unit.pool.blocks_per_slab("a") * SHAPES["a"].block_size
    for entry_id in range(1, 14):
        unit.offer("router", queued(entry_id, "a", slab_of_a))
    for seconds in range(0, 60, 2):
        for given in schedule(unit, float(seconds)).credits:
            unit.acquire(given.lease.ref, prefill)
        assert sum(unit.quotas.values()) == 12
    assert unit.quotas["a"] > 8
    assert min(unit.quotas.values()) >= 0


def test_what_a_killed_worker_had_computed_is_found_again() -> None:
    unit = make_unit()
    prefill, decode = ready_workers(unit, "a")
    whole = block_hashes(range(60), 8, ROOT)
    unit.offer("router", queued(1, num_tokens=70, hashes=whole[:2], max_cached=16))
    held = unit.acquire(schedule(unit, 0.0).credits[0].lease.ref, prefill)
    moved = unit.move(held.ref, prefill, decode, 17, (5,))
    computed = {moved.ref.lease_id: whole[:6], 12345: whole}
    assert unit.worker_exited(prefill, computed) == 0, "only its own leases are looked at"
    assert unit.worker_exited(decode, computed) == 1
    unit.check_integrity()
    ready_workers(unit, "a")
    unit.offer("router", queued(2, num_tokens=70, hashes=whole, max_cached=59))
    (again,) = schedule(unit, 1.0).credits
    assert again.lease.num_computed_tokens == 48
    assert again.lease.block_ids[:6] == moved.block_ids[:6]


def decoding(unit: Unit, entry_id: int, num_tokens: int, model: str = "a", arrived: float = 0.0) -> tuple[Lease, str]:
    """A lease that its decode worker has, and the worker."""
    prefill, decode = (unit.ready_workers(role, model)[0] for role in Role)
    unit.offer("router", queued(entry_id, model, num_tokens=num_tokens, arrived=arrived))
    (given,) = schedule(unit, 0.0).credits
    held = unit.acquire(given.lease.ref, prefill.name)
    return unit.move(held.ref, prefill.name, decode.name, num_tokens - 1, (1,)), decode.name


def test_a_swapped_lease_has_pages_instead_of_token_blocks_and_comes_back_in_order() -> None:
    unit = make_unit(num_slabs=1, swap_bytes=4 * SWAP_PAGE_BYTES)
    ready_workers(unit, "a")
    capacity = unit.pool.capacity_blocks("a") * 8
    lease, worker = decoding(unit, 1, capacity)
    assert unit.leases.begin_swap_out(lease.ref, worker, 5 * SWAP_PAGE_BYTES) is None
    assert unit.leases.begin_swap_out(lease.ref, worker, 3 * SWAP_PAGE_BYTES) == (0, 1, 2)
    unit.check_integrity()
    unit.leases.finish_swap_out(lease.ref, worker)
    assert (unit.blocks.num_in_use("a"), unit.swap.num_free_pages) == (0, 1)
    unit.offer("router", queued(2, num_tokens=8, arrived=9.0))
    unit.request_swap_in(lease.ref, worker, KvDemand(capacity, capacity), SchedulingState(0, 0.0))
    given = schedule(unit, 1.0)
    assert ([swap.lease_id for swap in given.swap_ins], given.credits) == ([lease.ref.lease_id], [])
    assert len(given.swap_ins[0].block_ids) * 8 == capacity
    unit.check_integrity()
    unit.leases.finish_swap_in(lease.ref, worker)
    assert unit.swap.num_free_pages == 4
    unit.release(lease.ref, worker)
    assert len(schedule(unit, 2.0).credits) == 1


def test_what_is_still_cached_need_not_be_copied_back() -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    ready_workers(unit, "a")
    lease, worker = decoding(unit, 1, 40)
    hashes = block_hashes(range(39), 8, ROOT)
    unit.leases.begin_swap_out(lease.ref, worker, SWAP_PAGE_BYTES)
    unit.leases.finish_swap_out(lease.ref, worker, hashes)
    unit.request_swap_in(lease.ref, worker, KvDemand(48, 64, hashes, 39), SchedulingState(0, 0.0))
    (swap_in,) = schedule(unit, 1.0).swap_ins
    assert (swap_in.block_ids[:4], swap_in.num_cached, len(swap_in.block_ids)) == (lease.block_ids[:4], 4, 6)


@pytest.mark.parametrize("when", ["copied out", "swapped", "waiting", "copied in"])
def test_a_swapped_lease_that_ends_leaves_nothing(when: str) -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    ready_workers(unit, "a")
    lease, worker = decoding(unit, 1, 40)
    unit.leases.begin_swap_out(lease.ref, worker, SWAP_PAGE_BYTES)
    if when != "copied out":
        unit.leases.finish_swap_out(lease.ref, worker)
    if when in {"waiting", "copied in"}:
        unit.request_swap_in(lease.ref, worker, KvDemand(48, 64), SchedulingState(0, 0.0))
    if when == "copied in":
        assert schedule(unit, 1.0).swap_ins
    unit.release(lease.ref, worker)
    unit.check_integrity()
    assert schedule(unit, 2.0).swap_ins == []
    assert (unit.blocks.num_in_use("a"), unit.swap.num_free_pages, len(unit.leases)) == (0, 4, 0)
    for late in (unit.leases.finish_swap_out, unit.leases.finish_swap_in):
        with pytest.raises(LeaseLost):
            late(lease.ref, worker)


def test_a_dead_workers_swapped_leases_wait_no_longer() -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    ready_workers(unit, "a")
    lease, worker = decoding(unit, 1, 40)
    unit.leases.begin_swap_out(lease.ref, worker, SWAP_PAGE_BYTES)
    unit.leases.finish_swap_out(lease.ref, worker)
    unit.request_swap_in(lease.ref, worker, KvDemand(48, 64), SchedulingState(0, 0.0))
    assert unit.worker_exited(worker) == 1
    assert schedule(unit, 1.0) == AdmissionDecisions()
    assert unit.swap.num_free_pages == 4


def test_a_loan_that_does_not_end_gives_way_to_a_claim_the_last_in_order_first() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=10, swap_bytes=4 * SWAP_PAGE_BYTES)
    unit.quotas |= {"a": 2, "b": 2, "c": 0}
    for model in "ab":
        ready_workers(unit, model)
    slab = {model: unit.pool.blocks_per_slab(model) * SHAPES[model].block_size for model in "ab"}
    loans = [decoding(unit, entry_id, slab["a"], arrived=entry_id) for entry_id in (1, 2, 3, 4)]
    unit.offer("router", queued(9, "b", num_tokens=2 * slab["b"], arrived=9.0))
    assert schedule(unit, 5.0) == AdmissionDecisions()
    assert unit.next_change_s() == 5.0 + RECLAIM_AFTER_S
    now_s = 5.0 + RECLAIM_AFTER_S
    for lease, worker in (loans[3], loans[2]):
        asked = [PreemptionRequest(worker, lease.ref.lease_id)]
        assert schedule(unit, now_s).preemptions == asked
        assert schedule(unit, now_s).preemptions == [], "not at once again"
        now_s += RECLAIM_EVERY_S
        assert schedule(unit, now_s).preemptions == asked, "the same until it has"
        unit.leases.begin_swap_out(lease.ref, worker, SWAP_PAGE_BYTES)
        unit.leases.finish_swap_out(lease.ref, worker)
        unit.request_swap_in(lease.ref, worker, KvDemand(slab["a"], slab["a"]), SchedulingState(0, 0.0))
        now_s += RECLAIM_EVERY_S
    given = schedule(unit, now_s)
    assert ([credit.entry_id for credit in given.credits], given.swap_ins, given.preemptions) == ([9], [], [])
    assert unit.next_change_s() == now_s + CREDIT_TTL_S


def test_the_youngest_of_idle_workers_is_chosen_and_then_the_least_loaded() -> None:
    unit = make_unit(max_num_seqs=2)
    ready_workers(unit, "a")
    ready_workers(unit, "a")
    for entry_id in range(1, 6):
        unit.offer("router", queued(entry_id, arrived=entry_id))
    issued = schedule(unit).credits
    assert len(issued) == 4, "each replica takes its own batch"
    decodes = [given.decode.name for given in issued]
    assert decodes[0] != decodes[1] and sorted(decodes[:2]) == sorted(decodes[2:])
    unit.worker_exited(decodes[0])
    unit.router_gone("router")
    unit.offer("router", queued(9))
    assert [given.decode.name for given in schedule(unit, 1.0).credits] == [decodes[1]]


def test_a_paused_sequence_keeps_its_blocks_and_makes_a_place_in_the_batch() -> None:
    unit = Unit(4 * SLAB_BYTES, SLAB_BYTES, {"a": UnitModel(SHAPES["a"], 1, 512, max_resident_seqs=2)})
    ready_workers(unit, "a")
    lease, worker = decoding(unit, 1, 40)
    unit.offer("router", queued(2))
    assert schedule(unit).credits == []
    unit.leases.pause(lease.ref, worker)
    assert [given.entry_id for given in schedule(unit).credits] == [2]
    unit.offer("router", queued(3))
    assert schedule(unit).credits == [], "there are as many resident sequences as are allowed"
    assert unit.leases.of_owner(worker)[0].block_ids == lease.block_ids
    unit.leases.resume(lease.ref, worker)
    unit.check_integrity()


def test_a_model_that_is_added_shares_the_pool_and_serves() -> None:
    unit = make_unit(num_slabs=4)
    unit.remove_model("c")
    assert unit.quotas.keys() == {"a", "b"}
    unit.add_model("new", UnitModel(SHAPES["c"], 2, 512, guaranteed_slabs=2))
    assert sum(unit.quotas.values()) == 4 and unit.quotas["new"] >= 2
    ready_workers(unit, "new")
    unit.offer("router", queued(1, "new"))
    assert [given.lease.model for given in schedule(unit).credits] == ["new"]


def test_a_model_leaves_when_its_last_sequence_has_ended() -> None:
    unit = make_unit()
    ready_workers(unit, "a")
    lease, worker = decoding(unit, 1, 40)
    unit.offer("router", queued(2, num_tokens=10**6 // 1000))
    assert [entry.request.entry_id for entry in unit.remove_model("a")] == [2]
    with pytest.raises(InvalidRequest, match="model: 'a' is not served"):
        unit.offer("router", queued(3))
    with pytest.raises(InvalidRequest, match="it serves: b, c"):
        unit.attach(Role.DECODE, "a", "x", 1)
    with pytest.raises(ValueError, match="already that leaves it"):
        unit.add_model("a", UnitModel(SHAPES["a"], 1, 512))
    assert unit.grow(lease.ref, worker, 1) is not None, "what runs goes on"
    unit.release(lease.ref, worker)
    schedule(unit, 1.0)
    assert unit.models.keys() == unit.quotas.keys() == {"b", "c"}
    unit.check_integrity()


def test_a_model_that_comes_back_finds_no_kv_of_the_one_before_it() -> None:
    unit = make_unit()
    prefill, decode = ready_workers(unit, "a")
    hashes = block_hashes(range(30), 8, ROOT)
    unit.offer("router", queued(1, num_tokens=40, hashes=hashes, max_cached=29))
    held = unit.acquire(schedule(unit).credits[0].lease.ref, prefill)
    moved = unit.move(held.ref, prefill, decode, 30, (5,))
    unit.release(moved.ref, decode, hashes)
    unit.remove_model("a")
    unit.add_model("a", UnitModel(SHAPES["a"], 3, 512))
    unit.offer("router", queued(2, num_tokens=40, hashes=hashes, max_cached=29))
    (again,) = schedule(unit, 1.0).credits
    assert again.lease.num_computed_tokens == 0


def test_more_than_the_pool_is_not_guaranteed() -> None:
    unit = make_unit(num_slabs=4)
    with pytest.raises(ValueError, match="5 slabs would be guaranteed; the pool has 4"):
        unit.add_model("d", UnitModel(SHAPES["a"], 1, 512, guaranteed_slabs=5))
    assert "d" not in unit.models


def test_costs_are_due_once_a_second() -> None:
    unit = make_unit()
    assert [unit.costs_are_due(now_s) for now_s in (0.0, 0.5, 1.0, 1.5, 3.0)] == [True, False, True, False, True]


class UnitMachine(RuleBasedStateMachine):
    """Random life of a unit: offers, credits, every transition of a lease, deaths, late calls, models that come and go.

    Each operation on a lease is allowed exactly where the table of transitions says so.
    """

    credits_out = Bundle("credits_out")
    held = Bundle("held")
    late = Bundle("late")

    @initialize()
    def start(self) -> None:
        self.unit = make_unit(num_slabs=3, max_num_seqs=4, swap_bytes=6 * SWAP_PAGE_BYTES)
        self.now_s = 0.0
        self.last_entry = 0
        self.just_admitted = False
        self.workers = {model: ready_workers(self.unit, model) for model in SHAPES}
        self.wanted: dict[int, tuple[bytes, ...]] = {}
        self.prefix_of: dict[int, tuple[bytes, ...]] = {}
        self.holds: dict[tuple[str, int], bytes | None] = {}

    def walk(self, operation: str, lease: Lease, owner: str, call: Callable[[], Any]) -> Any:
        """Calls an operation on a lease; None if it was refused or the unit had no memory for it."""
        self.just_admitted = False
        record = self.unit.leases._records.get(lease.ref.lease_id)
        is_ours = record is not None and record.lease.ref == lease.ref and record.owner == owner
        before = record.state if record is not None and is_ours else None
        allowed = TRANSITIONS[operation]
        try:
            result = call()
        except WorkerLost:  # of a model that has left
            return None
        except LeaseLost:
            assert before not in allowed, f"{operation} of a lease that is {before} was refused"
            return None
        assert record is not None
        assert before in allowed, f"{operation} of a lease that is {before} was not refused"
        assert before is not None
        assert record.state is (before if result is None and "begin" in operation else allowed[before])
        return result

    @rule(
        model=st.sampled_from(sorted(SHAPES)),
        num_tokens=st.sampled_from([1, 30, 64, 96]),
        priority=st.integers(-1, 1),
        topic=st.integers(0, 1),
        known=st.sampled_from([0, 40, 96]),
    )
    def offer(self, model: str, num_tokens: int, priority: int, topic: int, known: int) -> None:
        """Requests of one topic begin alike; ``known`` of its tokens are the prompt."""
        self.just_admitted = False
        self.last_entry += 1
        known = min(known, num_tokens)
        hashes = block_hashes([topic] * known, SHAPES[model].block_size, ROOT)
        self.wanted[self.last_entry] = hashes
        request = queued(self.last_entry, model, num_tokens, priority, self.now_s, hashes, max(0, known - 1))
        try:
            self.unit.offer("router", request)
        except InvalidRequest:
            assert model == "c", "only this one ever leaves"

    @rule(back=st.integers(0, 5))
    def withdraw(self, back: int) -> None:
        self.just_admitted = False
        self.unit.admission.withdraw("router", self.last_entry - back)

    @rule(target=credits_out, seconds=st.sampled_from([0.0, 1.0, CREDIT_TTL_S]))
    def issue_credits(self, seconds: float) -> object:
        self.now_s += seconds
        self.just_admitted = True
        decisions = self.unit.schedule(self.now_s, self.now_s)
        for credit in decisions.credits:
            self.prefix_of[credit.lease.ref.lease_id] = self.wanted[credit.entry_id]
            self.look_at(credit.lease, credit.lease.num_computed_tokens // SHAPES[credit.lease.model].block_size)
        for swap_in in decisions.swap_ins:
            lease = self.lease_now(swap_in.lease_id)
            assert lease is not None
            assert lease.block_ids == swap_in.block_ids
            self.look_at(lease, swap_in.num_cached)
        decoding = {names[1] for names in self.workers.values()}
        assert all(asked.worker in decoding for asked in decisions.preemptions)
        return multiple(*decisions.credits)

    def lease_now(self, lease_id: int) -> Lease | None:
        record = self.unit.leases._records.get(lease_id)
        return record.lease if record else None

    def look_at(self, lease: Lease, shared: int) -> None:
        """What is said to be cached holds what was asked for; what is not, nobody else has."""
        hashes = self.prefix_of[lease.ref.lease_id]
        assert [self.holds[lease.model, block] for block in lease.block_ids[:shared]] == list(hashes[:shared])
        others = [r.lease for r in self.unit.leases._records.values() if r.lease.ref.lease_id != lease.ref.lease_id]
        taken = {block for other in others if other.model == lease.model for block in other.block_ids}
        for block in lease.block_ids[shared:]:
            assert block not in taken
            self.holds[lease.model, block] = None

    def computed(self, lease: Lease, num_blocks: int) -> tuple[bytes, ...]:
        """A worker has computed so many blocks of the lease: they hold its prompt now."""
        hashes = self.prefix_of[lease.ref.lease_id][:num_blocks]
        for block, name in zip(lease.block_ids, hashes, strict=False):
            assert self.holds[lease.model, block] in {None, name}, "a block that others may read was overwritten"
            self.holds[lease.model, block] = name
        return hashes

    @rule(target=held, given=consumes(credits_out))
    def acquire(self, given: IssuedCredit) -> object:
        prefill = self.workers[given.lease.model][0]
        lease = self.walk("acquire", given.lease, "router", lambda: self.unit.acquire(given.lease.ref, prefill))
        if lease is None:
            return multiple()
        assert lease.block_ids == given.lease.block_ids
        assert lease.num_computed_tokens <= 95
        return (lease, prefill)

    @rule(target=held, lease_of=consumes(held))
    def move(self, lease_of: tuple[Lease, str]) -> object:
        lease, owner = lease_of
        decode, size = self.workers[lease.model][1], SHAPES[lease.model].block_size
        computed = max(lease.num_computed_tokens, len(lease.block_ids) * size // 2)
        moved = self.walk("move", lease, owner, lambda: self.unit.move(lease.ref, owner, decode, computed, (1,)))
        if moved is None:
            return multiple() if self.lease_now(lease.ref.lease_id) is None else lease_of
        self.computed(moved, computed // size)
        return (moved, decode)

    @rule(lease_of=held, operation=st.sampled_from(["pause", "resume"]))
    def pause_or_resume(self, lease_of: tuple[Lease, str], operation: str) -> None:
        lease, owner = lease_of
        self.walk(operation, lease, owner, lambda: getattr(self.unit.leases, operation)(lease.ref, owner) or "done")

    @rule(lease_of=held, num_bytes=st.sampled_from([1, SWAP_PAGE_BYTES, 4 * SWAP_PAGE_BYTES]))
    def begin_swap_out(self, lease_of: tuple[Lease, str], num_bytes: int) -> None:
        lease, owner = lease_of
        leases = self.unit.leases
        pages = self.walk("begin_swap_out", lease, owner, lambda: leases.begin_swap_out(lease.ref, owner, num_bytes))
        assert pages is None or len(pages) == -(-num_bytes // SWAP_PAGE_BYTES)

    @rule(lease_of=held, published=st.integers(0, 12))
    def finish_swap_out(self, lease_of: tuple[Lease, str], published: int) -> None:
        lease, owner = lease_of
        before = self.lease_now(lease.ref.lease_id)
        hashes = self.prefix_of[lease.ref.lease_id][:published]
        leases = self.unit.leases
        done = self.walk(
            "finish_swap_out", lease, owner, lambda: succeeds(leases.finish_swap_out, lease.ref, owner, hashes)
        )
        if done:
            assert before is not None
            self.computed(before, published)

    @rule(lease_of=held, num_tokens=st.sampled_from([1, 30, 64, 96]))
    def request_swap_in(self, lease_of: tuple[Lease, str], num_tokens: int) -> None:
        self.just_admitted = False
        lease, owner = lease_of
        hashes = self.prefix_of[lease.ref.lease_id]
        demand = KvDemand(num_tokens, 512, hashes, min(num_tokens, len(hashes) * SHAPES[lease.model].block_size))
        with contextlib.suppress(LeaseLost):
            self.unit.request_swap_in(lease.ref, owner, demand, SchedulingState(0, self.now_s))
            assert self.unit.leases.state_of(lease.ref, owner) is LeaseState.SWAPPED

    @rule(lease_of=held)
    def finish_swap_in(self, lease_of: tuple[Lease, str]) -> None:
        lease, owner = lease_of
        leases = self.unit.leases
        self.walk("finish_swap_in", lease, owner, lambda: succeeds(leases.finish_swap_in, lease.ref, owner))

    @rule(lease_of=held, num_blocks=st.integers(1, 6))
    def grow(self, lease_of: tuple[Lease, str], num_blocks: int) -> None:
        lease, owner = lease_of
        for block in self.walk("grow", lease, owner, lambda: self.unit.grow(lease.ref, owner, num_blocks)) or ():
            self.holds[lease.model, block] = None

    @rule(target=late, lease_of=consumes(held), published=st.integers(0, 12))
    def release(self, lease_of: tuple[Lease, str], published: int) -> object:
        self.just_admitted = False
        lease, owner = lease_of
        record = self.unit.leases._records.get(lease.ref.lease_id)
        state = record.state if record else None
        before = self.lease_now(lease.ref.lease_id)
        try:
            self.unit.release(lease.ref, owner, self.prefix_of[lease.ref.lease_id][:published])
        except LeaseLost:
            return multiple()
        assert before is not None
        if state is not LeaseState.SWAPPING_IN:  # its blocks hold nothing yet
            self.computed(before, published)
        return lease_of

    @rule(lease_of=late)
    def a_late_call_is_refused(self, lease_of: tuple[Lease, str]) -> None:
        lease, owner = lease_of
        with pytest.raises(LeaseLost):
            self.unit.leases.release(lease.ref, owner)
        with pytest.raises((LeaseLost, WorkerLost)):
            self.unit.acquire(LeaseRef(lease.ref.lease_id, lease.ref.epoch), self.workers[lease.model][0])

    @rule(model=st.sampled_from(sorted(SHAPES)), which=st.integers(0, 1))
    def a_worker_dies_and_comes_back(self, model: str, which: int) -> None:
        self.just_admitted = False
        names = list(self.workers[model])
        self.unit.worker_exited(names[which])
        try:
            worker = self.unit.attach((Role.PREFILL, Role.DECODE)[which], model, "x", 1)
        except InvalidRequest:
            assert model == "c"
            return
        worker.ready = True
        names[which] = worker.name
        self.workers[model] = (names[0], names[1])

    @rule()
    def the_router_dies(self) -> None:
        self.just_admitted = False
        self.unit.router_gone("router")

    @rule()
    def a_model_leaves(self) -> None:
        self.just_admitted = False
        if "c" in self.unit.models:
            self.unit.remove_model("c")

    @rule()
    def a_model_comes(self) -> None:
        self.just_admitted = False
        if "c" not in self.unit.models:
            self.unit.add_model("c", UnitModel(SHAPES["c"], 4, 512))
            self.holds = {key: held for key, held in self.holds.items() if key[0] != "c"}
            for name in self.workers["c"]:
                self.unit.worker_exited(name)
            self.workers["c"] = ready_workers(self.unit, "c")

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        if hasattr(self, "unit"):
            self.unit.check_integrity()

    @invariant()
    def whoever_can_claim_memory_has_it_or_waits_for_a_loan(self) -> None:
        """After a round of credits: an entry within its quota waits only while another model is above its own."""
        if not hasattr(self, "unit") or not self.just_admitted:
            return
        unit = self.unit
        above = [m for m in unit.models if unit.blocks.num_used_slabs(m) > unit.quotas[m]]
        batched, _ = unit.leases.count_assigned()
        for waiting in unit.admission._entries.values():
            shape, limit = SHAPES[waiting.model], unit.models[waiting.model].max_num_seqs
            decode = waiting.source if waiting.swapped else self.workers[waiting.model][1]
            first = min(
                (entry for entry in unit.admission._entries.values() if entry.model == waiting.model),
                key=lambda entry: FCFS.sort_key(entry.request.scheduling, 0.0),
            )
            needed = -(-first.request.demand.num_tokens // shape.block_size)
            fits = unit.blocks.num_slabs_with(first.model, needed) <= unit.quotas[first.model]
            if batched[decode] < limit and batched[self.workers[waiting.model][1]] < limit and fits:
                assert above, f"{first} waits, though nobody is above its quota"

    def teardown(self) -> None:
        if not hasattr(self, "unit"):
            return
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
