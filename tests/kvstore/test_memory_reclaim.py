"""Who gives up token blocks, when, and by which way: on a unit with one model and two slots."""

import pytest

from kvstore.memory_reclaim import RECLAIM_EVERY_S, PreemptionRequest
from kvstore.preemption_costs import KvCosts
from kvstore.sequence_progress import SequenceProgress
from kvstore.unit import Unit
from kvstore.unit_model import UnitModel
from muxmesh.errors import Overloaded
from muxmesh.execution import PreemptionReason
from muxmesh.kv_cost import CopyRates
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.step_cost import StepCost
from muxmesh.types import (
    SWAP_PAGE_BYTES,
    KvDemand,
    Lease,
    PreemptionMode,
    QueuedRequest,
    Role,
    SchedulingState,
)
from tests.kvstore.small_unit import SHAPES, SLAB_BYTES, admitted_ids, attach_ready, schedule

FAST = CopyRates(1e12, 1e12)
SLOW = CopyRates(1.0, 1.0)

KV_GROWTH, KV_ADMISSION = PreemptionReason.KV_GROWTH, PreemptionReason.KV_ADMISSION


class FullUnit:
    """Two sequences of the batch hold the pool: ``first`` precedes ``second``."""

    def __init__(
        self, mode: PreemptionMode = "auto", first_s: float = 10.0, second_s: float = 20.0, max_paused_seqs: int = 2
    ) -> None:
        policy = SchedulingPolicy("srtf", 0.0, 0.0, 1.0)
        model = UnitModel(SHAPES["a"], 2, 512, max_resident_seqs=2 + max_paused_seqs)
        self.unit = Unit(
            8 * SLAB_BYTES, SLAB_BYTES, {"a": model}, swap_bytes=64 * SWAP_PAGE_BYTES, policy=policy,
            preemption_mode=mode,
        )  # fmt: skip
        attach_ready(self.unit, "a")
        self.prefill, self.decode = (self.unit.ready_workers(role, "a")[0].name for role in Role)
        self.first, self.second = self.decoding(100, first_s), self.decoding(101, second_s)
        num_free = self.unit.pool.capacity_blocks("a") - self.unit.blocks.num_in_use("a")
        assert self.unit.grow(self.first.ref, self.decode, num_free) is not None

    def decoding(self, number: int, work_s: float) -> Lease:
        """A sequence of the batch."""
        state = SchedulingState(0, 0.0, decode_s=work_s)
        self.unit.offer("router", QueuedRequest(number, "a", state, KvDemand(8, 8)))
        (issued,) = schedule(self.unit).credits
        acquired = self.unit.acquire(issued.lease.ref, self.prefill)
        return self.unit.move(acquired.ref, self.prefill, self.decode, 7, (1,))

    def set_costs(self, rates: CopyRates, token_s: float) -> None:
        """The unit has measured these."""
        self.unit.reclaim.costs_of = lambda model: KvCosts(rates, StepCost(0.0, token_s, 0.0))

    def pause(self, lease: Lease, work_s: float) -> None:
        """Its worker reports that it left the batch with ``work_s`` to do."""
        self.unit.report({lease.ref.lease_id: SequenceProgress(False, work_s, 1.0)})

    def claim(self, lease: Lease, now_s: float = 0.0) -> tuple[list[PreemptionRequest], bool]:
        """A growing sequence claims a block: the pre-emptions, and whether it is told to wait."""
        assert self.unit.grow(lease.ref, self.decode, 1, claims=True) is None
        return schedule(self.unit, now_s).preemptions, self.unit.reclaim.serves(lease.ref)


def test_a_growing_sequence_claims_the_blocks_of_the_last_of_the_batch() -> None:
    full = FullUnit()
    assert full.claim(full.first) == (
        [PreemptionRequest(full.decode, full.second.ref.lease_id, KV_GROWTH)],
        True,
    )
    assert full.claim(full.first) == ([], True), "it is being freed"
    asked_again = full.claim(full.first, RECLAIM_EVERY_S)
    assert asked_again == ([PreemptionRequest(full.decode, full.second.ref.lease_id, KV_GROWTH)], True)
    full.unit.release(full.second.ref, full.decode)
    assert full.unit.grow(full.first.ref, full.decode, 1, claims=True) is not None
    full.unit.check_integrity()


def test_the_last_in_order_claims_nothing() -> None:
    full = FullUnit()
    assert full.claim(full.second) == ([], False)


def test_of_two_outputs_of_one_request_the_first_claims_the_blocks_of_the_second() -> None:
    full = FullUnit("recompute", first_s=5.0, second_s=5.0)
    assert full.claim(full.second) == ([], False)
    assert full.claim(full.first) == ([PreemptionRequest(full.decode, full.second.ref.lease_id, KV_GROWTH)], True)
    full.unit.release(full.second.ref, full.decode)
    full.unit.offer("router", QueuedRequest(1, "a", SchedulingState(0, 0.0, decode_s=5.0), KvDemand(8, 8)))
    assert admitted_ids(full.unit) == [], "it would take its blocks back"
    assert full.unit.grow(full.first.ref, full.decode, 1, claims=True) is not None
    full.unit.check_integrity()


