"""The unit as a whole: which requests get credits, quotas and loans, workers, and models that come and go.

Random operations: `test_unit_random_operations`.
"""

from dataclasses import replace

import pytest

from kvstore.memory_reclaim import RECLAIM_AFTER_S, RECLAIM_EVERY_S, PreemptionRequest
from kvstore.sequence_progress import SequenceProgress
from kvstore.unit import (
    CREDIT_TTL_S,
    SLOT_CHECK_EVERY_S,
    AdmissionDecisions,
    Unit,
    first_id,
)
from kvstore.unit_model import UnitModel
from muxmesh.batch_choice import MAX_PREEMPTIONS
from muxmesh.block_hashes import block_hashes
from muxmesh.errors import InvalidRequest, LeaseLost, WorkerLost
from muxmesh.execution import PreemptionReason
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, QueuedRequest, Role, SchedulingState, Waits
from tests.kvstore.small_unit import (
    SHAPES,
    SLAB_BYTES,
    admitted_ids,
    attach_ready,
    decoding,
    make_unit,
    queued,
    schedule,
    slab_tokens,
)

ROOT = b"root"
FIRST = SchedulingState(0, 0.0)


# Requests and credits


def test_no_credit_is_issued_before_both_workers_are_ready() -> None:
    unit = make_unit()
    unit.offer("router", queued(1))
    unit.attach(Role.PREFILL, "a", "x", 1).ready = True
    assert admitted_ids(unit) == []
    decode = unit.attach(Role.DECODE, "a", "x", 2)
    assert admitted_ids(unit) == []
    decode.ready = True
    assert admitted_ids(unit) == [1]


def test_credits_are_issued_in_order_up_to_the_batch_size() -> None:
    unit = make_unit(max_num_seqs=2)
    attach_ready(unit, "a")
    for entry_id, priority, arrived_at_s in ((1, 0, 5.0), (2, 0, 3.0), (3, -1, 9.0), (4, 1, 0.0)):
        unit.offer("router", queued(entry_id, priority=priority, arrived_at_s=arrived_at_s))
    assert [(one.entry_id, one.decision, one.num_overtaken) for one in schedule(unit).credits] == [(3, 1, 0), (2, 2, 0)]


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    unit = make_unit(num_slabs=1)
    attach_ready(unit, "a")
    unit.offer("router", queued(1, num_tokens=8, arrived_at_s=0.0))
    (small,) = schedule(unit).credits
    unit.offer("router", queued(2, num_tokens=slab_tokens(unit, "a"), arrived_at_s=1.0))
    unit.offer("router", queued(3, num_tokens=8, arrived_at_s=2.0))
    assert admitted_ids(unit) == []
    unit.release(small.lease.ref, "router")
    assert admitted_ids(unit) == [2]


def test_a_model_without_slots_does_not_block_another() -> None:
    unit = make_unit(max_num_seqs=1)
    attach_ready(unit, "a")
    attach_ready(unit, "b")
    for entry_id, model in ((1, "a"), (2, "a"), (3, "b")):
        unit.offer("router", queued(entry_id, model, num_tokens=16, arrived_at_s=entry_id))
    assert admitted_ids(unit) == [1, 3]


def test_a_request_of_an_unknown_model_is_refused_by_field() -> None:
    with pytest.raises(InvalidRequest, match=r"^model: 'other' is not served by this unit"):
        make_unit().offer("router", queued(1, "other"))


def test_a_request_that_never_fits_is_refused_by_field() -> None:
    unit = make_unit(num_slabs=1)
    capacity = slab_tokens(unit, "a")
    unit.offer("router", queued(1, num_tokens=capacity))
    problem = f"prompt and longest output are {capacity + 1} tokens; the KV pool holds {capacity}"
    with pytest.raises(InvalidRequest, match=rf"^stopping\.max_new_tokens: {problem}$"):
        unit.offer("router", queued(2, num_tokens=capacity + 1))


def test_the_longest_output_counts_for_a_refusal_and_the_first_reservation_for_a_credit() -> None:
    unit = make_unit(num_slabs=1)
    attach_ready(unit, "a")
    unit.offer("router", QueuedRequest(1, "a", FIRST, KvDemand(num_tokens=9, max_tokens=slab_tokens(unit, "a"))))
    assert len(schedule(unit).credits[0].lease.block_ids) == 2


def test_the_cached_part_of_a_prompt_counts_as_work_that_is_done() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    hashes = block_hashes(range(32), 8, ROOT)
    lease, decode = decoding(unit, 1, 32)
    unit.release(lease.ref, decode, hashes[:2])
    scheduling = SchedulingState(0, 0.0, prefill_s=3.2, decode_s=5.0)
    unit.offer("router", QueuedRequest(2, "a", scheduling, KvDemand(32, 32, hashes, max_cached_tokens=31)))
    (issued,) = schedule(unit).credits
    assert issued.lease.num_computed_tokens == 16
    assert issued.scheduling.prefill_s == pytest.approx(1.6)
    assert issued.scheduling.decode_s == 5.0


