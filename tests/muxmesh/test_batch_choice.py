"""Which sequences form the batch when there are more of them than slots."""

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.batch_choice import MAX_CLASS_PREEMPTIONS, MAX_PREEMPTIONS, Reach, choose_batch, displaces, is_protected
from muxmesh.execution import PreemptionReason
from muxmesh.remaining_work import RemainingWork
from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.types import LengthPrediction, SchedulingState, TenantStanding

SRTF = SchedulingPolicy("srtf", 0.0, 0.0, 1.0, max_wait_s=1000.0)
FCFS = replace(SRTF, name="fcfs")
NOW_S = 100.0


@dataclass(frozen=True)
class Sequence:
    """What a batch is chosen from."""

    scheduling: SchedulingState
    is_batched: bool = False
    num_preemptions: int = 0
    is_protected: bool = False
    slack_s: float = math.inf


def running(remaining_s: float, arrived_at_s: float = 0.0, priority: int = 0, **more: int) -> Sequence:
    state = SchedulingState(priority, arrived_at_s, decode_s=remaining_s)
    return replace(Sequence(state, is_batched=True), **more)  # type: ignore[arg-type]


def waiting(remaining_s: float, arrived_at_s: float = 1.0, priority: int = 0) -> Sequence:
    return Sequence(SchedulingState(priority, arrived_at_s, decode_s=remaining_s))


def chosen(sequences: list[Sequence], max_num_seqs: int, policy: SchedulingPolicy = SRTF) -> list[float]:
    """Remaining seconds of the sequences of the batch."""
    return sorted(one.scheduling.remaining_s for one in choose_batch(sequences, policy, NOW_S, max_num_seqs))


def test_all_sequences_are_in_a_batch_with_enough_slots() -> None:
    assert chosen([running(5), waiting(9)], 2) == [5, 9]


def test_free_slots_go_to_the_first_that_wait() -> None:
    assert chosen([running(5), waiting(9), waiting(7), waiting(8)], 3) == [5, 7, 8]


def test_a_sequence_with_less_than_half_of_the_work_displaces_the_last_one() -> None:
    assert chosen([running(5), running(20), waiting(9)], 2) == [5, 9]
    assert chosen([running(5), running(20), waiting(10)], 2) == [5, 20]


def test_a_sequence_that_comes_later_in_the_order_displaces_none() -> None:
    assert chosen([running(20, arrived_at_s=0.0), waiting(1, arrived_at_s=1.0)], 1, FCFS) == [20]


def test_a_sequence_that_is_protected_is_not_displaced_by_its_class() -> None:
    assert chosen([running(20, is_protected=True), waiting(1)], 1) == [20]
    assert chosen([running(20, is_protected=True), waiting(1, priority=-1)], 1) == [1]


@pytest.mark.parametrize(("slack_s", "is_kept"), [(9.9, True), (10.0, False), (-3.0, True), (math.inf, False)])
def test_a_sequence_that_could_miss_its_slo_by_waiting_is_protected_until_it_is_safe(
    slack_s: float, is_kept: bool
) -> None:
    work = RemainingWork(SchedulingState(0, 0.0, decode_s=20.0), LengthPrediction(100.0, 200.0))
    assert is_protected(work, slack_s) is is_kept, "the longest one that may displace it has 10 s to do"


def test_a_waiting_sequence_whose_token_is_due_displaces_one_with_less_work() -> None:
    held = [running(5), running(6)]
    assert chosen([*held, replace(waiting(30), slack_s=0.5)], 2) == [5, 6]
    assert chosen([*held, replace(waiting(30), slack_s=0.0)], 2) == [5, 30], "the last in the order is displaced"
    assert chosen([replace(one, is_protected=True) for one in held] + [replace(waiting(30), slack_s=-1.0)], 2) == [5, 6]


def test_a_token_that_is_due_is_no_reason_to_displace_a_better_class() -> None:
    assert chosen([running(5, priority=-1), replace(waiting(1), slack_s=-1.0)], 1) == [5]


def test_a_free_slot_goes_to_the_sequence_whose_token_is_due_unless_a_better_class_waits() -> None:
    due = replace(waiting(9), slack_s=-1.0, is_protected=True)
    held = running(1.5, is_protected=True)
    assert chosen([held, waiting(1), due], 2) == [1.5, 9]
    assert chosen([held, waiting(1, priority=-1), due], 2) == [1, 1.5]


