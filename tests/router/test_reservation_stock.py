import math
from dataclasses import dataclass

import pytest

from router.reservation_stock import NOTHING_TO_SPARE, ReservationStock, Spare

PLENTY = Spare(math.inf, math.inf)


@dataclass(frozen=True)
class One:
    num_tokens: int
    name: str = ""


def stock_after(*intervals: list[int]) -> ReservationStock[One]:
    """A stock that has seen requests of these sizes, in each of these intervals, and has nothing yet."""
    stock = ReservationStock[One]()
    for sizes in intervals:
        for num_tokens in sizes:
            stock.note(num_tokens)
        stock.end_interval()
    return stock


def test_a_steady_load_has_a_stock_for_two_intervals() -> None:
    assert stock_after(*[[10] * 5] * 60).missing(PLENTY) == (10, 10)


def test_a_few_requests_a_second_have_one_reservation() -> None:
    assert stock_after(*[[10], [], [], []] * 20).missing(PLENTY) == (1, 10)


def test_a_request_that_comes_alone_has_none() -> None:
    assert stock_after([10]).missing(PLENTY) == (0, 0)
    assert stock_after([10], *[[]] * 40, [10]).missing(PLENTY) == (0, 0)


def test_what_is_there_is_not_made_again() -> None:
    stock = stock_after([10] * 20)
    for _ in range(3):
        stock.put(One(10), 0.0)
    assert stock.missing(PLENTY) == (1, 10)


def test_a_stock_is_for_the_largest_request_and_slowly_forgets_it() -> None:
    assert stock_after([10, 400, 30]).missing(PLENTY) == (1, 400)
    assert stock_after([10, 400, 30], [10]).missing(PLENTY) == (1, 360)
    assert stock_after([400], *[[10]] * 100).missing(PLENTY) == (2, 10)


@pytest.mark.parametrize(
    ("spare", "expected"),
    [(NOTHING_TO_SPARE, 0), (Spare(2.9, math.inf), 2), (Spare(math.inf, 35), 3), (Spare(math.inf, 9), 0)],
)
def test_no_more_is_made_than_can_be_spared(spare: Spare, expected: int) -> None:
    assert stock_after([10] * 40).missing(spare) == (expected, 10)


def test_what_is_there_counts_with_its_tokens_against_what_can_be_spared() -> None:
    stock = stock_after([10] * 40)
    stock.put(One(30), 0.0)
    assert stock.missing(Spare(math.inf, 55)) == (2, 10)


def test_a_flood_makes_no_more_than_64() -> None:
    assert stock_after([10] * 1000).missing(PLENTY)[0] == 64


def test_the_oldest_that_is_large_enough_is_taken() -> None:
    stock = stock_after()
    for one in (One(10, "a"), One(20, "b"), One(20, "c")):
        stock.put(one, 0.0)
    assert stock.take(15) == One(20, "b")
    assert stock.take(5) == One(10, "a")
    assert stock.take(21) is None
    assert list(stock) == [One(20, "c")]


def test_what_nobody_takes_for_two_seconds_is_unused() -> None:
    stock = stock_after()
    for seconds in range(4):
        stock.put(One(10, str(seconds)), float(seconds))
    assert stock.unused(1.9) == []
    assert [one.name for one in stock.unused(3.0)] == ["0", "1"]
    assert [one.name for one in stock.clear()] == ["2", "3"]
    assert stock.clear() == []


def test_a_stock_is_idle_when_it_is_empty_and_requests_have_stopped() -> None:
    assert stock_after().is_idle
    assert not stock_after([10]).is_idle
    long_after = stock_after([10], *[[]] * 30)
    assert long_after.is_idle
    long_after.put(One(10), 0.0)
    assert not long_after.is_idle
