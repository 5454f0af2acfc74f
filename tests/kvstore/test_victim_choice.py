import pytest

from kvstore.victim_choice import (
    MAX_PREEMPTION_REQUESTS,
    NO_LEASE,
    Victim,
    last_after,
    last_in_order,
    lease_order,
)
from muxmesh.scheduling_policy import FCFS, SortKey
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, LeaseRef, SchedulingState
from tests.kvstore.small_lease_table import SmallUnit


@pytest.fixture
def unit() -> SmallUnit:
    return SmallUnit()


def by_arrival(state: SchedulingState) -> SortKey:
    return FCFS.sort_key(state, 0.0)


def victim(unit: SmallUnit, *owners: str, models: tuple[str, ...] = ("m",)) -> int | None:
    """Id of the chosen victim among the leases of ``owners``."""
    return preempted(last_in_order([one for one in unit.table.of_models(models) if one.owner in owners], by_arrival))


def preempted(victim: Victim | None) -> int | None:
    """Id of a victim's lease, whose worker is asked once more to free its blocks."""
    if victim is None:
        return None
    assert victim.is_new == (victim.record.num_preemption_requests == 0)
    victim.record.num_preemption_requests += 1
    return victim.record.lease.ref.lease_id


def test_the_victim_is_the_last_resident_lease_in_order(unit: SmallUnit) -> None:
    for arrived_at_s in (3.0, 5.0, 4.0):
        unit.resident(num_tokens=8, arrived_at_s=arrived_at_s)
    unit.credit(num_tokens=8, arrived_at_s=9.0, router="decode")
    assert victim(unit, "decode") == 2


def test_a_paused_lease_is_the_victim_before_one_that_computes(unit: SmallUnit) -> None:
    paused = [unit.resident(num_tokens=8, arrived_at_s=arrived_at_s) for arrived_at_s in (1.0, 2.0)]
    unit.resident(num_tokens=8, arrived_at_s=9.0)
    for lease in paused:
        unit.table.pause(lease.ref, "decode")
    assert victim(unit, "decode") == paused[1].ref.lease_id


def test_only_leases_of_the_given_owners_and_models_are_victims(unit: SmallUnit) -> None:
    unit.resident(num_tokens=8, worker="d1", model="other")
    unit.resident(num_tokens=8, worker="d2", arrived_at_s=1.0)
    assert victim(unit, "d1") is None
    assert victim(unit, "d2", models=("other",)) is None
    assert victim(unit, "d1", "d2", models=("m", "other")) == 2


def test_the_same_victim_is_chosen_until_its_blocks_are_freed(unit: SmallUnit) -> None:
    first, second = unit.resident(arrived_at_s=1.0), unit.resident(arrived_at_s=2.0)
    assert victim(unit, "decode") == second.ref.lease_id
    unit.resident(arrived_at_s=3.0)
    assert victim(unit, "decode") == second.ref.lease_id, "not the one that is last by now"
    unit.table.begin_swap_out(second.ref, "decode", 1)
    assert victim(unit, "decode") == second.ref.lease_id, "its blocks are not free yet"
    unit.table.finish_swap_out(second.ref, "decode")
    assert victim(unit, "decode") == 3
    unit.table.release(LeaseRef(3, 2), "decode")
    assert victim(unit, "decode") == first.ref.lease_id


def test_another_victim_is_chosen_when_one_was_requested_too_often(unit: SmallUnit) -> None:
    unit.resident(arrived_at_s=1.0)
    unit.resident(arrived_at_s=2.0)
    chosen = [victim(unit, "decode") for _ in range(2 * MAX_PREEMPTION_REQUESTS + 1)]
    assert chosen == [2] * MAX_PREEMPTION_REQUESTS + [1] * MAX_PREEMPTION_REQUESTS + [None]


def test_a_swapped_lease_can_be_a_victim_again(unit: SmallUnit) -> None:
    lease = unit.resident()
    for _ in range(MAX_PREEMPTION_REQUESTS):
        victim(unit, "decode")
    assert victim(unit, "decode") is None
    unit.table.begin_swap_out(lease.ref, "decode", 1)
    unit.table.finish_swap_out(lease.ref, "decode")
    unit.table.begin_swap_in(lease.ref, KvDemand(24, 24))
    unit.table.finish_swap_in(lease.ref, "decode")
    assert victim(unit, "decode") == lease.ref.lease_id


def test_one_paused_lease_at_a_time_is_swapped_out_for_those_that_precede_it(unit: SmallUnit) -> None:
    first, second = (unit.resident(num_tokens=8, arrived_at_s=arrived_at_s) for arrived_at_s in (1.0, 2.0))
    for lease in (first, second):
        unit.table.pause(lease.ref, "decode")

    def victim_after(arrived_at_s: float) -> int | None:
        after = (by_arrival(SchedulingState(0, arrived_at_s)), NO_LEASE)
        return preempted(last_after(unit.table.of_models(["m"]), by_arrival, after, takes_batched=False))

    assert victim_after(2.0) is None
    assert victim_after(0.5) == second.ref.lease_id
    unit.table.begin_swap_out(second.ref, "decode", SWAP_PAGE_BYTES)
    assert victim_after(0.5) == second.ref.lease_id, "its memory is on the way, so no other one has to leave"
    unit.table.finish_swap_out(second.ref, "decode")
    assert victim_after(0.5) == first.ref.lease_id


def test_of_leases_of_equal_order_the_one_that_was_issued_later_follows(unit: SmallUnit) -> None:
    """Outputs of one request have the same order. If none followed another, each would give its blocks up to none."""
    first, second = (unit.resident(num_tokens=8) for _ in range(2))

    def victim_after(lease_id: float) -> int | None:
        record = unit.table.find(int(lease_id))
        after = (by_arrival(SchedulingState(0, 0.0)), NO_LEASE) if record is None else lease_order(record, by_arrival)
        return preempted(last_after(unit.table.of_models(["m"]), by_arrival, after, takes_batched=True))

    assert victim_after(0) is None, "a queued request does not precede a sequence of equal order"
    assert victim_after(second.ref.lease_id) is None
    assert victim_after(first.ref.lease_id) == second.ref.lease_id