def test_a_sequence_is_displaced_a_limited_number_of_times() -> None:
    assert chosen([running(20, num_preemptions=MAX_PREEMPTIONS - 1), waiting(1)], 1) == [1]
    assert chosen([running(20, num_preemptions=MAX_PREEMPTIONS), waiting(1)], 1) == [20]
    assert chosen([running(20, num_preemptions=MAX_PREEMPTIONS), waiting(1, priority=-1)], 1) == [1]
    assert chosen([running(20, num_preemptions=MAX_CLASS_PREEMPTIONS), waiting(1, priority=-1)], 1) == [20]


@pytest.mark.parametrize("policy", [SRTF, FCFS])
def test_a_better_class_displaces_whatever_its_work_is(policy: SchedulingPolicy) -> None:
    assert chosen([running(5), running(6, arrived_at_s=0.5), waiting(99, priority=-1)], 2, policy) == [5, 99]


def test_a_worse_class_displaces_none() -> None:
    assert chosen([running(500), waiting(1, priority=1)], 1) == [500]


def test_an_overdue_sequence_displaces_and_is_not_displaced() -> None:
    policy = replace(SRTF, max_wait_s=50.0)
    overdue, fresh = SchedulingState(9, NOW_S - 50, decode_s=80.0), SchedulingState(0, NOW_S - 49, decode_s=1.0)
    assert displaces(overdue, Sequence(fresh, is_batched=True), policy, NOW_S)
    assert not displaces(fresh, Sequence(overdue, is_batched=True), policy, NOW_S)


@pytest.mark.parametrize(
    ("newcomer", "slack_s", "reason"),
    [
        (waiting(1, arrived_at_s=70), math.inf, PreemptionReason.ORDER),
        (waiting(30, arrived_at_s=70), -1.0, PreemptionReason.SLO),
        (waiting(99, arrived_at_s=70, priority=-1), math.inf, PreemptionReason.PRIORITY),
        (waiting(99, arrived_at_s=NOW_S - 51), math.inf, PreemptionReason.OVERDUE),
        (waiting(99, arrived_at_s=NOW_S - 51, priority=-1), math.inf, PreemptionReason.OVERDUE),
    ],
    ids=lambda value: str(value) if isinstance(value, PreemptionReason) else None,
)
def test_the_reason_for_which_a_sequence_is_displaced_is_known(
    newcomer: Sequence, slack_s: float, reason: PreemptionReason
) -> None:
    policy, found = replace(SRTF, max_wait_s=50.0), list[tuple[Sequence, PreemptionReason]]()
    kept, victim = running(5, arrived_at_s=60.0), running(6, arrived_at_s=60.0)
    items = [kept, victim, replace(newcomer, slack_s=slack_s)]
    choose_batch(items, policy, NOW_S, 2, lambda one, why: found.append((one, why)))
    assert found == [(victim, reason)]


def test_at_most_half_of_the_batch_is_displaced_at_once() -> None:
    sequences = [running(100 + number) for number in range(4)] + [waiting(1 + number) for number in range(4)]
    assert chosen(sequences, 4) == [1, 2, 100, 101]


def test_one_slot_can_be_taken_at_once() -> None:
    assert chosen([running(100), waiting(1)], 1) == [1]


def test_a_waiting_sequence_that_displaces_none_does_not_hold_up_the_next() -> None:
    older = Sequence(SchedulingState(0, 0.0, decode_s=60.0))
    aged = SchedulingPolicy("srtf-aged", 10.0, 1000.0, 1.0)
    held = Sequence(SchedulingState(0, 90.0, decode_s=100.0, mean_work_s=50.0), is_batched=True)
    short = Sequence(SchedulingState(0, 95.0, decode_s=1.0, mean_work_s=50.0))
    assert chosen([held, older, short], 1, aged) == [1]


sequences_of = st.lists(
    st.builds(
        lambda priority, arrived_at_s, work_s, preemptions, done: Sequence(
            SchedulingState(priority, arrived_at_s, decode_s=work_s), False, preemptions, done
        ),
        st.integers(-1, 1),
        st.floats(0, 99),
        st.floats(0.1, 100),
        st.integers(0, 9),
        st.booleans(),
    ),
    max_size=20,
)