def test_without_a_claim_a_sequence_of_the_batch_keeps_its_blocks() -> None:
    full = FullUnit()
    assert full.unit.grow(full.first.ref, full.decode, 1) is None
    assert schedule(full.unit).preemptions == [] and not full.unit.reclaim.serves(full.first.ref)


@pytest.mark.parametrize("mode", ["auto", "keep", "swap", "recompute"])
def test_a_claim_is_served_in_every_mode(mode: PreemptionMode) -> None:
    full = FullUnit(mode)
    assert full.claim(full.first)[1]


@pytest.mark.parametrize(
    ("mode", "rates", "token_s", "is_swapped"),
    [
        ("auto", FAST, 1.0, True), ("auto", SLOW, 1e-6, False), ("swap", SLOW, 1e-6, True),
        ("recompute", FAST, 1.0, False), ("keep", SLOW, 1e-6, True),
    ],
)  # fmt: skip
def test_the_way_of_a_victim_follows_from_the_mode_and_the_measured_costs(
    mode: PreemptionMode, rates: CopyRates, token_s: float, is_swapped: bool
) -> None:
    full = FullUnit(mode)
    full.set_costs(rates, token_s)

    def swap_out() -> tuple[int, ...]:
        return full.unit.reclaim.begin_swap_out(full.second.ref, full.decode, SWAP_PAGE_BYTES, 0.0)

    if is_swapped:
        assert len(swap_out()) == 1
    else:
        with pytest.raises(Overloaded, match="costs less than a swap"):
            swap_out()
    full.unit.check_integrity()


def test_a_swap_region_that_is_too_full_is_said() -> None:
    full = FullUnit()
    with pytest.raises(Overloaded, match="fewer than"):
        full.unit.reclaim.begin_swap_out(full.second.ref, full.decode, 65 * SWAP_PAGE_BYTES, 0.0)


@pytest.mark.parametrize(
    ("mode", "first_s", "is_kept"), [("auto", 0.01, True), ("auto", 10.0, False), ("keep", 10.0, True)]
)
def test_a_request_waits_where_memory_will_be_free_sooner_than_a_victim_can_leave(
    mode: PreemptionMode, first_s: float, is_kept: bool
) -> None:
    full = FullUnit(mode, first_s)
    full.set_costs(CopyRates(SLAB_BYTES, SLAB_BYTES), 1.0)
    full.pause(full.second, 19.0)
    state = SchedulingState(0, 0.0, decode_s=first_s / 3)
    full.unit.offer("router", QueuedRequest(1, "a", state, KvDemand(8, 8)))
    preemptions = [] if is_kept else [PreemptionRequest(full.decode, full.second.ref.lease_id, KV_ADMISSION)]
    decisions = schedule(full.unit)
    assert (decisions.credits, decisions.preemptions) == ([], preemptions)
    if mode == "auto":
        assert full.unit.next_change_s() == RECLAIM_EVERY_S, "it is looked at again"
    full.unit.release(full.first.ref, full.decode)
    assert admitted_ids(full.unit) == [1]


def test_the_work_of_sequences_without_a_prediction_is_not_known_so_none_waits_for_them() -> None:
    full = FullUnit("auto", 0.0, 0.0)
    full.set_costs(SLOW, 1.0)
    full.pause(full.second, 0.0)
    full.unit.offer("router", QueuedRequest(1, "a", SchedulingState(-1, 0.0), KvDemand(8, 8)))
    assert schedule(full.unit).preemptions == [PreemptionRequest(full.decode, full.second.ref.lease_id, KV_ADMISSION)]


def test_the_expected_wait_counts_those_that_precede_it() -> None:
    full = FullUnit("auto", 4.0, 6.0)
    full.pause(full.second, 5.0)
    full.unit.offer("router", QueuedRequest(1, "a", SchedulingState(0, 0.0, decode_s=3.0), KvDemand(8, 8)))
    expect = full.unit.reclaim.expected_wait_s
    assert expect(full.decode, "a", SchedulingState(0, 0.0, decode_s=1.0), 0.0) == 0.0, "a slot is free"
    assert expect(full.decode, "a", SchedulingState(0, 0.0, decode_s=4.0), 0.0) == 3.0
    assert expect(full.decode, "a", SchedulingState(0, 0.0, decode_s=9.0), 0.0) == 4.0


def swapped_beside(full: FullUnit, batch_s: float) -> int:
    """The second sequence is swapped and waits, two others fill the batch with ``batch_s`` to do: its lease's id."""
    unit = full.unit
    pages = unit.reclaim.begin_swap_out(full.second.ref, full.decode, SWAP_PAGE_BYTES, 0.0)
    assert pages
    unit.leases.finish_swap_out(full.second.ref, full.decode)
    unit.release(full.first.ref, full.decode)
    for number in (1, 2):
        full.decoding(number, batch_s)
    unit.request_swap_in(full.second.ref, full.decode, KvDemand(8, 8), SchedulingState(0, 0.0, decode_s=19.0))
    return full.second.ref.lease_id


