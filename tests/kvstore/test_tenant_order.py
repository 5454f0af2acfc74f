"""The standings of queued requests and leases of a unit with several tenants."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.preemption_costs import KvCosts
from kvstore.sequence_progress import SequenceProgress
from kvstore.tenant_order import UPDATE_EVERY_S, group_of
from kvstore.unit import AdmissionDecisions, Unit
from kvstore.unit_model import UnitModel
from muxmesh.fairness import Fairness
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import StepCost
from muxmesh.types import SOLE_TENANT, KvDemand, QueuedRequest, SchedulingState, TenantStanding
from tests.kvstore.small_unit import SHAPES, SLAB_BYTES, attach_ready

SLOTS = 8


@pytest.mark.parametrize(
    ("lead", "part", "is_only", "group"),
    [(0.0, 0.0, False, 0), (0.0, 0.0, True, -1), (0.9, 0.0, True, -1), (1.0, 0.0, True, 0), (0.0, 0.25, False, 1),
     (0.0, 1.0, False, 4), (2.5, 0.5, False, 4)],
)  # fmt: skip
def test_a_group_is_the_lead_in_bands_and_the_slots_before(lead: float, part: float, is_only: bool, group: int) -> None:
    assert group_of(lead, part, is_only) == group


def test_a_group_ends_half_a_band_below_its_beginning() -> None:
    assert [group_of(lead, 0.0, False, before=1) for lead in (2.0, 1.9, 1.0, 0.6, 0.5, 0.49)] == [2, 1, 1, 1, 1, 0]


@given(st.floats(0, 100), st.floats(0, 50), st.booleans(), st.integers(-1, 500))
def test_a_kept_group_is_never_further_off_than_the_hysteresis(
    lead: float, part: float, is_only: bool, before: int
) -> None:
    new, kept = group_of(lead, part, is_only), group_of(lead, part, is_only, before)
    assert kept in (new, new + 1)


class Tenants:
    """A unit of one model with eight slots, whose decode worker does nothing by itself."""

    def __init__(self, max_wait_s: float = math.inf, fairness: Fairness | None = Fairness(1.0)) -> None:  # noqa: B008
        policy = replace(FCFS, max_wait_s=max_wait_s)
        model = UnitModel(SHAPES["a"], SLOTS, 512, max_resident_seqs=2 * SLOTS)
        self.unit = Unit(64 * SLAB_BYTES, SLAB_BYTES, {"a": model}, policy=policy, fairness=fairness)
        self.prefill, self.decode = attach_ready(self.unit, "a")
        self.last_entry = 0

    def offer(self, tenant: str, number: int = 1, priority: int = 0, at_s: float = 0.0, weight: float = 1.0) -> None:
        for _ in range(number):
            self.last_entry += 1
            state = SchedulingState(priority, at_s + self.last_entry * 1e-6, decode_s=1.0)
            self.unit.offer("r", QueuedRequest(self.last_entry, "a", state, KvDemand(8, 8), tenant, weight))

    def schedule(self, now_s: float = 0.0) -> AdmissionDecisions:
        return self.unit.schedule(now_s, now_s)

    def admit_to_decode(self, now_s: float = 0.0) -> int:
        """Schedules, and takes those that are admitted to the decode worker; returns their number."""
        issued = self.schedule(now_s).credits
        for credit in issued:
            lease = self.unit.acquire(credit.lease.ref, self.prefill)
            self.unit.move(lease.ref, self.prefill, self.decode, 7, (1,))
        return len(issued)

    def queued_standings(self, tenant: str) -> list[TenantStanding]:
        entries = self.unit.admission._entries.values()
        return [one.request.scheduling.standing for one in entries if one.request.tenant == tenant]

    def leased_standings(self, tenant: str) -> list[TenantStanding]:
        records = self.unit.leases.records()
        return [one.scheduling.standing for one in records if one.payer.tenant == tenant]


def test_a_sole_tenant_has_no_standing() -> None:
    tenants = Tenants()
    tenants.offer("a", 20)
    tenants.admit_to_decode()
    assert {*tenants.queued_standings("a"), *tenants.leased_standings("a")} == {SOLE_TENANT}


def test_without_fairness_tenants_are_not_told_apart() -> None:
    tenants = Tenants(fairness=None)
    tenants.offer("a", 20)
    tenants.offer("b")
    tenants.admit_to_decode()
    assert {*tenants.queued_standings("a"), *tenants.queued_standings("b")} == {SOLE_TENANT}


def test_each_quarter_of_the_slots_is_a_group() -> None:
    tenants = Tenants()
    tenants.offer("a", 6)
    tenants.offer("b", 5, weight=2.0)
    tenants.schedule()
    groups = [standing.group for standing in tenants.leased_standings("a") + tenants.queued_standings("a")]
    assert groups == [-1, 0, 1, 1, 2, 2]
    groups = [standing.group for standing in tenants.leased_standings("b") + tenants.queued_standings("b")]
    assert groups == [-1, 0, 0, 0, 1], "it has twice the weight"


def test_slots_are_divided_by_weight() -> None:
    tenants = Tenants()
    tenants.offer("a", 20)
    tenants.offer("b", 20, weight=3.0)
    tenants.schedule()
    assert (len(tenants.leased_standings("a")), len(tenants.leased_standings("b"))) == (2, 6)


def test_a_newcomer_displaces_the_last_ones_of_a_flood_of_the_best_class() -> None:
    tenants = Tenants()
    tenants.offer("flood", 30, priority=-1)
    assert tenants.admit_to_decode() == SLOTS
    tenants.offer("b", 6, priority=5)
    assert [credit.entry_id for credit in tenants.schedule().credits] == [31, 32, 33, 34], "half of the batch"
    groups = [standing.group for standing in tenants.leased_standings("flood")]
    assert groups == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_newcomer_claims_slots_of_sequences_in_prefill() -> None:
    tenants = Tenants()
    tenants.offer("flood", 30, priority=-1)
    assert len(tenants.schedule().credits) == SLOTS
    tenants.offer("b", 1)
    assert [credit.entry_id for credit in tenants.schedule().credits] == [31]


def test_a_second_request_of_a_class_that_is_not_the_best_follows_those_of_its_tenant() -> None:
    tenants = Tenants()
    tenants.offer("a", SLOTS)
    tenants.admit_to_decode()
    tenants.offer("b", 1, priority=2)
    tenants.offer("b", 1, priority=1)
    assert tenants.schedule().credits[0].entry_id == SLOTS + 2


def test_workers_are_told_what_has_changed_and_only_that() -> None:
    tenants = Tenants()
    tenants.offer("a", SLOTS)
    tenants.admit_to_decode()
    tenants.offer("b", 1)
    changes = tenants.schedule().standings
    assert {change.worker for change in changes} == {tenants.decode}
    assert [(one.standing.group, one.lease_ids) for one in sorted(changes, key=lambda one: one.standing.group)] == [
        (0, (1, 2)), (1, (3, 4)), (2, (5, 6)), (3, (7, 8))
    ]  # fmt: skip
    assert tenants.schedule(UPDATE_EVERY_S).standings == []


def test_a_decode_worker_is_told_of_what_changed_while_its_lease_was_in_prefill() -> None:
    tenants = Tenants()
    tenants.offer("a", 1)
    (credit,) = tenants.schedule().credits
    lease = tenants.unit.acquire(credit.lease.ref, tenants.prefill)
    tenants.offer("b", 1)
    (change,) = tenants.schedule().standings
    assert (change.worker, change.lease_ids) == (tenants.prefill, (lease.ref.lease_id,))
    tenants.unit.move(lease.ref, tenants.prefill, tenants.decode, 7, (1,))
    (told,) = tenants.unit.leases.take_standing_changes()
    assert (told.worker, told.standing) == (tenants.decode, change.standing)


def test_the_last_tenant_is_as_without_tenants_again() -> None:
    tenants = Tenants()
    tenants.offer("a", 12)
    tenants.offer("b", 1)
    tenants.schedule()
    for key in list(tenants.unit.admission.waiting):
        if tenants.unit.admission._entries[key].request.tenant == "b":
            tenants.unit.admission.withdraw(*key)
    for record in [one for one in tenants.unit.leases.records() if one.payer.tenant == "b"]:
        tenants.unit.release(record.lease.ref, record.owner)
    tenants.schedule(UPDATE_EVERY_S)
    assert {*tenants.queued_standings("a"), *tenants.leased_standings("a")} == {SOLE_TENANT}


def test_overdue_requests_of_a_flood_take_a_quarter_of_the_slots_before_others() -> None:
    tenants = Tenants(max_wait_s=10.0)
    tenants.offer("flood", 30)
    tenants.offer("b", 30, at_s=11.0)
    tenants.schedule(12.0)
    lane = [one.has_overdue_lane for one in tenants.queued_standings("flood") + tenants.leased_standings("flood")]
    assert sum(lane) == SLOTS // 4
    assert (len(tenants.leased_standings("flood")), len(tenants.leased_standings("b"))) == (4, 4)


def test_the_service_of_a_sequence_is_charged_as_it_is_reported_and_at_its_end() -> None:
    tenants = Tenants()
    tenants.offer("a", 2)
    tenants.admit_to_decode()
    first = next(iter(tenants.unit.leases.records()))
    tenants.unit.report({first.lease.ref.lease_id: SequenceProgress(True, 0.5, served_s=4.0)})
    assert tenants.unit.tenant_use()["a"].service_s == 4.0 / SLOTS
    tenants.unit.release(first.lease.ref, tenants.decode, served_s=6.0)
    assert tenants.unit.tenant_use()["a"].service_s == 6.0 / SLOTS
    assert tenants.unit.tenant_use()["a"].num_running == 1


def test_a_prefill_is_charged_once_by_its_tokens_that_were_not_cached() -> None:
    tenants = Tenants()
    cost = KvCosts(prefill=StepCost(0.1, 0.001, 0.0))
    tenants.unit.reclaim.costs_of = lambda model: cost
    demand = KvDemand(100, 100, num_known_tokens=100)
    for entry_id, served_s in ((1, 0.0), (2, 3.0)):
        state = SchedulingState(0, 0.0, served_s=served_s)
        tenants.unit.offer("r", QueuedRequest(entry_id, "a", state, demand, "a"))
    for credit in tenants.schedule().credits:
        tenants.unit.acquire(credit.lease.ref, tenants.prefill)
    budget = tenants.unit.models["a"].prefill_token_budget
    token_s = (0.1 + 0.001 * budget) / budget
    assert tenants.unit.tenant_use()["a"].service_s == pytest.approx(100 * token_s), "the other one is computed again"


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, 4), st.booleans()), max_size=25))
def test_no_entry_starves_whatever_the_others_send(events: list[tuple[str, int, int, bool]]) -> None:
    """Random arrivals; sequences end in the order of their leases. Every request is admitted in the end."""
    tenants, now_s = Tenants(), 0.0
    for tenant, priority, number, ends in events:
        now_s += 0.05
        tenants.offer(tenant, number, priority, now_s)
        tenants.admit_to_decode(now_s)
        if ends and len(tenants.unit.leases):
            record = next(iter(tenants.unit.leases.records()))
            tenants.unit.release(record.lease.ref, record.owner, served_s=1.0)
        tenants.unit.check_integrity()
    while len(tenants.unit.leases):
        now_s += 0.05
        record = next(iter(tenants.unit.leases.records()))
        tenants.unit.release(record.lease.ref, record.owner, served_s=1.0)
        tenants.admit_to_decode(now_s)
        tenants.unit.check_integrity()
    assert not tenants.unit.admission.waiting
    assert not tenants.unit.tenant_use()
