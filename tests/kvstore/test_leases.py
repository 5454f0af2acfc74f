"""Leases: every operation in every state, owners and epochs, and what a lease holds."""

import copy
import re
from collections.abc import Callable

import pytest

from kvstore import leases
from kvstore.leases import TRANSITIONS, Assignment, LeaseState, LeaseTable
from kvstore.sequence_progress import SequenceProgress
from muxmesh.block_hashes import block_hashes
from muxmesh.errors import LeaseLost
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, LeaseRef
from tests.kvstore.small_lease_table import BLOCK_SIZE, NUM_PAGES, OPERATIONS, SmallUnit

HASHES = block_hashes(range(10 * BLOCK_SIZE), BLOCK_SIZE, b"root")

CALLS: dict[str, Callable[[LeaseTable, LeaseRef, str], object]] = {
    **OPERATIONS,
    "release": lambda table, ref, owner: table.release(ref, owner),
}
OWNER_CALLS = [name for name in CALLS if name not in ("acquire", "begin_swap_in")]
HAS_PAGES = (LeaseState.SWAPPING_OUT, LeaseState.SWAPPED, LeaseState.SWAPPING_IN)
HAS_COMPUTED_BLOCKS = (LeaseState.RESIDENT, LeaseState.PAUSED, LeaseState.SWAPPING_OUT)


@pytest.fixture
def unit() -> SmallUnit:
    return SmallUnit()


def documented_transitions() -> dict[str, dict[LeaseState, LeaseState]]:
    """The table at the head of the module."""
    found: dict[str, dict[LeaseState, LeaseState]] = {}
    for line in (leases.__doc__ or "").splitlines():
        columns = re.split(r"\s{2,}", line.strip())
        if columns[0] in OPERATIONS:
            before, after = columns[1].split(", "), LeaseState(columns[2])
            found.setdefault(columns[0], {}).update({LeaseState(state): after for state in before})
    return found


# Operations and states


def test_the_documented_table_is_the_table_of_transitions() -> None:
    assert documented_transitions() == TRANSITIONS


@pytest.mark.parametrize("state", LeaseState)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_allowed_exactly_in_the_states_of_the_documented_table(
    unit: SmallUnit, operation: str, state: LeaseState
) -> None:
    ref, owner = unit.in_state(state)
    after = documented_transitions()[operation].get(state)
    before = copy.copy(unit.table._records[ref.lease_id])
    if after is None:
        with pytest.raises(LeaseLost, match=rf"^lease 1 is {state}; {operation} needs "):
            OPERATIONS[operation](unit.table, ref, owner)
        assert unit.table._records[ref.lease_id] == before, "a refused operation changes nothing"
    else:
        OPERATIONS[operation](unit.table, ref, owner)
        assert unit.table._records[ref.lease_id].state is after
    unit.table.check_integrity()


@pytest.mark.parametrize("state", LeaseState)
def test_a_lease_is_released_in_any_state_and_frees_all_that_it_holds(unit: SmallUnit, state: LeaseState) -> None:
    ref, owner = unit.in_state(state)
    unit.table.release(ref, owner)
    unit.check(blocks=0, pages=0, num_leases=0)


@pytest.mark.parametrize("state", LeaseState)
def test_a_lease_holds_blocks_and_pages_according_to_its_state(unit: SmallUnit, state: LeaseState) -> None:
    unit.in_state(state)
    unit.check(blocks=0 if state is LeaseState.SWAPPED else 3, pages=2 if state in HAS_PAGES else 0, num_leases=1)


def test_an_error_names_all_states_that_the_operation_needs(unit: SmallUnit) -> None:
    ref, owner = unit.in_state(LeaseState.SWAPPED)
    with pytest.raises(LeaseLost, match=r"^lease 1 is swapped; begin_swap_out needs resident or paused$"):
        unit.table.begin_swap_out(ref, owner, 1)


# Owners and epochs


@pytest.mark.parametrize("operation", OWNER_CALLS)
def test_an_operation_of_another_owner_is_refused(unit: SmallUnit, operation: str) -> None:
    ref, _ = unit.in_state(LeaseState.RESIDENT)
    with pytest.raises(LeaseLost, match=r"^lease 1 belongs to prefill, not stranger$"):
        CALLS[operation](unit.table, ref, "stranger")
    unit.check(blocks=3, pages=0, num_leases=1)


