"""The order in which entries are admitted, quotas, and entries that come and go."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.admission import Admission, AdmissionEntry
from muxmesh.scheduling_policy import FCFS, PolicyName, SchedulingPolicy
from muxmesh.types import KvDemand, LeaseRef, QueuedRequest, SchedulingState

SRTF = SchedulingPolicy("srtf", longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)


def entry(
    entry_id: int,
    source: str = "r1",
    model: str = "a",
    num_tokens: int = 1,
    priority: int = 0,
    arrived_at_s: float = 0.0,
    decode_s: float = 0.0,
    swapped: LeaseRef | None = None,
) -> AdmissionEntry:
    scheduling = SchedulingState(priority, arrived_at_s, decode_s=decode_s)
    return AdmissionEntry(source, QueuedRequest(entry_id, model, scheduling, KvDemand(num_tokens, num_tokens)), swapped)


class Capacity:
    """Free slots and memory as plain numbers, in tokens. Models without a number have more than enough."""

    def __init__(
        self, memory: int = 1000, quotas: dict[str, int] | None = None, slots: dict[str, int] | None = None
    ) -> None:
        self.free, self.quotas, self.slots = memory, quotas or {}, slots or {}
        self.used = Counter[str]()
        self.admitted: list[tuple[str, int]] = []
        self.lent: list[int] = []

    def has_slot(self, candidate: AdmissionEntry) -> bool:
        return self.slots.get(candidate.model, 1) > 0

    def is_within_quota(self, candidate: AdmissionEntry) -> bool:
        needed = self.used[candidate.model] + candidate.request.demand.num_tokens
        return needed <= self.quotas.get(candidate.model, 1000)

    def try_admit(self, candidate: AdmissionEntry, lend: bool) -> bool:
        needed, model = candidate.request.demand.num_tokens, candidate.model
        assert lend or self.is_within_quota(candidate)
        assert self.has_slot(candidate)
        if needed > self.free:
            return False
        self.free -= needed
        self.used[model] += needed
        if model in self.slots:
            self.slots[model] -= 1
        self.admitted.append((candidate.source, candidate.request.entry_id))
        self.lent += [candidate.request.entry_id] * lend
        return True

    def admit(self, admission: Admission, unix_s: float = 0.0) -> bool:
        return admission.admit(
            unix_s, self.has_slot, self.is_within_quota, self.try_admit, lambda one, key: not self.has_slot(one)
        )

    @property
    def ids(self) -> list[int]:
        return [entry_id for _, entry_id in self.admitted]


def admission_of(*entries: AdmissionEntry, policy: SchedulingPolicy = FCFS) -> Admission:
    admission = Admission(policy)
    for one in entries:
        admission.offer(one)
    return admission


# Order


def test_entries_are_admitted_by_priority_then_arrival() -> None:
    admission = admission_of(
        entry(1, priority=0, arrived_at_s=5.0),
        entry(2, priority=0, arrived_at_s=3.0),
        entry(3, priority=-1, arrived_at_s=9.0),
        entry(4, priority=1, arrived_at_s=0.0),
    )
    capacity = Capacity()
    assert not capacity.admit(admission)
    assert capacity.ids == [3, 2, 1, 4]


def test_the_policy_orders_entries_of_one_priority() -> None:
    admission = admission_of(entry(1, decode_s=9.0), entry(2, decode_s=1.0), entry(3, decode_s=4.0), policy=SRTF)
    capacity = Capacity()
    capacity.admit(admission)
    assert capacity.ids == [2, 3, 1]


def test_the_time_of_admission_enters_a_policy_that_depends_on_it() -> None:
    hrrn = SchedulingPolicy("hrrn", longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
    entries = entry(1, arrived_at_s=0.0, decode_s=10.0), entry(2, arrived_at_s=9.0, decode_s=1.0)
    orders = []
    for unix_s in (9.5, 30.0):
        capacity = Capacity()
        capacity.admit(admission_of(*entries, policy=hrrn), unix_s)
        orders.append(capacity.ids)
    assert orders == [[1, 2], [2, 1]]


def test_an_overdue_entry_precedes_better_classes_and_shorter_ones() -> None:
    policy = replace(SRTF, max_wait_s=60.0)
    entries = (
        entry(1, priority=5, arrived_at_s=10.0, decode_s=99.0),
        entry(2, priority=-1, arrived_at_s=20.0, decode_s=1.0),
        entry(3, priority=5, arrived_at_s=9.0, decode_s=100.0),
    )
    orders = []
    for unix_s in (68.9, 69.0, 70.0):
        capacity = Capacity()
        capacity.admit(admission_of(*entries, policy=policy), unix_s)
        orders.append(capacity.ids)
    assert orders == [[2, 1, 3], [3, 2, 1], [3, 1, 2]]


def test_entries_of_several_routers_form_one_queue() -> None:
    arrivals = {("r1", 1): 1.0, ("r2", 1): 2.0, ("r1", 2): 3.0, ("r3", 1): 4.0, ("r2", 2): 5.0}
    admission = admission_of(
        *(entry(entry_id, source, arrived_at_s=at) for (source, entry_id), at in reversed(arrivals.items()))
    )
    capacity = Capacity(slots={"a": 3})
    capacity.admit(admission)
    assert capacity.admitted == [("r1", 1), ("r2", 1), ("r1", 2)]


def test_equal_entries_are_admitted_in_the_order_of_their_routers_and_ids() -> None:
    admission = admission_of(entry(2, "r2"), entry(9, "r1"), entry(1, "r2"), entry(3, "r1"))
    capacity = Capacity()
    capacity.admit(admission)
    assert capacity.admitted == [("r1", 3), ("r1", 9), ("r2", 1), ("r2", 2)]


def test_a_swapped_lease_has_its_position_among_the_queued_requests() -> None:
    admission = admission_of(
        entry(1, arrived_at_s=1.0),
        entry(7, "decode", arrived_at_s=2.0, swapped=LeaseRef(7, 3)),
        entry(2, arrived_at_s=3.0),
    )
    capacity = Capacity(slots={"a": 2})
    capacity.admit(admission)
    assert capacity.admitted == [("r1", 1), ("decode", 7)]


# Entries that come and go


def test_an_admitted_entry_leaves_and_the_others_stay() -> None:
    admission = admission_of(entry(1), entry(2), entry(3, model="b"))
    Capacity(slots={"a": 1, "b": 0}).admit(admission)
    assert (admission.count("a"), admission.count("b")) == (1, 1)
    second = Capacity()
    second.admit(admission)
    assert second.ids == [2, 3]


def test_an_entry_that_is_offered_again_replaces_the_earlier_one() -> None:
    admission = admission_of(entry(1, priority=5), entry(2), entry(1, priority=-1))
    assert admission.count("a") == 2
    capacity = Capacity()
    capacity.admit(admission)
    assert capacity.ids == [1, 2]


def test_equal_ids_of_two_routers_are_two_entries() -> None:
    admission = admission_of(entry(1, "r1"), entry(1, "r2"))
    admission.withdraw("r1", 1)
    capacity = Capacity()
    capacity.admit(admission)
    assert capacity.admitted == [("r2", 1)]


def test_the_withdrawal_of_an_unknown_entry_is_ignored() -> None:
    admission = admission_of(entry(1))
    admission.withdraw("r1", 2)
    admission.withdraw("r2", 1)
    assert admission.count("a") == 1


def test_all_entries_of_a_lost_router_are_dropped_and_no_others() -> None:
    admission = admission_of(entry(1, "r1"), entry(2, "r1", model="b"), entry(1, "r2"))
    admission.drop_source("r1")
    assert (admission.count("a"), admission.count("b")) == (1, 0)


def test_the_queued_requests_of_a_model_are_taken_and_its_swapped_leases_stay() -> None:
    swapped = entry(7, "decode", swapped=LeaseRef(7, 3))
    admission = admission_of(entry(1), swapped, entry(2, "r2"), entry(3, model="b"))
    assert sorted(taken.request.entry_id for taken in admission.take_requests("a")) == [1, 2]
    assert admission.take_requests("a") == []
    assert (admission.count("a"), admission.count("b")) == (1, 1)
    capacity = Capacity()
    capacity.admit(admission)
    assert sorted(capacity.admitted) == [("decode", 7), ("r1", 3)]


def test_overtaken_are_the_waiting_entries_of_one_model_and_priority_that_arrived_before() -> None:
    admission = admission_of(
        entry(1, arrived_at_s=1.0),
        entry(2, "r2", arrived_at_s=2.0),
        entry(3, arrived_at_s=3.0),
        entry(4, arrived_at_s=1.0, priority=-1),
        entry(5, arrived_at_s=1.0, priority=1),
        entry(6, arrived_at_s=1.0, model="b"),
        entry(7, arrived_at_s=9.0),
    )
    assert admission.num_overtaken(entry(3, arrived_at_s=3.0)) == 2
    admission.withdraw("r2", 2)
    assert admission.num_overtaken(entry(3, arrived_at_s=3.0)) == 1


# Free capacity


def test_a_model_without_slots_does_not_block_another() -> None:
    admission = admission_of(entry(1), entry(2, model="b"), entry(3))
    capacity = Capacity(slots={"a": 0})
    assert not capacity.admit(admission)
    assert capacity.ids == [2]


def test_an_entry_that_lacks_memory_blocks_the_later_ones_of_its_model_only() -> None:
    admission = admission_of(
        entry(1, num_tokens=8, arrived_at_s=1.0), entry(2, arrived_at_s=2.0), entry(3, model="b", arrived_at_s=3.0)
    )
    capacity = Capacity(memory=5)
    assert capacity.admit(admission), "an entry within its quota lacks memory"
    assert capacity.ids == [3]


def test_an_entry_past_its_quota_is_admitted_by_a_loan() -> None:
    admission = admission_of(entry(1, num_tokens=4), entry(2, num_tokens=4))
    capacity = Capacity(memory=8, quotas={"a": 5})
    assert not capacity.admit(admission)
    assert (capacity.ids, capacity.lent) == ([1, 2], [2])


def test_nothing_is_lent_while_an_entry_within_its_quota_lacks_memory() -> None:
    admission = admission_of(
        entry(1, model="a", num_tokens=2, priority=-1), entry(2, model="b", num_tokens=9, arrived_at_s=1.0)
    )
    capacity = Capacity(memory=5, quotas={"a": 1, "b": 9})
    assert capacity.admit(admission)
    assert capacity.ids == []


def test_an_entry_within_its_quota_goes_before_one_past_it_of_better_priority() -> None:
    admission = admission_of(entry(1, model="a", num_tokens=3, priority=-1), entry(2, model="b", num_tokens=3))
    capacity = Capacity(memory=4, quotas={"a": 2, "b": 3})
    assert not capacity.admit(admission)
    assert (capacity.ids, capacity.lent) == ([2], [])


def test_an_entry_past_its_quota_blocks_the_later_ones_of_its_model_though_these_would_fit_it() -> None:
    admission = admission_of(entry(1, num_tokens=9, arrived_at_s=1.0), entry(2, num_tokens=1, arrived_at_s=2.0))
    capacity = Capacity(memory=5, quotas={"a": 4})
    assert not capacity.admit(admission), "an entry past its quota claims nothing"
    assert capacity.ids == []


def test_a_loan_that_lacks_memory_ends_the_lending_for_all_models() -> None:
    admission = admission_of(
        entry(1, model="a", num_tokens=9, arrived_at_s=1.0), entry(2, model="b", num_tokens=2, arrived_at_s=2.0)
    )
    capacity = Capacity(memory=5, quotas={"a": 0, "b": 0})
    assert not capacity.admit(admission)
    assert capacity.ids == []


MODELS = ("a", "b", "c")
ENTRIES = st.builds(
    entry,
    entry_id=st.integers(0, 30),
    source=st.sampled_from(["r1", "r2"]),
    model=st.sampled_from(MODELS),
    num_tokens=st.integers(1, 9),
    priority=st.integers(-1, 1),
    arrived_at_s=st.integers(0, 9).map(float),
    decode_s=st.integers(0, 9).map(float),
)


@pytest.mark.parametrize("name", ["fcfs", "srtf", "hrrn"])
@given(
    st.lists(ENTRIES, max_size=15),
    st.integers(0, 40),
    st.tuples(*[st.integers(0, 20)] * 3),
    st.tuples(*[st.integers(0, 4)] * 3),
)
def test_of_each_model_the_first_entries_in_order_are_admitted(
    name: PolicyName,
    entries: list[AdmissionEntry],
    memory: int,
    quotas: tuple[int, int, int],
    slots: tuple[int, int, int],
) -> None:
    policy = SchedulingPolicy(name, longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
    admission = admission_of(*entries, policy=policy)
    waiting = {(one.source, one.request.entry_id): one for one in entries}
    capacity = Capacity(memory, dict(zip(MODELS, quotas, strict=True)), dict(zip(MODELS, slots, strict=True)))
    lacks_memory = capacity.admit(admission, 10.0)
    assert not (lacks_memory and capacity.lent)
    for model, num_slots in zip(MODELS, slots, strict=True):
        order = sorted(
            (key for key, one in waiting.items() if one.model == model),
            key=lambda key: (policy.sort_key(waiting[key].request.scheduling, 10.0), key),
        )
        admitted = [key for key in capacity.admitted if waiting[key].model == model]
        assert admitted == order[: len(admitted)]
        assert len(admitted) <= num_slots
        assert admission.count(model) == len(order) - len(admitted)
        if len(admitted) < len(order):
            first = waiting[order[len(admitted)]]
            has_memory = first.request.demand.num_tokens <= capacity.free
            assert not (capacity.has_slot(first) and capacity.is_within_quota(first) and has_memory)


def admit_by_sorting(entries: list[AdmissionEntry], policy: SchedulingPolicy, unix_s: float, of: Capacity) -> bool:
    """What `Admission.admit` promises, of all entries in one sorted list, from which it removes the admitted ones."""
    entries.sort(key=lambda one: (policy.sort_key(one.request.scheduling, unix_s), one.key))
    blocked, lacks_memory = set[str](), False
    for one in list(entries):
        if one.model in blocked or not of.has_slot(one):
            continue
        if of.is_within_quota(one) and of.try_admit(one, False):
            entries.remove(one)
        else:
            blocked.add(one.model)
            lacks_memory |= of.is_within_quota(one)
    if lacks_memory:
        return True
    for one in list(entries):
        if of.has_slot(one):
            if not of.try_admit(one, True):
                break
            entries.remove(one)
    return False


SWAPPED = st.builds(
    lambda one, lease_id, worker: entry(
        lease_id, worker, one.model, one.request.demand.num_tokens, swapped=LeaseRef(lease_id, 1)
    ),
    ENTRIES,
    st.integers(0, 9),
    st.sampled_from(["d1", "d2"]),
)
OPERATIONS = st.lists(
    st.one_of(
        ENTRIES,
        SWAPPED,
        st.tuples(st.sampled_from(["r1", "r2", "d1"]), st.integers(0, 30)),
        st.sampled_from(["r1", "d2"]),
        st.builds(Capacity, st.integers(0, 40), st.fixed_dictionaries(dict.fromkeys(MODELS, st.integers(0, 20)))),
    ),
    max_size=30,
)


@pytest.mark.parametrize("name", ["fcfs", "srtf", "hrrn"])
@given(OPERATIONS, st.fixed_dictionaries(dict.fromkeys(MODELS, st.integers(0, 4))))
def test_entries_that_come_and_go_between_admissions_are_admitted_as_from_one_sorted_list(
    name: PolicyName, operations: list[AdmissionEntry | tuple[str, int] | str | Capacity], slots: dict[str, int]
) -> None:
    """Offers, replacements by an entry of another model, withdrawals, sources that are lost, and admissions."""
    policy = SchedulingPolicy(name, longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
    admission, waiting = Admission(policy), dict[tuple[str, int], AdmissionEntry]()
    for unix_s, operation in enumerate([*operations, Capacity()]):
        if isinstance(operation, AdmissionEntry):
            admission.offer(operation)
            waiting[operation.key] = operation
        elif isinstance(operation, tuple):
            admission.withdraw(*operation)
            waiting.pop(operation, None)
        elif isinstance(operation, str):
            admission.drop_source(operation)
            waiting = {key: one for key, one in waiting.items() if one.source != operation}
        else:
            expected, entries = Capacity(operation.free, operation.quotas, dict(slots)), list(waiting.values())
            found = Capacity(operation.free, operation.quotas, dict(slots))
            assert found.admit(admission, unix_s) is admit_by_sorting(entries, policy, unix_s, expected)
            assert (found.admitted, found.lent) == (expected.admitted, expected.lent)
            waiting = {one.key: one for one in entries}
        assert admission.waiting == waiting.keys()
        first = {
            model: min(
                (policy.sort_key(one.request.scheduling, unix_s), key)
                for key, one in waiting.items()
                if one.model == model
            )[1]
            for model in {one.model for one in waiting.values()}
        }
        assert {one.model: one.key for one in admission.first_entries(unix_s)} == first
