from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.order import FCFS
from muxmesh.types import KvDemand, Standing
from router.queue import SORT_EVERY_S, Waiting, WaitingRequests


def waiting(key_id: int, priority: int = 0, model: str = "m") -> Waiting:
    return Waiting(key_id, model, Standing(priority, float(key_id)), KvDemand(10, 10))


def test_only_the_best_are_shown() -> None:
    queue = WaitingRequests(shown_per_model=2)
    for key_id in (1, 2, 3):
        queue.add(waiting(key_id))
    assert [shown.key_id for shown in queue.show_next(0.0)] == [1, 2]
    assert queue.show_next(0.0) == []


def test_a_better_request_is_shown_though_the_window_is_full() -> None:
    queue = WaitingRequests(shown_per_model=1)
    queue.add(waiting(1))
    queue.show_next(0.0)
    queue.add(waiting(2, priority=-1))
    assert [shown.key_id for shown in queue.show_next(0.0)] == [2]


def test_a_clock_that_was_put_back_stops_no_order_that_moves() -> None:
    queue = WaitingRequests(replace(FCFS, policy="hrrn"), shown_per_model=1)
    queue.show_next(10_000.0)
    long, short = (Standing(0, at_s, decode_s=work_s) for at_s, work_s in ((100.0, 50.0), (101.0, 1.0)))
    queue.add(Waiting(1, "m", long, KvDemand(10, 10)))
    queue.add(Waiting(2, "m", short, KvDemand(10, 10)))
    assert [shown.key_id for shown in queue.show_next(101.0)] == [1]  # as of ten thousand the other would be first


def test_the_next_one_is_shown_when_one_leaves() -> None:
    queue = WaitingRequests(shown_per_model=1)
    queue.add(waiting(1))
    queue.add(waiting(2))
    queue.show_next(0.0)
    assert queue.remove(1) is True
    assert [shown.key_id for shown in queue.show_next(0.0)] == [2]
    assert queue.remove(7) is False


def test_everything_is_shown_again_to_a_unit_that_was_restarted() -> None:
    queue = WaitingRequests()
    queue.add(waiting(1))
    queue.show_next(0.0)
    queue.hide_all()
    assert [shown.key_id for shown in queue.show_next(0.0)] == [1]


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from("ab"), st.booleans()), max_size=40))
def test_what_is_shown_is_never_worse_than_what_is_not(requests: list[tuple[int, str, bool]]) -> None:
    queue, shown, alive = WaitingRequests(shown_per_model=3), set[int](), dict[int, Waiting]()
    for key_id, (priority, model, leave) in enumerate(requests):
        entry = alive[key_id] = waiting(key_id, priority, model)
        queue.add(entry)
        shown |= {fresh.key_id for fresh in queue.show_next(0.0)}
        if leave:
            gone = min(alive)
            queue.remove(gone)
            shown.discard(gone)
            del alive[gone]
            shown |= {fresh.key_id for fresh in queue.show_next(0.0)}
    for model in "ab":
        best = sorted(
            (FCFS.key(entry.standing, 0.0), key_id) for key_id, entry in alive.items() if entry.model == model
        )[:3]
        assert {key_id for _, key_id in best} <= shown
        assert queue.count(model) == sum(entry.model == model for entry in alive.values())
    assert len(queue) == len(alive)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 0.5), st.booleans()), max_size=40))
def test_an_order_that_moves_with_time_is_followed(requests: list[tuple[float, float, bool]]) -> None:
    order = replace(FCFS, policy="hrrn")
    queue, alive, now_s = WaitingRequests(order, shown_per_model=3), dict[int, Waiting](), 0.0
    shown: set[int] = set()
    for key_id, (work_s, later_s, leave) in enumerate(requests):
        now_s += later_s
        entry = alive[key_id] = Waiting(key_id, "m", Standing(0, now_s, 0.0, work_s), KvDemand(10, 10))
        queue.add(entry)
        if leave:
            gone = min(alive)
            queue.remove(gone)
            shown.discard(gone)
            del alive[gone]
    now_s += 2 * SORT_EVERY_S
    shown |= {fresh.key_id for fresh in queue.show_next(now_s)}
    best = sorted((order.key(entry.standing, now_s), key_id) for key_id, entry in alive.items())[:3]
    assert {key_id for _, key_id in best} <= shown and len(queue) == len(alive)