@pytest.mark.parametrize(("batch_s", "is_copied"), [(0.05, True), (9.0, False)])
def test_a_swapped_sequence_is_copied_back_shortly_before_its_turn(batch_s: float, is_copied: bool) -> None:
    full = FullUnit("swap")
    lease_id = swapped_beside(full, batch_s)
    assert [one.lease_id for one in schedule(full.unit).swap_ins] == ([lease_id] if is_copied else [])


def test_a_slow_copy_back_begins_earlier() -> None:
    full = FullUnit("swap")
    full.set_costs(CopyRates(SWAP_PAGE_BYTES / 10, SWAP_PAGE_BYTES / 10), 1.0)
    lease_id = swapped_beside(full, 9.0)
    assert [one.lease_id for one in schedule(full.unit).swap_ins] == [lease_id], "10 s for the copy"


def test_a_sequence_is_not_copied_back_early_where_no_more_may_be_resident() -> None:
    full = FullUnit("swap", max_paused_seqs=0)
    swapped_beside(full, 0.05)
    assert schedule(full.unit).swap_ins == []


def test_nothing_is_copied_back_early_while_the_work_of_the_batch_is_not_known() -> None:
    full = FullUnit("swap")
    swapped_beside(full, 0.0)
    assert schedule(full.unit).swap_ins == []


def test_only_a_claim_is_told_to_wait() -> None:
    full = FullUnit()
    full.pause(full.second, 19.0)
    assert full.unit.grow(full.first.ref, full.decode, 1) is None
    assert schedule(full.unit).preemptions == [PreemptionRequest(full.decode, full.second.ref.lease_id, KV_GROWTH)]
    assert not full.unit.reclaim.serves(full.first.ref)
    assert full.claim(full.first, RECLAIM_EVERY_S / 2) == ([], True), "the same one frees its blocks"


def test_a_victim_does_not_take_its_blocks_back_before_the_claim_has_them() -> None:
    full = FullUnit("swap")
    unit = full.unit
    assert full.claim(full.first)[1]
    unit.reclaim.begin_swap_out(full.second.ref, full.decode, SWAP_PAGE_BYTES, 0.0)
    unit.leases.finish_swap_out(full.second.ref, full.decode)
    unit.request_swap_in(full.second.ref, full.decode, KvDemand(8, 8), SchedulingState(0, 0.0, decode_s=19.0))
    unit.offer("router", QueuedRequest(1, "a", SchedulingState(0, 0.0, decode_s=15.0), KvDemand(8, 8)))
    unit.offer("router", QueuedRequest(2, "a", SchedulingState(-1, 0.0, decode_s=9.0), KvDemand(8, 8)))
    decisions = schedule(unit)
    assert [one.entry_id for one in decisions.credits] == [2] and not decisions.swap_ins, "it precedes the claim"
    unit.release(decisions.credits[0].lease.ref, "router")
    assert unit.grow(full.first.ref, full.decode, 1, claims=True) is not None
    unit.check_integrity()


def test_a_claim_whose_lease_has_ended_keeps_nobody_waiting() -> None:
    full = FullUnit()
    assert full.claim(full.first)[1]
    full.unit.release(full.first.ref, full.decode)
    full.unit.offer("router", QueuedRequest(1, "a", SchedulingState(0, 0.0, decode_s=15.0), KvDemand(8, 8)))
    assert admitted_ids(full.unit) == [1]


def test_other_changes_between_two_claims_do_not_ask_the_victim_more_often() -> None:
    full = FullUnit()
    assert full.claim(full.first)[0]
    for now_s in (0.02, 0.04, 0.06):
        schedule(full.unit, now_s)
        assert full.claim(full.first, now_s) == ([], True)
    assert full.unit.leases.owned(full.second.ref, full.decode).num_preemption_requests == 1


def test_a_victim_whose_copy_takes_long_is_not_asked_again_and_no_other_one_is() -> None:
    full = FullUnit("swap")
    assert full.claim(full.first)[0]
    full.unit.reclaim.begin_swap_out(full.second.ref, full.decode, SWAP_PAGE_BYTES, 0.0)
    for step in range(1, 60):
        assert full.claim(full.first, step * RECLAIM_EVERY_S) == ([], True)


def test_a_sequence_claims_nothing_from_itself_after_a_new_prediction() -> None:
    full = FullUnit()
    assert full.unit.grow(full.first.ref, full.decode, 1, claims=True) is None
    full.unit.report({full.first.ref.lease_id: SequenceProgress(True, 30.0, 1.0)})
    assert schedule(full.unit).preemptions == [] and not full.unit.reclaim.serves(full.first.ref)
