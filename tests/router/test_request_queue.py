from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.scheduling_policy import FCFS
from muxmesh.types import KvDemand, QueuedRequest, SchedulingState
from router.request_queue import SORT_EVERY_S, RequestQueue


def waiting(entry_id: int, priority: int = 0, model: str = "m") -> QueuedRequest:
    return QueuedRequest(entry_id, model, SchedulingState(priority, float(entry_id)), KvDemand(10, 10))


def test_only_the_best_are_shown() -> None:
    queue = RequestQueue(shown_per_model=2)
    for entry_id in (1, 2, 3):
        queue.add(waiting(entry_id))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [1, 2]
    assert queue.show_next(0.0) == []


def test_a_better_request_is_shown_though_the_window_is_full() -> None:
    queue = RequestQueue(shown_per_model=1)
    queue.add(waiting(1))
    queue.show_next(0.0)
    queue.add(waiting(2, priority=-1))
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [2]


def test_a_clock_that_was_put_back_stops_no_order_that_moves() -> None:
    queue = RequestQueue(replace(FCFS, name="hrrn"), shown_per_model=1)
    queue.show_next(10_000.0)
    long, short = (SchedulingState(0, at_s, decode_s=work_s) for at_s, work_s in ((100.0, 50.0), (101.0, 1.0)))
    queue.add(QueuedRequest(1, "m", long, KvDemand(10, 10)))
    queue.add(QueuedRequest(2, "m", short, KvDemand(10, 10)))
    assert [shown.entry_id for shown in queue.show_next(101.0)] == [1]  # as of ten thousand the other would be first


def test_the_next_one_is_shown_when_one_leaves() -> None:
    queue = RequestQueue(shown_per_model=1)
    queue.add(waiting(1))
    queue.add(waiting(2))
    queue.show_next(0.0)
    assert queue.remove(1) is True
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [2]
    assert queue.remove(7) is False


def test_everything_is_shown_again_to_a_unit_that_was_restarted() -> None:
    queue = RequestQueue()
    queue.add(waiting(1))
    queue.show_next(0.0)
    queue.hide_all()
    assert [shown.entry_id for shown in queue.show_next(0.0)] == [1]


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from("ab"), st.booleans()), max_size=40))
def test_what_is_shown_is_never_worse_than_what_is_not(requests: list[tuple[int, str, bool]]) -> None:
    queue, shown, alive = RequestQueue(shown_per_model=3), set[int](), dict[int, QueuedRequest]()
    for entry_id, (priority, model, leave) in enumerate(requests):
        entry = alive[entry_id] = waiting(entry_id, priority, model)
        queue.add(entry)
        shown |= {fresh.entry_id for fresh in queue.show_next(0.0)}
        if leave:
            gone = min(alive)
            queue.remove(gone)
            shown.discard(gone)
            del alive[gone]
            shown |= {fresh.entry_id for fresh in queue.show_next(0.0)}
    for model in "ab":
        best = sorted(
            (FCFS.sort_key(entry.scheduling, 0.0), entry_id)
            for entry_id, entry in alive.items()
            if entry.model == model
        )[:3]
        assert {entry_id for _, entry_id in best} <= shown
        assert queue.count(model) == sum(entry.model == model for entry in alive.values())
    assert len(queue) == len(alive)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 0.5), st.booleans()), max_size=40))
def test_an_order_that_moves_with_time_is_followed(requests: list[tuple[float, float, bool]]) -> None:
    order = replace(FCFS, name="hrrn")
    queue, alive, now_s = RequestQueue(order, shown_per_model=3), dict[int, QueuedRequest](), 0.0
    shown: set[int] = set()
    for entry_id, (work_s, later_s, leave) in enumerate(requests):
        now_s += later_s
        entry = alive[entry_id] = QueuedRequest(entry_id, "m", SchedulingState(0, now_s, 0.0, work_s), KvDemand(10, 10))
        queue.add(entry)
        if leave:
            gone = min(alive)
            queue.remove(gone)
            shown.discard(gone)
            del alive[gone]
    now_s += 2 * SORT_EVERY_S
    shown |= {fresh.entry_id for fresh in queue.show_next(now_s)}
    best = sorted((order.sort_key(entry.scheduling, now_s), entry_id) for entry_id, entry in alive.items())[:3]
    assert {entry_id for _, entry_id in best} <= shown and len(queue) == len(alive)
