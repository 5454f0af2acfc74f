from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.scheduling_policy import FCFS
from muxmesh.types import KvDemand, QueuedRequest, SchedulingState
from router.request_queue import MAX_SHOWN_PER_MODEL, SORT_EVERY_S, RequestQueue


def queued(entry_id: int, priority: int = 0, model: str = "m") -> QueuedRequest:
    return QueuedRequest(entry_id, model, SchedulingState(priority, float(entry_id)), KvDemand(10, 10))


def test_only_the_first_requests_of_the_order_are_shown() -> None:
    queue = RequestQueue(shown_per_model=2)
    for entry_id in (1, 2, 3):
        queue.add(queued(entry_id))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [1, 2]
    assert queue.show_next(0.0) == []


def test_a_better_request_is_shown_though_the_limit_is_reached() -> None:
    queue = RequestQueue(shown_per_model=1)
    queue.add(queued(1))
    queue.show_next(0.0)
    queue.add(queued(2, priority=-1))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [2]


def test_a_clock_that_was_set_back_does_not_stop_the_sorting() -> None:
    queue = RequestQueue(replace(FCFS, name="hrrn"), shown_per_model=1)
    queue.show_next(10_000.0)
    long, short = (SchedulingState(0, at_s, decode_s=work_s) for at_s, work_s in ((100.0, 50.0), (101.0, 1.0)))
    queue.add(QueuedRequest(1, "m", long, KvDemand(10, 10)))
    queue.add(QueuedRequest(2, "m", short, KvDemand(10, 10)))
    # In the order at 10,000 s the other one would be first.
    assert [shown.entry_id for shown in queue.show_next(101.0)] == [1]


def test_an_overdue_request_is_shown_before_better_classes() -> None:
    queue = RequestQueue(replace(FCFS, max_wait_s=60.0), shown_per_model=1)
    queue.add(QueuedRequest(1, "m", SchedulingState(5, 100.0), KvDemand(10, 10)))
    queue.add(QueuedRequest(2, "m", SchedulingState(0, 120.0), KvDemand(10, 10)))
    assert [shown.entry_id for shown in queue.show_next(121.0)] == [2]
    assert [shown.entry_id for shown in queue.show_next(159.9)] == []
    assert [shown.entry_id for shown in queue.show_next(160.1)] == [1]
    assert queue.remove(1) and queue.remove(2)


def test_those_that_precede_a_request_are_counted() -> None:
    queue = RequestQueue()
    for one in (queued(1), queued(4), queued(2, priority=1), queued(3, model="n")):
        queue.add(one)
    tenant = queued(1).tenant

    def num_before(state: SchedulingState, model: str = "m") -> int:
        return queue.num_before(model, tenant, state)

    assert [num_before(SchedulingState(0, at_s)) for at_s in (0.5, 1.0, 2.0, 5.0)] == [0, 0, 1, 2]
    assert num_before(SchedulingState(1, 9.0)) == 3
    assert num_before(SchedulingState(0, 9.0), "x") == 0
    assert queue.num_before("m", "another", SchedulingState(0, 9.0)) == 0, "the first one of a tenant"
    queue.add(replace(queued(5), tenant="another"))
    queue.add(replace(queued(6), tenant="another", tenant_weight=2.0))
    assert queue.num_before("m", "another", SchedulingState(0, 9.0)) == 4
    assert queue.num_before("m", "another", SchedulingState(0, 9.0), weight=2.0) == 3, (
        "it has half of the others before"
    )


def test_without_fairness_all_that_precede_a_request_are_counted() -> None:
    queue = RequestQueue(is_fair=False)
    for number in range(500):
        queue.add(queued(number))
    assert queue.num_before("m", "another", SchedulingState(0, 900.0)) == 500


def test_the_next_request_is_shown_when_a_shown_one_is_removed() -> None:
    queue = RequestQueue(shown_per_model=1)
    queue.add(queued(1))
    queue.add(queued(2))
    queue.show_next(0.0)
    assert queue.remove(1) is True
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [2]
    assert queue.remove(7) is False


def test_every_request_is_shown_again_to_a_restarted_unit() -> None:
    queue = RequestQueue()
    queue.add(queued(1))
    queue.show_next(0.0)
    queue.hide_all()
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [1]


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from("ab"), st.booleans()), max_size=40))
def test_a_shown_request_is_never_worse_than_one_that_is_not_shown(requests: list[tuple[int, str, bool]]) -> None:
    queue, shown, queued_by_id = RequestQueue(shown_per_model=3), set[int](), dict[int, QueuedRequest]()
    for entry_id, (priority, model, remove) in enumerate(requests):
        entry = queued_by_id[entry_id] = queued(entry_id, priority, model)
        queue.add(entry)
        shown |= {fresh.entry_id for fresh in queue.show_next(0.0)}
        if remove:
            removed = min(queued_by_id)
            queue.remove(removed)
            shown.discard(removed)
            del queued_by_id[removed]
            shown |= {fresh.entry_id for fresh in queue.show_next(0.0)}
    for model in "ab":
        best = sorted(
            (FCFS.sort_key(entry.scheduling, 0.0), entry_id)
            for entry_id, entry in queued_by_id.items()
            if entry.model == model
        )[:3]
        assert {entry_id for _, entry_id in best} <= shown
        assert queue.count(model) == sum(entry.model == model for entry in queued_by_id.values())
    assert len(queue) == len(queued_by_id)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 0.5), st.booleans()), max_size=40))