@pytest.mark.parametrize("operation", CALLS)
def test_an_operation_with_the_epoch_of_an_earlier_owner_is_refused(unit: SmallUnit, operation: str) -> None:
    issued = unit.credit()
    unit.table.acquire(issued.ref, "prefill")
    with pytest.raises(LeaseLost, match=r"^lease 1 is at epoch 2, not 1$"):
        CALLS[operation](unit.table, issued.ref, "router")


@pytest.mark.parametrize("operation", CALLS)
def test_an_operation_on_an_ended_lease_is_refused(unit: SmallUnit, operation: str) -> None:
    lease = unit.resident()
    unit.table.release(lease.ref, "decode")
    with pytest.raises(LeaseLost, match=r"^lease 1 does not exist or has ended$"):
        CALLS[operation](unit.table, lease.ref, "decode")


def test_only_a_change_of_owner_raises_the_epoch(unit: SmallUnit) -> None:
    issued = unit.credit()
    acquired = unit.table.acquire(issued.ref, "prefill")
    moved = unit.table.move(acquired.ref, "prefill", "decode", 24, ())
    assert [lease.ref for lease in (issued, acquired, moved)] == [LeaseRef(1, epoch) for epoch in (1, 2, 3)]
    for operation in (
        "grow",
        "pause",
        "resume",
        "begin_swap_out",
        "finish_swap_out",
        "begin_swap_in",
        "finish_swap_in",
    ):
        OPERATIONS[operation](unit.table, moved.ref, "decode")


def test_state_and_model_of_a_lease_are_for_its_owner_only(unit: SmallUnit) -> None:
    lease = unit.resident(model="other")
    assert unit.table.state_of(lease.ref, "decode") is LeaseState.RESIDENT
    assert unit.table.model_of(lease.ref, "decode") == "other"
    for read in (unit.table.state_of, unit.table.model_of):
        with pytest.raises(LeaseLost, match="belongs to decode, not router"):
            read(lease.ref, "router")


# Credits


def test_ids_continue_from_the_last_one_of_an_earlier_unit() -> None:
    unit = SmallUnit(last_id=41)
    assert [unit.credit().ref for _ in range(2)] == [LeaseRef(42, 1), LeaseRef(43, 1)]


def test_a_credit_that_the_pool_cannot_hold_is_not_issued(unit: SmallUnit) -> None:
    unit.credit(num_tokens=15 * BLOCK_SIZE)
    assert unit.try_credit(num_tokens=2 * BLOCK_SIZE) is None
    assert unit.try_credit(num_tokens=BLOCK_SIZE, max_new_slabs=0) is not None
    unit.check(blocks=16, pages=0, num_leases=2)


def test_a_credit_needs_no_more_slabs_than_allowed(unit: SmallUnit) -> None:
    assert unit.try_credit(num_tokens=9 * BLOCK_SIZE, max_new_slabs=1) is None
    assert unit.try_credit(num_tokens=8 * BLOCK_SIZE, max_new_slabs=1) is not None


def test_an_unused_credit_expires_at_its_time(unit: SmallUnit) -> None:
    unit.credit(expires_at_s=30.0)
    unit.credit(expires_at_s=20.0)
    assert unit.table.next_expiry_s() == 20.0
    assert unit.table.drop_expired(19.9) == 0
    assert unit.table.drop_expired(20.0) == 1
    assert unit.table.next_expiry_s() == 30.0
    assert (unit.table.drop_expired(1000.0), unit.table.num_expired) == (1, 2)
    unit.check(blocks=0, pages=0, num_leases=0)


def test_an_acquired_lease_does_not_expire(unit: SmallUnit) -> None:
    unit.resident()
    assert unit.table.next_expiry_s() is None
    assert unit.table.drop_expired(1e9) == 0


# The hand-off and the prefix cache


def test_the_hand_off_keeps_the_blocks_and_passes_what_was_computed_and_sampled(unit: SmallUnit) -> None:
    issued = unit.credit(num_tokens=30)
    acquired = unit.table.acquire(issued.ref, "prefill")
    moved = unit.table.move(acquired.ref, "prefill", "decode", 22, (7,))
    assert moved.block_ids == acquired.block_ids == issued.block_ids
    assert (moved.num_computed_tokens, moved.sampled_token_ids) == (22, (7,))
    assert (unit.table.of_owner("prefill"), unit.table.of_owner("decode")) == ([], [moved])
    assert unit.table.num_handoffs == 1