@given(sequences_of, st.integers(1, 8), st.integers(0, 8), st.sampled_from(["fcfs", "srtf", "srtf-aged", "hrrn"]))
def test_no_slot_is_left_free_and_the_limits_hold(
    of: list[Sequence], max_num_seqs: int, num_running: int, name: str
) -> None:
    policy = SchedulingPolicy(name, 10.0, 50.0, 1.0, max_wait_s=90.0)  # type: ignore[arg-type]
    count = min(num_running, max_num_seqs)
    of = [replace(one, is_batched=index < count) for index, one in enumerate(of)]
    batch = choose_batch(of, policy, NOW_S, max_num_seqs)
    assert len(batch) == len({id(one) for one in batch}) == min(len(of), max_num_seqs)
    displaced = [one for one in of if one.is_batched and not any(one is other for other in batch)]
    assert len(displaced) <= max(1, max_num_seqs // 2)
    for victim in displaced:
        assert victim.num_preemptions < MAX_CLASS_PREEMPTIONS
        assert any(displaces(one.scheduling, victim, policy, NOW_S) for one in batch if not one.is_batched)
    settled = [replace(one, is_batched=any(one is other for other in batch)) for one in of]
    again = choose_batch(settled, policy, NOW_S, max_num_seqs)
    for one in again:  # what was displaced does not come back at the cost of what displaced it
        assert one.is_batched or not any(one.scheduling is victim.scheduling for victim in displaced)


_STATES = st.builds(
    lambda priority, arrived_at_s, work_s: SchedulingState(priority, arrived_at_s, decode_s=work_s, mean_work_s=8.0),
    st.integers(-1, 1), st.integers(-1000, 100).map(float), st.integers(0, 20).map(float),
)  # fmt: skip


@given(
    st.lists(
        st.builds(Sequence, _STATES, st.just(True), st.integers(0, MAX_CLASS_PREEMPTIONS), st.booleans()), max_size=12
    ),
    st.lists(_STATES, max_size=6),
    st.sampled_from(("fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq")),
    st.integers(0, 4),
)
def test_reach_is_what_looking_at_each_sequence_of_the_batch_finds(
    batch: list[Sequence], newcomers: list[SchedulingState], name: PolicyName, number: int
) -> None:
    policy = replace(SRTF, name=name, longest_lead=100.0, longest_lead_s=600.0)
    reach = Reach(dict(enumerate(batch)), policy, NOW_S)
    for newcomer in newcomers:
        num_victims = sum(displaces(newcomer, one, policy, NOW_S) for one in batch)
        assert reach.may_displace_more_than(number, newcomer) == (num_victims > number)
        assert reach.may_displace(newcomer) == (num_victims > 0)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.one_of(st.none(), st.builds(Sequence, _STATES, st.just(True), st.integers(0, 4), st.booleans())),
        ),
        max_size=20,
    ),
    st.lists(_STATES, min_size=1, max_size=6),
    st.sampled_from(("fcfs", "srtf", "srtf-aged")),
    st.integers(0, 2),
)
def test_reach_follows_the_changes_of_its_batch(
    changes: list[tuple[int, Sequence | None]], newcomers: list[SchedulingState], name: PolicyName, number: int
) -> None:
    policy = replace(SRTF, name=name, longest_lead=100.0, longest_lead_s=600.0, max_wait_s=math.inf)
    batch, reach = dict[int, Sequence](), Reach({}, policy, NOW_S)
    for changed, item in changes:
        reach.update(changed, item)
        if item is None:
            batch.pop(changed, None)
        else:
            batch[changed] = item
        anew = Reach(batch, policy, NOW_S)
        for newcomer in newcomers:
            key = policy.sort_key(newcomer, NOW_S)
            assert reach.may_displace_more_than(number, newcomer) == anew.may_displace_more_than(number, newcomer)
            assert reach.ends_before(key) == anew.ends_before(key)


@given(
    st.lists(st.builds(Sequence, _STATES, st.just(True), st.integers(0, 4), st.booleans()), max_size=8),
    st.lists(_STATES, min_size=1, max_size=12),
    st.sampled_from(("fcfs", "sjf", "srtf", "srtf-aged", "hrrn", "mlfq")),
)
def test_no_newcomer_displaces_a_sequence_of_a_batch_that_ends_before_it(
    batch: list[Sequence], newcomers: list[SchedulingState], name: PolicyName
) -> None:
    policy = replace(SRTF, name=name, longest_lead=100.0, longest_lead_s=600.0)
    reach = Reach(dict(enumerate(batch)), policy, NOW_S)
    newcomers.sort(key=lambda one: policy.sort_key(one, NOW_S))
    for index, first in enumerate(newcomers):
        if reach.ends_before(policy.sort_key(first, NOW_S)):
            assert not any(reach.may_displace(later) for later in newcomers[index:])


