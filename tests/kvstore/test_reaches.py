"""Which requests would displace the sequences of decode workers, as leases change."""

import random
from dataclasses import replace

import pytest

from kvstore.block_table import BlockTable
from kvstore.leases import Assignment, LeaseState, LeaseTable
from kvstore.reaches import Reaches
from kvstore.sequence_progress import SequenceProgress
from kvstore.slab_pool import SlabPool
from kvstore.swap_space import SwapSpace
from muxmesh.batch_choice import Reach
from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.types import KvDemand, Lease, LeaseRef, SchedulingState

SRTF = SchedulingPolicy("srtf", 0.0, 0.0, 1.0)
SWAP_BYTES = 2**24


class Leases:
    """A lease table with room for many leases of one model, whose decode workers are `d0` and `d1`."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        blocks = BlockTable(SlabPool(1))
        blocks.add_model("m", 1000)
        self.table = LeaseTable(blocks, SwapSpace(SWAP_BYTES))
        self.refs: dict[LeaseRef, str] = {}

    def state(self) -> SchedulingState:
        return SchedulingState(self.rng.randint(-1, 1), 0.0, decode_s=self.rng.uniform(1, 100))

    def hand_off(self, decode: str) -> Lease:
        """A new lease that a decode worker computes."""
        credit = self.table.issue_credit("m", 8, KvDemand(8, 8), self.state(), "router", Assignment("p", decode), 30.0)
        assert credit is not None
        acquired = self.table.acquire(credit.ref, "p")
        lease = self.table.move(acquired.ref, "p", decode, 8, (1,))
        self.refs[lease.ref] = decode
        return lease

    def change(self) -> None:
        """A random change of one lease."""
        if not self.refs or self.rng.random() < 0.2:
            self.hand_off(f"d{self.rng.randint(0, 1)}")
            return
        ref = self.rng.choice(list(self.refs))
        owner = self.refs[ref]
        match self.table.state_of(ref, owner), self.rng.random():
            case _, chance if chance < 0.1:
                self.table.release(ref, owner)
                del self.refs[ref]
            case LeaseState.RESIDENT, chance if chance < 0.2:
                assert self.table.begin_swap_out(ref, owner, 1) is not None
                self.table.finish_swap_out(ref, owner)
            case LeaseState.SWAPPED, _:
                assert self.table.begin_swap_in(ref, KvDemand(8, 8)) is not None
            case LeaseState.SWAPPING_IN, _:
                self.table.finish_swap_in(ref, owner)
            case _:
                progress = SequenceProgress(
                    self.rng.random() < 0.7, self.rng.uniform(1, 100), 1.0, self.rng.random() < 0.2,
                    self.rng.randint(0, 4),
                )  # fmt: skip
                self.table.report(ref.lease_id, progress)

    def anew(self, decode: str, policy: SchedulingPolicy, unix_s: float) -> Reach:
        return Reach({one.lease.ref.lease_id: one for one in self.table.decoding_in(decode)}, policy, unix_s)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "max_wait_s"), [("srtf", float("inf")), ("hrrn", float("inf")), ("fcfs", 50.0)])
def test_the_reach_of_a_worker_is_that_of_what_it_computes_now(seed: int, name: PolicyName, max_wait_s: float) -> None:
    leases, policy = Leases(seed), replace(SRTF, name=name, max_wait_s=max_wait_s)
    reaches, num_displacing = Reaches(leases.table, policy), 0
    for step in range(400):
        leases.change()
        if leases.rng.random() < 0.2:
            decode, unix_s = f"d{leases.rng.randint(0, 1)}", float(step)
            found, anew = reaches.of(decode, unix_s), leases.anew(decode, policy, unix_s)
            for newcomer in [leases.state() for _ in range(4)]:
                expected = anew.may_displace_more_than(1, newcomer)
                assert found.may_displace_more_than(1, newcomer) == expected
                num_displacing += expected
    assert num_displacing
    leases.table.check_integrity()


def test_changes_are_told_once_and_not_at_all_when_they_are_too_many() -> None:
    leases = Leases(0)
    table = leases.table
    first, second = (leases.hand_off("d0") for _ in range(2))
    assert table.changes_in("d0") is None, "the first call"
    assert table.changes_in("d0") == {}
    table.report(first.ref.lease_id, SequenceProgress(True, 1.0))
    table.report(second.ref.lease_id, SequenceProgress(False, 1.0))
    leases.hand_off("d1")
    (record,) = table.decoding_in("d0")
    assert table.changes_in("d0") == {first.ref.lease_id: record, second.ref.lease_id: None}
    table.report(first.ref.lease_id, SequenceProgress(True, 1.0))
    assert table.changes_in("d0") == {}, "the same again"
    for _ in range(100):
        leases.hand_off("d0")
    assert table.changes_in("d0") is None


def test_a_worker_that_has_exited_is_forgotten() -> None:
    leases = Leases(0)
    reaches, held = Reaches(leases.table, SRTF), leases.hand_off("d0")
    newcomer = replace(leases.table.owned(held.ref, "d0").scheduling, decode_s=0.1)
    assert reaches.of("d0", 0.0).may_displace(newcomer)
    leases.table.drop_owner("d0")
    reaches.drop("d0")
    assert not reaches.of("d0", 0.0).may_displace(newcomer)