@pytest.mark.parametrize(("num_computed_tokens", "num_shared"), [(0, 0), (7, 0), (8, 1), (22, 2), (24, 3)])
def test_the_hand_off_publishes_the_full_computed_blocks(
    unit: SmallUnit, num_computed_tokens: int, num_shared: int
) -> None:
    first = unit.table.acquire(unit.credit(num_tokens=40, hashes=HASHES).ref, "prefill")
    unit.table.move(first.ref, "prefill", "decode", num_computed_tokens, ())
    second = unit.credit(num_tokens=40, hashes=HASHES)
    assert second.num_computed_tokens == num_shared * BLOCK_SIZE
    assert second.block_ids[:num_shared] == first.block_ids[:num_shared]
    assert not set(second.block_ids[num_shared:]) & set(first.block_ids)
    unit.check(blocks=10 - num_shared, pages=0, num_leases=2)


def test_blocks_that_are_not_computed_yet_are_not_shared(unit: SmallUnit) -> None:
    first = unit.table.acquire(unit.credit(hashes=HASHES).ref, "prefill")
    second = unit.credit(hashes=HASHES)
    assert second.num_computed_tokens == 0
    assert not set(second.block_ids) & set(first.block_ids)


def test_the_last_known_token_is_never_taken_from_the_prefix_cache(unit: SmallUnit) -> None:
    first = unit.resident(num_tokens=16)
    unit.table.release(first.ref, "decode", HASHES[:2])
    assert unit.credit(num_tokens=16, hashes=HASHES[:2]).num_computed_tokens == 8


@pytest.mark.parametrize("state", LeaseState)
@pytest.mark.parametrize("ending", ["release", "drop_owner"])
def test_an_ending_lease_publishes_its_blocks_if_they_hold_computed_kv(
    unit: SmallUnit, state: LeaseState, ending: str
) -> None:
    ref, owner = unit.in_state(state)
    if ending == "release":
        unit.table.release(ref, owner, HASHES[:2])
    else:
        assert unit.table.drop_owner(owner, {ref.lease_id: HASHES[:2]}) == 1
    unit.check(blocks=0, pages=0, num_leases=0)
    assert unit.blocks.count_cached("m", HASHES) == (2 if state in HAS_COMPUTED_BLOCKS else 0)


# Growth and pauses


def test_a_lease_grows_at_its_end(unit: SmallUnit) -> None:
    lease = unit.resident()
    added = unit.table.grow(lease.ref, "decode", 2)
    assert added is not None
    (grown,) = unit.table.of_owner("decode")
    assert grown.block_ids == lease.block_ids + added
    unit.check(blocks=5, pages=0, num_leases=1)


def test_a_lease_that_cannot_grow_stays_as_it_is(unit: SmallUnit) -> None:
    lease = unit.resident(num_tokens=8 * BLOCK_SIZE)
    assert unit.table.grow(lease.ref, "decode", 1, max_new_slabs=0) is None
    assert unit.table.grow(lease.ref, "decode", 9) is None
    assert unit.table.of_owner("decode") == [lease]


def decoding(unit: SmallUnit) -> LeaseRef:
    """A lease that prefill has handed off to its decode worker."""
    lease = unit.table.acquire(unit.credit().ref, "prefill")
    return unit.table.move(lease.ref, "prefill", "decode", 24, (7,)).ref


def test_a_decode_worker_reports_what_its_batch_has_and_how_much_is_left(unit: SmallUnit) -> None:
    ref = decoding(unit)
    (computed,) = unit.table.decoding_in("decode")
    unit.table.report(ref.lease_id, SequenceProgress(False, 3.5, 1.5, True, 2))
    assert unit.table.state_of(ref, "decode") is LeaseState.PAUSED
    assert unit.table.decoding_in("decode") == []
    state = unit.table.owned(ref, "decode").scheduling
    assert (state.decode_s, state.served_s, state.prefill_s) == (3.5, 1.5, 0.0)
    assert (computed.num_preemptions, computed.is_protected, computed.is_batched) == (2, True, False)
    unit.table.report(ref.lease_id, SequenceProgress(True))
    assert unit.table.decoding_in("decode") == [computed] and computed.is_batched
    assert unit.table.owned(ref, "decode").scheduling.decode_s == 3.5, "an unknown rest changes nothing"
    unit.table.check_integrity()


@pytest.mark.parametrize("state", LeaseState)
def test_a_report_of_a_lease_that_its_decode_worker_does_not_have_is_ignored(
    unit: SmallUnit, state: LeaseState
) -> None:
    ref, owner = unit.in_state(state)
    unit.table.report(ref.lease_id, SequenceProgress(False, 3.5, 1.5))
    unit.table.report(99, SequenceProgress(False, 3.5, 1.5))
    assert unit.table.state_of(ref, owner) is state