def test_a_batch_ends_before_those_that_come_later_than_all_of_it() -> None:
    reach = Reach({0: running(20, arrived_at_s=3.0), 1: running(20, arrived_at_s=5.0)}, FCFS, NOW_S)
    assert not reach.ends_before((0, 4.0, 4.0))
    assert reach.ends_before((0, 5.0, 5.0))
    assert not reach.ends_before((-1, 9.0, 9.0)), "a better class"
    assert Reach({}, FCFS, NOW_S).ends_before((-1, 0.0, 0.0))


def of_tenant(sequence: Sequence, number: int, group: int, best_priority: int = 0) -> Sequence:
    standing = TenantStanding(group, best_priority, True, False, number)
    return replace(sequence, scheduling=sequence.scheduling.with_standing(standing))


def test_a_sequence_of_a_tenant_that_had_less_service_displaces_others_whatever_their_class_is() -> None:
    ahead = of_tenant(running(20, priority=-9, is_protected=True), 1, group=2, best_priority=-9)
    behind = of_tenant(waiting(99, priority=5), 2, group=0, best_priority=5)
    reasons: list[PreemptionReason] = []
    batch = choose_batch([ahead, behind], SRTF, NOW_S, 1, lambda _, reason: reasons.append(reason))
    assert (batch, reasons) == ([behind], [PreemptionReason.FAIRNESS])
    assert choose_batch([replace(ahead, num_preemptions=MAX_CLASS_PREEMPTIONS), behind], SRTF, NOW_S, 1) != [behind]


def test_within_a_group_the_policy_decides_between_tenants_and_classes_are_relative_to_the_best_one() -> None:
    flood = of_tenant(running(20, priority=-9), 1, group=0, best_priority=-9)
    assert chosen([flood, of_tenant(waiting(9, priority=3), 2, 0, best_priority=3)], 1) == [9]
    assert chosen([flood, of_tenant(waiting(11, priority=3), 2, 0, best_priority=3)], 1) == [20]
    assert chosen([flood, of_tenant(waiting(9, priority=4), 2, 0, best_priority=3)], 1) == [20]


def test_groups_do_not_pre_empt_sequences_of_the_same_tenant_and_class() -> None:
    held = of_tenant(running(20), 1, group=3)
    assert chosen([held, of_tenant(waiting(11), 1, group=0)], 1) == [20], "not less than half of the work"
    assert chosen([held, of_tenant(waiting(9), 1, group=0)], 1) == [9]
    protected = of_tenant(running(20, is_protected=True), 1, group=3)
    assert chosen([protected, of_tenant(waiting(9), 1, group=0)], 1) == [20]
    lower = of_tenant(running(20, is_protected=True), 1, group=3, best_priority=-1)
    assert chosen([lower, of_tenant(waiting(30, priority=-1), 1, group=0, best_priority=-1)], 1) == [30]


def test_an_overdue_sequence_outside_of_the_lane_has_no_precedence() -> None:
    policy = replace(FCFS, max_wait_s=10.0)
    overdue = of_tenant(waiting(5, arrived_at_s=1.0), 1, group=4)
    held = of_tenant(running(5, arrived_at_s=95.0), 2, group=0)
    assert choose_batch([overdue, held], policy, NOW_S, 1) == [held]
    lane = overdue.scheduling.with_standing(replace(overdue.scheduling.standing, has_overdue_lane=True))
    in_lane = replace(overdue, scheduling=lane)
    assert choose_batch([in_lane, held], policy, NOW_S, 1) == [in_lane]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3), st.floats(0.1, 50), st.integers(-1, 1)), min_size=2,
             max_size=8),
    st.integers(0, 3),
)  # fmt: skip
def test_a_reach_says_the_same_as_the_rule_for_sequences_of_several_tenants(
    sequences: list[tuple[int, int, float, int]], number: int
) -> None:
    (newcomer, *batch) = (
        of_tenant(running(work_s, float(index), priority), tenant, group, best_priority=-1)
        for index, (tenant, group, work_s, priority) in enumerate(sequences)
    )
    reach = Reach(dict(enumerate(batch)), SRTF, NOW_S)
    num_victims = sum(displaces(newcomer.scheduling, one, SRTF, NOW_S) for one in batch)
    assert reach.may_displace(newcomer.scheduling) or num_victims == 0
    if num_victims == 0:
        assert not reach.may_displace_more_than(number, newcomer.scheduling)
    key = SRTF.sort_key(newcomer.scheduling, NOW_S)
    assert not (reach.ends_before(key) and num_victims), "no sequence that displaces another one is skipped"
