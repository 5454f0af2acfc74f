"""Counters of tenants: charges, weights, lifts, and their invariants under any sequence of events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.tenant_service import BEST_CLASS_HOLD_S, Payer, TenantService


def payer(tenant: str, weight: float = 1.0, slot_share: float = 0.25) -> Payer:
    return Payer(tenant, "m", weight, slot_share)


def both_running(weight_a: float = 1.0) -> TenantService:
    service = TenantService()
    service.lease(payer("a", weight_a), 0)
    service.lease(payer("b"), 0)
    service.settle(0.0)
    return service


def test_decode_steps_cost_the_slot_of_the_batch_and_prefills_the_whole_device() -> None:
    service = both_running()
    service.charge_decode(payer("a"), 8.0)
    service.charge_prefill(payer("a"), 1.0)
    service.settle(0.0)
    assert (service.lead_s("a"), service.lead_s("b")) == (3.0, 0.0)
    assert service.use(band_s=2.0)["a"].service_s == 3.0
    assert [service.use(band_s=2.0)[name].group for name in "ab"] == [1, 0]


def test_a_tenant_of_weight_2_is_charged_half() -> None:
    service = both_running(weight_a=2.0)
    service.charge_prefill(payer("a", 2.0), 4.0)
    service.settle(0.0)
    assert service.lead_s("a") == 2.0
    assert service.weight("a") == 2.0


def test_a_tenant_that_becomes_active_is_lifted_to_the_least_served_one() -> None:
    service = both_running()
    for name, served_s in (("a", 7.0), ("b", 5.0)):
        service.charge_prefill(payer(name), served_s)
    service.queue(payer("c"), 0)
    service.settle(0.0)
    assert [service.lead_s(name) for name in "abc"] == [2.0, 0.0, 0.0]


def test_a_tenant_that_had_the_unit_to_itself_has_no_lead_over_a_newcomer() -> None:
    service = TenantService()
    service.lease(payer("a"), 0)
    service.charge_prefill(payer("a"), 600.0)
    service.queue(payer("b"), 0)
    service.settle(0.0)
    assert (service.lead_s("a"), service.lead_s("b")) == (0.0, 0.0)
    service.charge_prefill(payer("a"), 1.0)
    service.settle(0.0)
    assert (service.lead_s("a"), service.lead_s("b")) == (1.0, 0.0)


def test_a_tenant_that_returns_has_no_credit_for_its_absence_and_keeps_its_lead() -> None:
    service = both_running()
    service.charge_prefill(payer("b"), 3.0)
    service.end_lease(payer("b"), 0)
    service.charge_prefill(payer("a"), 1.0)
    service.queue(payer("b"), 0)
    service.settle(0.0)
    assert service.lead_s("b") == 2.0, "it was 3 ahead, and is still ahead by what a has not caught up"
    service.unqueue(payer("b"), 0)
    service.charge_prefill(payer("a"), 9.0)
    service.queue(payer("b"), 0)
    service.settle(0.0)
    assert (service.lead_s("a"), service.lead_s("b")) == (0.0, 0.0)


def test_after_a_time_without_any_requests_all_tenants_are_equal() -> None:
    service = both_running()
    service.charge_prefill(payer("a"), 100.0)
    service.end_lease(payer("a"), 0)
    service.end_lease(payer("b"), 0)
    for name in "ba":
        service.queue(payer(name), 0)
    service.settle(0.0)
    assert (service.lead_s("a"), service.lead_s("b")) == (0.0, 0.0)


def test_requests_are_counted_by_tenant_and_model() -> None:
    service = TenantService()
    service.queue(payer("a"), 0)
    service.queue(Payer("a", "other"), 0)
    service.lease(payer("a"), 0)
    assert (service.count("a", "m"), service.count("a", "other"), service.count("b", "m")) == (2, 1, 0)
    assert service.use(1.0)["a"].num_queued == 2 and service.use(1.0)["a"].num_running == 1


def test_a_better_class_counts_at_once_and_for_a_while_after_its_last_request() -> None:
    service = TenantService()
    service.queue(payer("a"), 3)
    service.settle(0.0)
    assert service.best_priority("a") == 3 and not service.has_better_class
    service.queue(payer("a"), -1)
    assert service.has_better_class
    service.settle(1.0)
    service.unqueue(payer("a"), -1)
    service.settle(1.0 + BEST_CLASS_HOLD_S / 2)
    assert service.best_priority("a") == -1
    service.settle(1.0 + BEST_CLASS_HOLD_S)
    assert service.best_priority("a") == 3


def test_service_is_never_taken_back() -> None:
    service = both_running()
    with pytest.raises(AssertionError, match="never taken back"):
        service.charge_prefill(payer("a"), -1.0)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["queue", "admit", "withdraw", "charge", "end", "settle"]), st.sampled_from("abc"),
              st.floats(0.0, 3.0), st.integers(-2, 2)),
    max_size=80,
)  # fmt: skip


@given(EVENTS)
def test_the_counters_hold_their_invariants_whatever_happens(events: list[tuple[str, str, float, int]]) -> None:
    service, weights = TenantService(), {"a": 1.0, "b": 2.0, "c": 0.5}
    queued: dict[str, list[int]] = {name: [] for name in weights}
    leased: dict[str, list[int]] = {name: [] for name in weights}
    virtual_s = 0.0
    for kind, name, seconds, priority in events:
        one, leads = payer(name, weights[name]), {other: service.lead_s(other) for other in weights}
        if kind == "queue":
            service.queue(one, priority)
            queued[name].append(priority)
        elif kind == "admit" and queued[name]:
            admitted = queued[name].pop()
            service.lease(one, admitted)
            service.unqueue(one, admitted)
            leased[name].append(admitted)
        elif kind == "withdraw" and queued[name]:
            service.unqueue(one, queued[name].pop())
        elif kind == "end" and leased[name]:
            service.end_lease(one, leased[name].pop())
        elif kind == "charge" and leased[name]:
            service.charge_decode(one, seconds)
            assert service.lead_s(name) == pytest.approx(max(0.0, service._active[name].counter_s - service._virtual_s))
            assert all(service.lead_s(other) == leads[other] for other in weights if other != name)
        elif kind == "settle":
            service.settle(0.0)
            active = [other for other in weights if queued[other] or leased[other]]
            assert not active or min(service.lead_s(other) for other in active) == pytest.approx(0.0, abs=1e-9), (
                "one active tenant is the least served"
            )
        assert service._virtual_s >= virtual_s, "the virtual time never decreases"
        virtual_s = service._virtual_s
        service.check_integrity()
    assert service.num_active == sum(bool(queued[name] or leased[name]) for name in weights)