def test_an_unused_credit_expires_and_its_request_does_not_return() -> None:
    unit = make_unit()
    prefill, _ = attach_ready(unit, "a")
    unit.offer("router", queued(1))
    (issued,) = schedule(unit).credits
    assert unit.next_change_s() == CREDIT_TTL_S
    assert admitted_ids(unit, CREDIT_TTL_S) == []
    assert (len(unit.leases), unit.next_change_s()) == (0, None)
    with pytest.raises(LeaseLost, match="does not exist or has ended"):
        unit.acquire(issued.lease.ref, prefill)


def test_the_credits_and_requests_of_a_lost_router_end_and_its_acquired_leases_continue() -> None:
    unit = make_unit(max_num_seqs=2)
    prefill, _ = attach_ready(unit, "a")
    for entry_id in (1, 2, 3):
        unit.offer("router", queued(entry_id))
    first, _ = schedule(unit).credits
    unit.acquire(first.lease.ref, prefill)
    unit.router_gone("router")
    assert unit.admission.count("a") == 0
    assert unit.leases.count_by_owner() == {prefill: 1}


# Workers


def test_a_restarted_worker_gets_another_name() -> None:
    unit = make_unit()
    names = [unit.attach(Role.DECODE, "a", "x", 1).name for _ in range(3)]
    assert names == ["decode-a#1", "decode-a#2", "decode-a#3"]


def test_worker_names_and_lease_ids_of_a_restarted_unit_are_new() -> None:
    earlier, later = first_id(1_000.001), first_id(1_000.002)
    assert later - earlier == 2**16
    models = {"a": UnitModel(SHAPES["a"], 3, 512)}
    names: list[str] = []
    lease_ids: list[int] = []
    for last_id in (earlier, later):
        unit = Unit(4 * SLAB_BYTES, SLAB_BYTES, models, last_id)
        names += attach_ready(unit, "a")
        unit.offer("router", queued(1))
        lease_ids.append(schedule(unit).credits[0].lease.ref.lease_id)
    assert len(set(names)) == 4
    assert lease_ids == [earlier + 1, later + 1]


def test_only_ready_workers_of_the_role_and_the_model_serve_the_youngest_first() -> None:
    unit = make_unit()
    workers = [unit.attach(Role.DECODE, "a", "x", 1) for _ in range(3)]
    unit.attach(Role.DECODE, "b", "x", 1).ready = True
    unit.attach(Role.PREFILL, "a", "x", 1).ready = True
    workers[0].ready = workers[2].ready = True
    assert unit.ready_workers(Role.DECODE, "a") == [workers[2], workers[0]]


def test_the_youngest_of_idle_workers_is_chosen_and_then_the_least_loaded() -> None:
    unit = make_unit(max_num_seqs=2)
    attach_ready(unit, "a")
    attach_ready(unit, "a")
    for entry_id in range(1, 6):
        unit.offer("router", queued(entry_id, arrived_at_s=entry_id))
    issued = schedule(unit).credits
    assert len(issued) == 4, "each replica takes its own batch"
    decodes = [credit.decode.name for credit in issued]
    assert decodes[0] != decodes[1] and sorted(decodes[:2]) == sorted(decodes[2:])
    unit.worker_exited(decodes[0])
    unit.router_gone("router")
    unit.offer("router", queued(9))
    assert [credit.decode.name for credit in schedule(unit, 1.0).credits] == [decodes[1]]


def test_a_worker_of_an_unknown_model_is_refused_with_the_models_that_are_served() -> None:
    with pytest.raises(InvalidRequest, match=r"^model: 'x' is not served by this unit; it serves: a, b, c$"):
        make_unit().attach(Role.DECODE, "x", "unix:x", 1)


def test_only_an_attached_worker_can_acquire_a_credit() -> None:
    unit = make_unit()
    prefill, _ = attach_ready(unit, "a")
    unit.offer("router", queued(1))
    (issued,) = schedule(unit).credits
    unit.worker_exited(prefill)
    with pytest.raises(WorkerLost, match=f"worker {prefill} is not attached"):
        unit.acquire(issued.lease.ref, prefill)


def test_a_hand_off_to_a_lost_worker_leaves_the_lease_with_its_owner() -> None:
    unit = make_unit()
    prefill, decode = attach_ready(unit, "a")
    unit.offer("router", queued(1))
    acquired = unit.acquire(schedule(unit).credits[0].lease.ref, prefill)
    unit.worker_exited(decode)
    with pytest.raises(WorkerLost, match="not attached"):
        unit.move(acquired.ref, prefill, decode, 8, (1,))
    unit.release(acquired.ref, prefill)


def test_what_a_killed_worker_had_computed_is_found_by_the_next_attempt() -> None:
    unit = make_unit()
    prefill, decode = attach_ready(unit, "a")
    hashes = block_hashes(range(60), 8, ROOT)
    unit.offer("router", queued(1, num_tokens=70, hashes=hashes[:2], max_cached_tokens=16))
    acquired = unit.acquire(schedule(unit).credits[0].lease.ref, prefill)
    moved = unit.move(acquired.ref, prefill, decode, 17, (5,))
    computed = {moved.ref.lease_id: hashes[:6], 12345: hashes}
    assert unit.worker_exited(prefill, computed) == 0, "only its own leases count"
    assert unit.worker_exited(decode, computed) == 1
    unit.check_integrity()
    attach_ready(unit, "a")
    unit.offer("router", queued(2, num_tokens=70, hashes=hashes, max_cached_tokens=59))
    (again,) = schedule(unit, 1.0).credits
    assert again.lease.num_computed_tokens == 48
    assert again.lease.block_ids[:6] == moved.block_ids[:6]