def test_a_lease_between_pool_and_swap_region_is_neither_paused_nor_resumed(unit: SmallUnit) -> None:
    ref = decoding(unit)
    unit.table.begin_swap_out(ref, "decode", SWAP_PAGE_BYTES)
    unit.table.report(ref.lease_id, SequenceProgress(False, 3.5, 1.5))
    assert unit.table.state_of(ref, "decode") is LeaseState.SWAPPING_OUT


def test_only_sequences_that_a_decode_worker_computes_are_decoding_in_it(unit: SmallUnit) -> None:
    unit.table.acquire(unit.credit().ref, "prefill")
    assert unit.table.decoding_in("decode") == []
    ref = decoding(unit)
    assert [record.lease.ref for record in unit.table.decoding_in("decode")] == [ref]
    unit.table.begin_swap_out(ref, "decode", SWAP_PAGE_BYTES)
    assert unit.table.decoding_in("decode") == []


def test_a_paused_lease_keeps_its_blocks_and_frees_its_slot_of_the_batch(unit: SmallUnit) -> None:
    lease = unit.resident()
    unit.table.pause(lease.ref, "decode")
    assert unit.table.of_owner("decode") == [lease]
    assert [counts["decode"] for counts in unit.table.count_assigned()] == [0, 1]
    unit.table.resume(lease.ref, "decode")
    assert [counts["decode"] for counts in unit.table.count_assigned()] == [1, 1]


# Swap


@pytest.mark.parametrize(("num_bytes", "num_pages"), [(1, 1), (SWAP_PAGE_BYTES, 1), (SWAP_PAGE_BYTES + 1, 2)])
def test_a_swap_out_allocates_pages_for_its_bytes(unit: SmallUnit, num_bytes: int, num_pages: int) -> None:
    lease = unit.resident()
    assert unit.table.begin_swap_out(lease.ref, "decode", num_bytes) == tuple(range(num_pages))
    unit.check(blocks=3, pages=num_pages, num_leases=1)


def test_a_swap_out_that_the_region_cannot_hold_leaves_the_lease_resident(unit: SmallUnit) -> None:
    lease = unit.resident()
    assert unit.table.begin_swap_out(lease.ref, "decode", NUM_PAGES * SWAP_PAGE_BYTES + 1) is None
    assert unit.table.state_of(lease.ref, "decode") is LeaseState.RESIDENT
    unit.check(blocks=3, pages=0, num_leases=1)


def test_a_swapped_lease_gets_other_blocks_and_frees_its_pages_once_they_are_filled(unit: SmallUnit) -> None:
    lease = unit.swapped()
    unit.check(blocks=0, pages=1, num_leases=1)
    allocated = unit.table.begin_swap_in(lease.ref, KvDemand(40, 64))
    assert allocated is not None
    assert (len(allocated.block_ids), allocated.num_cached) == (5, 0)
    unit.check(blocks=5, pages=1, num_leases=1)
    unit.table.finish_swap_in(lease.ref, "decode")
    unit.check(blocks=5, pages=0, num_leases=1)
    assert unit.table.of_owner("decode")[0].block_ids == allocated.block_ids


def test_a_swap_in_finds_blocks_that_are_still_cached(unit: SmallUnit) -> None:
    lease = unit.swapped(num_tokens=40, computed=HASHES[:4])
    allocated = unit.table.begin_swap_in(lease.ref, KvDemand(48, 64, HASHES, 39))
    assert allocated is not None
    assert (allocated.block_ids[:4], allocated.num_cached) == (lease.block_ids[:4], 4)


def test_a_swap_in_that_the_pool_cannot_hold_leaves_the_lease_swapped(unit: SmallUnit) -> None:
    lease = unit.swapped()
    unit.resident(num_tokens=14 * BLOCK_SIZE)
    assert unit.table.begin_swap_in(lease.ref, KvDemand(24, 24)) is None
    assert unit.table.state_of(lease.ref, "decode") is LeaseState.SWAPPED
    unit.check(blocks=14, pages=1, num_leases=2)


# Owners that are gone


def test_the_leases_of_one_owner_end_and_the_others_continue(unit: SmallUnit) -> None:
    unit.credit(router="r1")
    unit.credit(router="r1")
    kept = unit.credit(router="r2")
    assert unit.table.drop_owner("r1") == 2
    assert (unit.table.drop_owner("r1"), unit.table.num_orphaned) == (0, 2)
    assert unit.table.of_owner("r2") == [kept]
    unit.check(blocks=3, pages=0, num_leases=1)


