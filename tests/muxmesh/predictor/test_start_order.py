"""Lengths are learned in the order in which outputs started."""

import random

import pytest

from muxmesh.predictor.start_order import StartOrder


def test_a_length_is_held_back_until_all_earlier_outputs_have_ended() -> None:
    order = StartOrder[str]()
    first, second, third = order.start(), order.start(), order.start()
    assert order.end(second, "second") == []
    assert order.end(first, "first") == ["first", "second"]
    fourth = order.start()
    assert order.end(fourth, "fourth") == []
    assert order.end(third, "third") == ["third", "fourth"]


def test_an_endless_output_holds_back_a_limited_number() -> None:
    order = StartOrder[int](max_held=3)
    endless = order.start()
    returned = [order.end(order.start(), length) for length in range(6)]
    assert returned == [[], [], [], [0], [1], [2]]
    assert order.end(endless, -1) == [-1, 3, 4, 5]


@pytest.mark.parametrize("seed", range(20))
def test_each_length_is_returned_once_and_in_order_unless_too_many_are_held(seed: int) -> None:
    rng, max_held = random.Random(seed), seed % 7
    order, running, started, returned = StartOrder[int](max_held), list[int](), list[int](), list[int]()
    while len(returned) < 200:
        if len(started) < 200 and (not running or rng.random() < 0.5):
            running.append(order.start())
            started.append(running[-1])
        else:
            number = running.pop(rng.randrange(len(running)))
            returned += order.end(number, number)
            ended = [one for one in started if one not in running]
            assert len(ended) - len(returned) <= max_held
            if running:
                assert set(returned) >= {one for one in ended if one < min(running)}
    assert sorted(returned) == started


def test_a_burst_is_not_learned_from_its_short_outputs_first() -> None:
    """Sixteen outputs start at once; of those that are learned half-way, half are long."""
    order = StartOrder[int]()
    lengths = [10, 500] * 8
    numbers = {order.start(): length for length in lengths}
    learned = []
    for number in sorted(numbers, key=lambda one: (numbers[one], one)):
        learned += order.end(number, numbers[number])
        assert abs(sum(length == 10 for length in learned) - len(learned) / 2) <= 0.5
    assert learned == lengths