def test_after_a_failure_of_the_device_no_request_gets_kv_that_was_computed_before() -> None:
    unit = make_unit()
    prefill, decode = attach_ready(unit, "a")
    hashes = block_hashes([1] * 32, 8, b"root")

    def offered(entry_id: int) -> Lease:
        unit.offer("router", queued(entry_id, num_tokens=32, hashes=hashes, max_cached_tokens=31))
        (issued,) = schedule(unit).credits
        return issued.lease

    lease = unit.move(unit.acquire(offered(1).ref, prefill).ref, prefill, decode, 32, (1,))
    credit = offered(2)
    assert credit.num_computed_tokens == 24
    assert unit.device_failed() == 1
    with pytest.raises(LeaseLost):
        unit.acquire(credit.ref, prefill)
    unit.release(lease.ref, decode, hashes)
    assert unit.worker_exited(decode, {lease.ref.lease_id: hashes}) == 0
    attach_ready(unit, "a")
    assert offered(3).num_computed_tokens == 0
    unit.check_integrity()


# Quotas and loans


def test_a_model_within_its_quota_goes_before_one_above_it() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=100)
    unit.quotas.slabs |= {"a": 2, "b": 2, "c": 0}
    for model in SHAPES:
        attach_ready(unit, model)
    for entry_id in range(1, 5):
        unit.offer("router", queued(entry_id, "a", slab_tokens(unit, "a"), arrived_at_s=entry_id))
    loans = schedule(unit).credits
    assert [issued.entry_id for issued in loans] == [1, 2, 3, 4], "no other model needs the other half: it is lent"
    unit.offer("router", queued(5, "a", slab_tokens(unit, "a"), priority=-1, arrived_at_s=5))
    unit.offer("router", queued(6, "b", 2 * slab_tokens(unit, "b"), arrived_at_s=6))
    unit.release(loans[0].lease.ref, "router")
    assert admitted_ids(unit, 1.0) == []
    unit.release(loans[1].lease.ref, "router")
    assert admitted_ids(unit, 1.0) == [6]
    unit.release(loans[2].lease.ref, "router")
    assert admitted_ids(unit, 2.0) == [5]


def test_quotas_follow_the_load() -> None:
    unit = make_unit(num_slabs=12, max_num_seqs=100)
    assert unit.quotas.slabs == {"a": 4, "b": 4, "c": 4}
    prefill, _ = attach_ready(unit, "a")
    for entry_id in range(1, 14):
        unit.offer("router", queued(entry_id, "a", slab_tokens(unit, "a")))
    for seconds in range(0, 60, 2):
        for issued in schedule(unit, float(seconds)).credits:
            unit.acquire(issued.lease.ref, prefill)
        assert sum(unit.quotas.slabs.values()) == 12
    assert unit.quotas.slabs["a"] > 8
    assert min(unit.quotas.slabs.values()) >= 0


def lend_to_a(unit: Unit) -> list[tuple[Lease, str]]:
    """Four leases of `a`, each of a slab, in a pool of four slabs of which two are the quota of `b`."""
    unit.quotas.slabs |= {"a": 2, "b": 2, "c": 0}
    for model in "ab":
        attach_ready(unit, model)
    return [decoding(unit, entry_id, slab_tokens(unit, "a"), arrived_at_s=entry_id) for entry_id in (1, 2, 3, 4)]


def test_a_loan_that_does_not_return_is_reclaimed_from_the_last_sequence_in_order() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=10, swap_bytes=4 * SWAP_PAGE_BYTES)
    loans = lend_to_a(unit)
    unit.offer("router", queued(9, "b", num_tokens=2 * slab_tokens(unit, "b"), arrived_at_s=9.0))
    assert schedule(unit, 5.0) == AdmissionDecisions()
    assert unit.next_change_s() == 5.0 + RECLAIM_AFTER_S
    now_s = 5.0 + RECLAIM_AFTER_S
    for lease, worker in (loans[3], loans[2]):
        requested = [PreemptionRequest(worker, lease.ref.lease_id, PreemptionReason.KV_QUOTA)]
        assert schedule(unit, now_s).preemptions == requested
        assert schedule(unit, now_s).preemptions == [], "the interval has not passed"
        now_s += RECLAIM_EVERY_S
        assert schedule(unit, now_s).preemptions == requested, "its blocks are not free yet"
        unit.leases.begin_swap_out(lease.ref, worker, SWAP_PAGE_BYTES)
        unit.leases.finish_swap_out(lease.ref, worker)
        unit.request_swap_in(lease.ref, worker, KvDemand(slab_tokens(unit, "a"), slab_tokens(unit, "a")), FIRST)
        now_s += RECLAIM_EVERY_S
    decisions = schedule(unit, now_s)
    assert [credit.entry_id for credit in decisions.credits] == [9]
    assert (decisions.swap_ins, decisions.preemptions) == ([], [])
    assert unit.next_change_s() == now_s + CREDIT_TTL_S