def test_the_progress_of_an_exited_worker_counts_for_its_own_leases_only(unit: SmallUnit) -> None:
    own, foreign = unit.resident(worker="w1"), unit.resident(worker="w2")
    computed = {own.ref.lease_id: HASHES[:1], foreign.ref.lease_id: HASHES[1:3], 12345: HASHES[3:]}
    assert unit.table.drop_owner("w1", computed) == 1
    assert unit.blocks.count_cached("m", HASHES) == 1
    assert unit.blocks.count_cached("m", HASHES[1:]) == 0


# Counts


def test_leases_are_counted_by_owner_and_by_state(unit: SmallUnit) -> None:
    unit.resident(num_tokens=8)
    unit.swapped(num_tokens=8)
    unit.credit(num_tokens=8, model="other")
    assert unit.table.count_by_owner() == {"decode": 2, "router": 1}
    assert unit.table.count_states("m") == {LeaseState.RESIDENT: 1, LeaseState.SWAPPED: 1}
    assert unit.table.count_states("other") == {LeaseState.CREDIT: 1}


@pytest.mark.parametrize("state", LeaseState)
def test_until_the_hand_off_a_lease_counts_for_both_workers_that_it_is_assigned_to(
    unit: SmallUnit, state: LeaseState
) -> None:
    unit.in_state(state)
    batched, resident = unit.table.count_assigned()
    assert batched["prefill"] == batched["decode"] == (state not in (LeaseState.PAUSED, LeaseState.SWAPPED))
    assert resident["prefill"] == resident["decode"] == (state is not LeaseState.SWAPPED)


def test_after_the_hand_off_a_lease_counts_for_the_worker_that_has_it(unit: SmallUnit) -> None:
    acquired = unit.table.acquire(unit.credit().ref, "prefill")
    unit.table.move(acquired.ref, "prefill", "decode2", 24, ())
    for counts in unit.table.count_assigned():
        assert counts["decode2"] == 1 and counts["prefill"] == counts["decode"] == 0


def test_a_credit_that_another_prefill_worker_takes_counts_for_that_one(unit: SmallUnit) -> None:
    """A worker that has started again takes the credits of the one before it."""
    unit.table.acquire(unit.credit(assignment=Assignment("prefill#1", "decode")).ref, "prefill#2")
    for counts in unit.table.count_assigned():
        assert counts == {"prefill#2": 1, "decode": 1}


def test_workers_and_models_without_leases_are_not_counted(unit: SmallUnit) -> None:
    for name in ("decode#1", "decode#2", "decode#3"):  # each start has another name
        lease = unit.table.acquire(unit.credit(assignment=Assignment("prefill", name)).ref, "prefill")
        unit.table.move(lease.ref, "prefill", name, 24, ())
        unit.table.drop_owner(name)
    assert [len(counts) for counts in unit.table.count_assigned()] == [0, 0]
    assert unit.table.count_by_model() == {}


# Integrity


def test_integrity_finds_a_block_that_was_freed_behind_the_leases_back(unit: SmallUnit) -> None:
    lease = unit.resident()
    unit.blocks.free("m", lease.block_ids[:1])
    with pytest.raises(AssertionError, match="m: references differ from the leases"):
        unit.table.check_integrity()


def test_integrity_finds_a_page_that_was_freed_behind_the_leases_back(unit: SmallUnit) -> None:
    lease = unit.resident()
    unit.swap.free(unit.table.begin_swap_out(lease.ref, "decode", SWAP_PAGE_BYTES) or ())
    with pytest.raises(AssertionError, match="a swap page is lost or held twice"):
        unit.table.check_integrity()


@pytest.mark.parametrize(
    ("state", "wrong", "problem"),
    [
        (LeaseState.RESIDENT, LeaseState.SWAPPED, "wrong token blocks"),
        (LeaseState.RESIDENT, LeaseState.SWAPPING_IN, "wrong swap pages"),
        (LeaseState.SWAPPED, LeaseState.PAUSED, "wrong token blocks"),
        (LeaseState.SWAPPING_OUT, LeaseState.RESIDENT, "wrong swap pages"),
    ],
)
def test_integrity_finds_a_lease_whose_state_and_memory_differ(
    unit: SmallUnit, state: LeaseState, wrong: LeaseState, problem: str
) -> None:
    ref, _ = unit.in_state(state)
    unit.table._records[ref.lease_id].state = wrong
    with pytest.raises(AssertionError, match=f"lease 1 is {wrong}: {problem}"):
        unit.table.check_integrity()