def test_the_order_of_a_policy_that_changes_with_time_is_followed(requests: list[tuple[float, float, bool]]) -> None:
    order = replace(FCFS, name="hrrn")
    queue, queued_by_id, now_s = RequestQueue(order, shown_per_model=3), dict[int, QueuedRequest](), 0.0
    shown: set[int] = set()
    for entry_id, (work_s, later_s, remove) in enumerate(requests):
        now_s += later_s
        entry = queued_by_id[entry_id] = QueuedRequest(
            entry_id, "m", SchedulingState(0, now_s, 0.0, work_s), KvDemand(10, 10)
        )
        queue.add(entry)
        if remove:
            removed = min(queued_by_id)
            queue.remove(removed)
            shown.discard(removed)
            del queued_by_id[removed]
    now_s += 2 * SORT_EVERY_S
    shown |= {fresh.entry_id for fresh in queue.show_next(now_s)}
    best = sorted((order.sort_key(entry.scheduling, now_s), entry_id) for entry_id, entry in queued_by_id.items())[:3]
    assert {entry_id for _, entry_id in best} <= shown and len(queue) == len(queued_by_id)


def test_models_have_limits_of_their_own() -> None:
    queue = RequestQueue(shown_per_model=1)
    for entry_id, model in ((1, "a"), (2, "a"), (3, "b"), (4, "b")):
        queue.add(queued(entry_id, model=model))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [1, 3]
    assert (queue.count("a"), queue.count("b"), queue.count("c"), len(queue)) == (2, 2, 0, 4)


def test_removing_a_request_that_was_not_shown_shows_no_other() -> None:
    queue = RequestQueue(shown_per_model=1)
    for entry_id in (1, 2, 3):
        queue.add(queued(entry_id))
    queue.show_next(0.0)
    assert queue.remove(2) is False
    assert queue.show_next(0.0) == []
    assert queue.remove(1) is True
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [3]


def test_requests_of_equal_rank_are_shown_in_the_order_of_their_entries() -> None:
    queue = RequestQueue(shown_per_model=2)
    for entry_id in (3, 1, 2):
        queue.add(QueuedRequest(entry_id, "m", SchedulingState(0, 0.0), KvDemand(10, 10)))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [1, 2]


def test_a_policy_that_changes_with_time_is_sorted_at_most_every_tenth_of_a_second() -> None:
    """Under hrrn the short request overtakes the long one within a second of its arrival."""
    queue = RequestQueue(replace(FCFS, name="hrrn"), shown_per_model=1)
    queue.show_next(100.0)
    long, short = (SchedulingState(0, at_s, decode_s=work_s) for at_s, work_s in ((100.0, 50.0), (100.01, 0.1)))
    for entry_id, scheduling in ((1, long), (2, short)):
        queue.add(QueuedRequest(entry_id, "m", scheduling, KvDemand(10, 10)))
    assert [shown.entry_id for shown in queue.show_next(100.0 + SORT_EVERY_S / 2)] == [1]
    assert [shown.entry_id for shown in queue.show_next(100.0 + 2 * SORT_EVERY_S)] == [2]


def test_the_oldest_arrival_is_that_of_any_position_in_the_order() -> None:
    queue = RequestQueue()
    assert queue.oldest_arrival_s("m") is None
    for entry_id, priority in ((5, 0), (3, 1), (4, -1)):
        queue.add(queued(entry_id, priority))
    queue.add(queued(1, model="n"))
    assert queue.oldest_arrival_s("m") == 3
    queue.remove(3)
    assert queue.oldest_arrival_s("m") == 4


def of_tenant(entry_id: int, tenant: str, priority: int = 0) -> QueuedRequest:
    return replace(queued(entry_id, priority), tenant=tenant)


def test_a_flood_hides_no_request_of_another_tenant() -> None:
    queue = RequestQueue(shown_per_model=2)
    for entry_id in range(1, 100):
        queue.add(of_tenant(entry_id, "flood", priority=-1))
    queue.add(of_tenant(100, "b", priority=5))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [1, 2, 100]
    queue.add(of_tenant(101, "c"))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [101]
    assert queue.count("m") == 101
    assert queue.remove(2)
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [3]


def test_of_many_tenants_a_unit_sees_one_request_each_once_it_sees_enough() -> None:
    queue = RequestQueue(shown_per_model=64)
    for entry_id in range(40 * 64):
        queue.add(of_tenant(entry_id, f"tenant {entry_id % 40}"))
    shown = queue.show_next(0.0)
    assert MAX_SHOWN_PER_MODEL <= len(shown) <= MAX_SHOWN_PER_MODEL + 40
    assert {one.tenant for one in shown} == {f"tenant {number}" for number in range(40)}
    queue.add(of_tenant(9999, "late"))
    assert [one.entry_id for one in queue.show_next(0.0)] == [9999]
    queue.hide_all()
    assert len(queue.show_next(0.0)) == len(shown) + 1