def test_a_claim_that_ends_stops_the_reclaiming() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=10)
    lend_to_a(unit)
    unit.offer("router", queued(9, "b"))
    schedule(unit, 5.0)
    unit.admission.withdraw("router", 9)
    assert schedule(unit, 5.5) == AdmissionDecisions()
    assert unit.next_change_s() is None
    unit.offer("router", queued(10, "b"))
    assert schedule(unit, 100.0).preemptions == [], "a new claim waits anew"


def test_leases_of_models_within_their_quota_are_not_pre_empted() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=10)
    unit.quotas.slabs |= {"a": 2, "b": 2, "c": 0}
    for model in "ab":
        attach_ready(unit, model)
    for entry_id, model in ((1, "a"), (2, "a"), (3, "b"), (4, "b")):
        decoding(unit, entry_id, slab_tokens(unit, model), model, arrived_at_s=entry_id)
    unit.offer("router", queued(9, "a"))
    for now_s in (5.0, 10.0, 20.0):
        assert schedule(unit, now_s) == AdmissionDecisions()


def test_a_loan_is_reclaimed_from_a_model_above_its_quota_though_another_is_later_in_order() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=10)
    unit.quotas.slabs |= {"a": 1, "b": 2, "c": 1}
    for model in SHAPES:
        attach_ready(unit, model)
    for entry_id, model in ((1, "a"), (2, "a"), (3, "b"), (4, "b")):
        decoding(unit, entry_id, slab_tokens(unit, model), model, arrived_at_s=entry_id)
    unit.offer("router", queued(9, "c", 16))
    schedule(unit, 5.0)
    assert [one.lease_id for one in schedule(unit, 5.0 + RECLAIM_AFTER_S).preemptions] == [2]


def test_a_lease_of_a_prefill_worker_is_not_pre_empted() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=10)
    loans = lend_to_a(unit)
    unit.release(loans[3][0].ref, loans[3][1])
    unit.offer("router", queued(5, "a", slab_tokens(unit, "a"), arrived_at_s=5.0))
    (issued,) = schedule(unit).credits
    unit.acquire(issued.lease.ref, issued.prefill.name)
    unit.offer("router", queued(9, "b", 2 * slab_tokens(unit, "b")))
    schedule(unit, 5.0)
    assert [one.lease_id for one in schedule(unit, 5.0 + RECLAIM_AFTER_S).preemptions] == [3]


def test_a_lease_grows_past_its_quota_only_while_no_claim_waits() -> None:
    unit = make_unit(num_slabs=4, max_num_seqs=10)
    unit.quotas.slabs |= {"a": 1, "b": 3, "c": 0}
    for model in "ab":
        attach_ready(unit, model)
    lease, worker = decoding(unit, 1, slab_tokens(unit, "a"))
    assert unit.grow(lease.ref, worker, 1) is not None
    unit.offer("router", queued(9, "b", 3 * slab_tokens(unit, "b")))
    schedule(unit, 5.0)
    blocks_per_slab = unit.pool.blocks_per_slab("a")
    assert unit.grow(lease.ref, worker, blocks_per_slab) is None, "it would need a third slab"
    assert unit.grow(lease.ref, worker, blocks_per_slab - 1) is not None
    unit.admission.withdraw("router", 9)
    schedule(unit, 5.5)
    assert unit.grow(lease.ref, worker, blocks_per_slab) is not None


# Swapped leases


def swapped(unit: Unit, entry_id: int, num_tokens: int, computed: tuple[bytes, ...] = ()) -> tuple[Lease, str]:
    lease, worker = decoding(unit, entry_id, num_tokens)
    unit.leases.begin_swap_out(lease.ref, worker, SWAP_PAGE_BYTES)
    unit.leases.finish_swap_out(lease.ref, worker, computed)
    return lease, worker


