import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.timeline import Timeline


def test_events_run_in_the_order_of_their_times() -> None:
    timeline, seen = Timeline(), list[tuple[str, float]]()
    for name, when_s in (("c", 3.0), ("a", 1.0), ("b", 2.5)):
        timeline.at(when_s, lambda name=name: seen.append((name, timeline.now_s)))  # type: ignore[misc]
    timeline.run()
    assert seen == [("a", 1.0), ("b", 2.5), ("c", 3.0)] and timeline.num_events == 3


def test_events_at_the_same_time_run_in_the_order_in_which_they_were_scheduled() -> None:
    timeline, seen = Timeline(), list[int]()
    for number in range(20):
        timeline.at(1.0, lambda number=number: seen.append(number))  # type: ignore[misc]
    timeline.run()
    assert seen == list(range(20))


def test_an_event_in_the_past_runs_now_after_the_events_of_now() -> None:
    timeline, seen = Timeline(), list[tuple[str, float]]()

    def first() -> None:
        timeline.at(1.0, lambda: seen.append(("past", timeline.now_s)))

    timeline.at(5.0, first)
    timeline.at(5.0, lambda: seen.append(("now", timeline.now_s)))
    timeline.run()
    assert seen == [("now", 5.0), ("past", 5.0)]


@pytest.mark.parametrize("delay_s", [0.0, -1.0])
def test_an_event_without_delay_runs_in_place(delay_s: float) -> None:
    timeline, seen = Timeline(), list[float]()
    timeline.after(delay_s, lambda: seen.append(timeline.now_s))
    assert seen == [0.0] and timeline.num_events == 0


def test_a_delayed_event_runs_after_the_delay() -> None:
    timeline, seen = Timeline(), list[float]()
    timeline.at(2.0, lambda: timeline.after(0.5, lambda: seen.append(timeline.now_s)))
    timeline.run()
    assert seen == [2.5]


def test_an_event_that_raises_ends_the_run_and_leaves_the_later_ones() -> None:
    timeline, seen = Timeline(), list[float]()

    def fail() -> None:
        raise ZeroDivisionError

    timeline.at(1.0, fail)
    timeline.at(2.0, lambda: seen.append(timeline.now_s))
    with pytest.raises(ZeroDivisionError):
        timeline.run()
    timeline.run()
    assert seen == [2.0]


@given(st.lists(st.floats(-10, 10), max_size=30), st.lists(st.floats(-3, 3), max_size=5))
def test_time_never_decreases_and_every_event_runs_once(times: list[float], delays: list[float]) -> None:
    timeline, seen = Timeline(), list[float]()

    def event() -> None:
        seen.append(timeline.now_s)
        if delays:
            timeline.after(delays.pop(), event)

    for when_s in times:
        timeline.at(when_s, event)
    expected = len(times) + (len(delays) if times else 0)
    timeline.run()
    assert seen == sorted(seen) and len(seen) == expected


def test_a_run_up_to_a_time_leaves_later_events() -> None:
    timeline, ran = Timeline(), list[float]()
    for at_s in (1.0, 2.0, 3.0):
        timeline.at(at_s, lambda: ran.append(timeline.now_s))
    timeline.run(2.0)
    assert ran == [1.0, 2.0]
    timeline.run()
    assert ran == [1.0, 2.0, 3.0]