def test_a_swapped_lease_gets_token_blocks_before_a_request_that_is_later_in_order() -> None:
    unit = make_unit(num_slabs=1, swap_bytes=4 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    capacity = slab_tokens(unit, "a")
    lease, worker = swapped(unit, 1, capacity)
    unit.offer("router", queued(2, num_tokens=8, arrived_at_s=9.0))
    unit.request_swap_in(lease.ref, worker, KvDemand(capacity, capacity), FIRST)
    decisions = schedule(unit, 1.0)
    assert ([one.lease_id for one in decisions.swap_ins], decisions.credits) == ([lease.ref.lease_id], [])
    assert (decisions.swap_ins[0].worker, len(decisions.swap_ins[0].block_ids) * 8) == (worker, capacity)
    unit.leases.finish_swap_in(lease.ref, worker)
    unit.release(lease.ref, worker)
    assert admitted_ids(unit, 2.0) == [2]


def test_a_swap_in_reports_the_blocks_that_are_still_cached() -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    hashes = block_hashes(range(39), 8, ROOT)
    lease, worker = swapped(unit, 1, 40, hashes)
    unit.request_swap_in(lease.ref, worker, KvDemand(48, 64, hashes, 39), FIRST)
    (swap_in,) = schedule(unit, 1.0).swap_ins
    assert (swap_in.block_ids[:4], swap_in.num_cached, len(swap_in.block_ids)) == (lease.block_ids[:4], 4, 6)


def test_a_swapped_lease_waits_for_a_slot_of_its_own_worker() -> None:
    unit = make_unit(max_num_seqs=1, swap_bytes=4 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    lease, worker = swapped(unit, 1, 8)
    running, _ = decoding(unit, 2, 8)
    attach_ready(unit, "a")
    unit.request_swap_in(lease.ref, worker, KvDemand(8, 16), FIRST)
    assert schedule(unit, 1.0).swap_ins == []
    unit.release(running.ref, worker)
    assert len(schedule(unit, 1.0).swap_ins) == 1


def test_only_a_swapped_lease_can_be_swapped_in() -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    lease, worker = decoding(unit, 1, 8)
    with pytest.raises(LeaseLost, match="lease 1 is resident, not swapped"):
        unit.request_swap_in(lease.ref, worker, KvDemand(8, 16), FIRST)
    assert unit.admission.count("a") == 0


@pytest.mark.parametrize("when", ["swapping out", "swapped", "waiting", "swapping in"])
def test_a_lease_that_ends_during_a_swap_leaves_nothing(when: str) -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    lease, worker = decoding(unit, 1, 40)
    unit.leases.begin_swap_out(lease.ref, worker, SWAP_PAGE_BYTES)
    if when != "swapping out":
        unit.leases.finish_swap_out(lease.ref, worker)
    if when in {"waiting", "swapping in"}:
        unit.request_swap_in(lease.ref, worker, KvDemand(48, 64), FIRST)
    if when == "swapping in":
        assert schedule(unit, 1.0).swap_ins
    unit.release(lease.ref, worker)
    unit.check_integrity()
    assert schedule(unit, 2.0).swap_ins == []
    assert (unit.blocks.num_in_use("a"), unit.swap.num_free_pages, len(unit.leases)) == (0, 4, 0)
    for late in (unit.leases.finish_swap_out, unit.leases.finish_swap_in):
        with pytest.raises(LeaseLost):
            late(lease.ref, worker)


def test_the_swapped_leases_of_an_exited_worker_end_and_wait_no_longer() -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    lease, worker = swapped(unit, 1, 40)
    unit.request_swap_in(lease.ref, worker, KvDemand(48, 64), FIRST)
    assert unit.worker_exited(worker) == 1
    assert schedule(unit, 1.0) == AdmissionDecisions()
    assert unit.swap.num_free_pages == 4


# Models that come and go


def test_an_added_model_shares_the_pool_and_serves() -> None:
    unit = make_unit(num_slabs=4)
    unit.remove_model("c")
    assert unit.quotas.slabs.keys() == {"a", "b"}
    unit.add_model("new", UnitModel(SHAPES["c"], 2, 512, guaranteed_slabs=2))
    assert sum(unit.quotas.slabs.values()) == 4 and unit.quotas.slabs["new"] >= 2
    attach_ready(unit, "new")
    unit.offer("router", queued(1, "new"))
    assert [issued.lease.model for issued in schedule(unit).credits] == ["new"]


def test_a_model_is_removed_when_its_last_lease_has_ended() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    lease, worker = decoding(unit, 1, 40)
    unit.offer("router", queued(2))
    assert [entry.request.entry_id for entry in unit.remove_model("a")] == [2]
    with pytest.raises(InvalidRequest, match="model: 'a' is not served"):
        unit.offer("router", queued(3))
    with pytest.raises(InvalidRequest, match="it serves: b, c"):
        unit.attach(Role.DECODE, "a", "x", 1)
    with pytest.raises(ValueError, match="model 'a' is still being removed"):
        unit.add_model("a", UnitModel(SHAPES["a"], 1, 512))
    assert unit.grow(lease.ref, worker, 1) is not None, "its leases continue"
    unit.release(lease.ref, worker)
    schedule(unit, 1.0)
    assert unit.models.keys() == unit.quotas.slabs.keys() == {"b", "c"}
    unit.check_integrity()


def test_a_swapped_lease_of_a_removed_model_still_gets_its_token_blocks() -> None:
    unit = make_unit(swap_bytes=4 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    lease, worker = swapped(unit, 1, 8)
    unit.request_swap_in(lease.ref, worker, KvDemand(8, 16), FIRST)
    assert unit.remove_model("a") == []
    assert [one.lease_id for one in schedule(unit, 1.0).swap_ins] == [lease.ref.lease_id]


def test_a_model_that_comes_back_finds_no_kv_of_the_earlier_one() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    hashes = block_hashes(range(30), 8, ROOT)
    lease, decode = decoding(unit, 1, 40)
    unit.release(lease.ref, decode, hashes)
    assert unit.blocks.num_cached("a") == 3
    unit.remove_model("a")
    unit.add_model("a", UnitModel(SHAPES["a"], 3, 512))
    attach_ready(unit, "a")
    unit.offer("router", queued(2, num_tokens=40, hashes=hashes, max_cached_tokens=29))
    (again,) = schedule(unit, 1.0).credits
    assert again.lease.num_computed_tokens == 0


def test_a_model_that_comes_back_is_served_by_its_own_workers_only() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    unit.remove_model("a")
    unit.add_model("a", UnitModel(SHAPES["a"], 3, 512))
    unit.offer("router", queued(1))
    assert not schedule(unit).credits, "only workers of the earlier model are attached"
    prefill, decode = attach_ready(unit, "a")
    (issued,) = schedule(unit, 1.0).credits
    assert (issued.prefill.name, issued.decode.name) == (prefill, decode)


def test_a_model_cannot_be_added_twice() -> None:
    with pytest.raises(ValueError, match="model 'a' exists"):
        make_unit().add_model("a", UnitModel(SHAPES["a"], 1, 512))


def test_no_more_than_the_pool_can_be_guaranteed() -> None:
    unit = make_unit(num_slabs=4)
    unit.remove_model("a")
    unit.add_model("d", UnitModel(SHAPES["a"], 1, 512, guaranteed_slabs=3))
    with pytest.raises(ValueError, match="5 slabs would be guaranteed; the pool has 4"):
        unit.add_model("e", UnitModel(SHAPES["a"], 1, 512, guaranteed_slabs=2))
    assert "e" not in unit.models
    unit.check_integrity()


def test_a_model_whose_token_block_exceeds_a_slab_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="a slab is too small for a token block of a"):
        Unit(4 * 4096, 4096 // 4, {"a": UnitModel(SHAPES["a"], 1, 512)})


def test_a_model_that_was_refused_can_be_added_with_less() -> None:
    unit = make_unit(num_slabs=4)
    with pytest.raises(ValueError, match="would be guaranteed"):
        unit.add_model("d", UnitModel(SHAPES["a"], 1, 512, guaranteed_slabs=5))
    unit.check_integrity()
    unit.add_model("d", UnitModel(SHAPES["a"], 1, 512, guaranteed_slabs=4))
    assert unit.quotas.slabs == {"a": 0, "b": 0, "c": 0, "d": 4}


# Totals


def test_a_block_of_two_leases_counts_once() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    hashes = block_hashes(range(16), 8, ROOT)
    lease, decode = decoding(unit, 1, 16)
    unit.release(lease.ref, decode, hashes)
    for entry_id in (2, 3):
        unit.offer("router", queued(entry_id, num_tokens=16, hashes=hashes, max_cached_tokens=15))
    assert len(schedule(unit).credits) == 2
    assert unit.leased_bytes() == 3 * SHAPES["a"].token_block_bytes


def test_step_costs_are_due_once_a_second() -> None:
    unit = make_unit()
    assert [unit.costs_are_due(now_s) for now_s in (0.0, 0.5, 1.0, 1.5, 3.0)] == [True, False, True, False, True]


def test_integrity_finds_quotas_that_are_not_the_pool() -> None:
    unit = make_unit()
    unit.quotas.slabs["a"] += 1
    with pytest.raises(AssertionError, match="quotas do not add up to the pool"):
        unit.check_integrity()
    del unit.quotas.slabs["a"]
    with pytest.raises(AssertionError, match="models and quotas differ"):
        unit.check_integrity()


# What requests waited for


def waits_of(unit: Unit, entry_id: int, now_s: float) -> Waits:
    """Schedules; what the request that gets a credit has waited for."""
    (issued,) = [credit for credit in schedule(unit, now_s).credits if credit.entry_id == entry_id]
    return issued.waits


def test_a_request_that_gets_a_credit_at_once_waited_for_nothing() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    unit.offer("r", queued(1))
    assert waits_of(unit, 1, 5.0) == Waits()


def test_a_request_without_a_ready_worker_waits_for_one() -> None:
    unit = make_unit()
    unit.offer("r", queued(1))
    schedule(unit, 5.0)
    attach_ready(unit, "a")
    assert waits_of(unit, 1, 8.0) == Waits(worker_s=3.0)


def test_a_request_waits_for_the_one_before_it_and_then_for_a_slot() -> None:
    unit = make_unit(max_num_seqs=1)
    attach_ready(unit, "a")
    unit.offer("r", queued(11))
    (first,) = schedule(unit, 0.0).credits
    unit.offer("r", queued(12, arrived_at_s=1.0))
    unit.offer("r", queued(13, arrived_at_s=2.0))
    schedule(unit, 2.0)
    unit.release(first.lease.ref, "r")
    second = schedule(unit, 5.0).credits[0]
    assert second.waits == Waits(slot_s=3.0)
    unit.release(second.lease.ref, "r")
    assert waits_of(unit, 13, 9.0) == Waits(order_s=3.0, slot_s=4.0)


def test_a_request_that_the_pool_cannot_hold_yet_waits_for_memory() -> None:
    unit = make_unit(num_slabs=1)
    attach_ready(unit, "a")
    unit.offer("r", queued(11, num_tokens=slab_tokens(unit, "a")))
    (first,) = schedule(unit, 0.0).credits
    unit.offer("r", queued(12))
    schedule(unit, 1.0)
    unit.release(first.lease.ref, "r")
    assert waits_of(unit, 12, 3.5) == Waits(kv_s=2.5)


def test_a_request_that_a_better_one_overtakes_waits_for_it() -> None:
    unit = make_unit(max_num_seqs=1)
    attach_ready(unit, "a")
    unit.offer("r", queued(11))
    (first,) = schedule(unit, 0.0).credits
    unit.offer("r", queued(12, priority=5))
    schedule(unit, 1.0)
    unit.offer("r", queued(13, priority=0, arrived_at_s=2.0))
    schedule(unit, 2.0)
    unit.release(first.lease.ref, "r")
    (urgent,) = schedule(unit, 4.0).credits
    unit.release(urgent.lease.ref, "r")
    assert waits_of(unit, 12, 5.0) == Waits(slot_s=2.0, order_s=2.0)


# Pre-emption from a full batch


def unit_with_paused(
    max_num_seqs: int = 2, paused: int = 2, policy: str = "srtf", order: SchedulingPolicy | None = None
) -> Unit:
    order = order or SchedulingPolicy(policy, 0.0, 0.0, 1.0)  # type: ignore[arg-type]
    model = UnitModel(SHAPES["a"], max_num_seqs, 512, max_resident_seqs=max_num_seqs + paused)
    unit = Unit(8 * SLAB_BYTES, SLAB_BYTES, {"a": model}, policy=order)
    attach_ready(unit, "a")
    return unit


def with_work(entry_id: int, remaining_s: float, priority: int = 0) -> QueuedRequest:
    return QueuedRequest(entry_id, "a", SchedulingState(priority, 0.0, decode_s=remaining_s), KvDemand(8, 8))


def full_batch(unit: Unit, *remaining_s: float) -> list[Lease]:
    """Decoding sequences with this work."""
    prefill, decode = (unit.ready_workers(role, "a")[0].name for role in Role)
    leases = []
    for number, work_s in enumerate(remaining_s, 100):
        unit.offer("router", with_work(number, work_s))
        (issued,) = schedule(unit).credits
        acquired = unit.acquire(issued.lease.ref, prefill)
        leases.append(unit.move(acquired.ref, prefill, decode, 7, (1,)))
    return leases


def test_a_request_with_less_than_half_of_the_work_is_admitted_to_a_full_batch() -> None:
    unit = unit_with_paused()
    full_batch(unit, 10.0, 10.0)
    unit.offer("router", with_work(1, 5.0))
    assert admitted_ids(unit) == []
    unit.offer("router", with_work(2, 4.9))
    assert admitted_ids(unit) == [2]
    unit.check_integrity()


def test_a_request_of_a_better_class_is_admitted_to_a_full_batch_under_any_policy() -> None:
    unit = unit_with_paused(policy="fcfs")
    full_batch(unit, 1.0, 1.0)
    unit.offer("router", with_work(1, 0.1))
    assert admitted_ids(unit) == []
    unit.offer("router", with_work(2, 99.0, priority=-1))
    assert admitted_ids(unit) == [2]


def test_what_running_sequences_have_left_decides_about_a_request() -> None:
    unit = unit_with_paused()
    leases = full_batch(unit, 10.0, 10.0)
    unit.offer("router", with_work(1, 4.0))
    unit.report({lease.ref.lease_id: SequenceProgress(True, 7.0, 3.0) for lease in leases})
    assert admitted_ids(unit) == []
    unit.report({leases[0].ref.lease_id: SequenceProgress(True, 9.0, 3.0)})  # predicted again
    assert admitted_ids(unit) == [1]


def test_a_sequence_that_was_displaced_often_in_earlier_attempts_is_no_victim() -> None:
    unit = unit_with_paused(max_num_seqs=1)
    prefill, decode = (unit.ready_workers(role, "a")[0].name for role in Role)
    again = with_work(1, 10.0)
    unit.offer("router", replace(again, scheduling=replace(again.scheduling, num_preemptions=MAX_PREEMPTIONS)))
    (issued,) = schedule(unit).credits
    lease = unit.move(unit.acquire(issued.lease.ref, prefill).ref, prefill, decode, 7, (1,))
    unit.offer("router", with_work(2, 1.0))
    assert admitted_ids(unit) == []
    unit.report({lease.ref.lease_id: SequenceProgress(True, 9.0, 1.0)})  # its worker has not reported the number yet
    assert admitted_ids(unit) == []


def test_displaced_sequences_are_limited_and_return_before_requests_that_follow_them() -> None:
    unit = unit_with_paused(paused=1)
    first, second = full_batch(unit, 10.0, 10.0)
    unit.offer("router", with_work(1, 1.0))
    unit.offer("router", with_work(2, 1.5))
    assert admitted_ids(unit) == [1], "one more sequence may be resident"
    unit.report({first.ref.lease_id: SequenceProgress(False, 6.0, 4.0)})
    decode = unit.ready_workers(Role.DECODE, "a")[0].name
    unit.admission.withdraw("router", 2)
    unit.release(second.ref, decode)
    unit.offer("router", with_work(3, 5.0))
    assert admitted_ids(unit) == [], "the free slot is the displaced sequence's"
    unit.check_integrity()


def test_a_displaced_sequence_grows() -> None:
    unit = unit_with_paused()
    (lease, _) = full_batch(unit, 10.0, 10.0)
    unit.report({lease.ref.lease_id: SequenceProgress(False, 6.0, 4.0)})
    decode = unit.ready_workers(Role.DECODE, "a")[0].name
    assert unit.grow(lease.ref, decode, 1) is not None
    unit.check_integrity()


def test_reports_of_leases_that_have_ended_are_ignored() -> None:
    unit = unit_with_paused()
    unit.report({99: SequenceProgress(False, 1.0, 1.0)})
    unit.check_integrity()


def test_a_paused_sequence_gives_its_memory_to_a_request_that_precedes_it() -> None:
    unit = unit_with_paused()
    first, second = full_batch(unit, 10.0, 10.0)
    unit.report({first.ref.lease_id: SequenceProgress(False, 6.0, 4.0)})
    decode = unit.ready_workers(Role.DECODE, "a")[0].name
    assert unit.grow(second.ref, decode, num_free_blocks(unit)) is not None
    assert schedule(unit).preemptions == []
    unit.offer("router", with_work(2, 4.0))
    decisions = schedule(unit, now_s=RECLAIM_EVERY_S)
    assert decisions.preemptions == [PreemptionRequest(decode, first.ref.lease_id, PreemptionReason.KV_ADMISSION)]
    assert decisions.credits == []
    assert schedule(unit, now_s=1.5 * RECLAIM_EVERY_S).preemptions == [], "it is told once, and again if it stays"
    assert unit.next_change_s() == 2 * RECLAIM_EVERY_S
    unit.release(first.ref, decode)
    assert admitted_ids(unit) == [2]
    unit.check_integrity()


def num_free_blocks(unit: Unit) -> int:
    return unit.pool.capacity_blocks("a") - unit.blocks.num_in_use("a")


def test_a_long_request_does_not_keep_short_ones_from_a_full_batch() -> None:
    """Under an aged order the oldest is first, though it displaces none."""
    unit = unit_with_paused(order=SchedulingPolicy("srtf-aged", 100.0, 1e9, 1.0))
    full_batch(unit, 20.0, 20.0)
    old = SchedulingState(0, -500.0, decode_s=15.0, mean_work_s=1.0)
    unit.offer("router", QueuedRequest(1, "a", old, KvDemand(8, 8)))
    unit.offer("router", QueuedRequest(2, "a", replace(old, arrived_at_s=0.0, decode_s=0.1), KvDemand(8, 8)))
    assert admitted_ids(unit) == [2]


def full_pool(*remaining_s: float, left_s: float) -> tuple[Unit, str, Lease, Lease]:
    """A paused sequence with ``left_s`` of work, and one that has all other memory; their unit and decode worker."""
    unit = unit_with_paused()
    paused, computing = full_batch(unit, *remaining_s)
    unit.report({paused.ref.lease_id: SequenceProgress(False, left_s, 1.0)})
    decode = unit.ready_workers(Role.DECODE, "a")[0].name
    assert unit.grow(computing.ref, decode, num_free_blocks(unit)) is not None
    return unit, decode, paused, computing


def test_a_growing_sequence_takes_the_memory_of_a_paused_one_that_follows_it() -> None:
    unit, decode, paused, computing = full_pool(10.0, 5.0, left_s=9.0)
    assert unit.grow(computing.ref, decode, 1) is None
    assert schedule(unit).preemptions == [PreemptionRequest(decode, paused.ref.lease_id, PreemptionReason.KV_GROWTH)]
    unit.leases.release(paused.ref, decode)
    assert unit.grow(computing.ref, decode, 1) is not None
    assert schedule(unit, now_s=1.0).preemptions == []


def test_a_growing_sequence_that_follows_all_paused_ones_takes_no_memory_of_them() -> None:
    unit, decode, _, computing = full_pool(4.0, 5.0, left_s=3.0)
    assert unit.grow(computing.ref, decode, 1) is None
    assert schedule(unit).preemptions == []


def test_while_a_request_waits_for_a_slot_the_unit_looks_again_what_has_changed() -> None:
    unit = unit_with_paused()
    leases = full_batch(unit, 10.0, 10.0)
    unit.offer("router", with_work(1, 6.0))
    assert schedule(unit).credits == [] and unit.next_change_s() == SLOT_CHECK_EVERY_S
    schedule(unit, now_s=0.05)
    assert unit.next_change_s() == SLOT_CHECK_EVERY_S, "other changes do not put it off"
    unit.report({leases[0].ref.lease_id: SequenceProgress(True, 12.5, 3.0)})
    assert admitted_ids(unit, SLOT_CHECK_EVERY_S) == [1]
    assert unit.next_change_s() != SLOT_CHECK_EVERY_S
