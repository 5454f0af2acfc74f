import itertools

import pytest

from kvstore.router_clock import RouterClock


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0, -86_400.0])
def test_a_router_s_arrivals_are_on_the_unit_s_clock_whatever_its_own_says(ahead_s: float) -> None:
    clock = RouterClock()
    clock.received(1000.0, 1000.0 + ahead_s + 0.002)
    assert clock.here(990.0) == pytest.approx(990.0 + ahead_s, abs=0.01)


def test_arrivals_of_one_router_keep_their_distance_once_a_message_was_fast() -> None:
    clock, found = RouterClock(), []
    for number in range(100):
        sent_at_s = 1000.0 + number
        clock.received(sent_at_s, sent_at_s + 5.0 + (0.3 if number % 7 else 0.001))
        found.append(clock.here(sent_at_s - 0.5))
    assert [later - earlier for earlier, later in itertools.pairwise(found)] == pytest.approx([1.0] * 99, abs=0.01)
    assert found[-1] == pytest.approx(1000.0 + 99 - 0.5 + 5.0, abs=0.01)


def test_one_message_that_was_long_on_its_way_changes_nothing() -> None:
    clock = RouterClock()
    clock.received(1000.0, 1000.0)
    clock.received(1001.0, 1031.0)
    assert clock.here(1001.0) == pytest.approx(1001.0, abs=0.05)


def test_a_clock_that_drifts_or_is_set_back_a_little_is_followed() -> None:
    clock = RouterClock()
    for number in range(2000):
        clock.received(1000.0 + number - 0.5 * (number > 0), 1000.0 + number)
    assert clock.here(2999.0 - 0.5) == pytest.approx(2999.0, abs=0.01)


def test_two_routers_with_skewed_clocks_are_ordered_by_when_requests_came() -> None:
    fast, slow = RouterClock(), RouterClock()
    fast.received(1060.0, 1000.001)
    slow.received(940.5, 1000.501)
    assert fast.here(1059.0) < slow.here(939.9), "999.0 and 999.9 on the unit's clock"


@pytest.mark.parametrize("step_s", [100.0, -100.0])
def test_a_router_s_clock_may_be_set(step_s: float) -> None:
    clock = RouterClock()
    clock.received(1000.0, 1000.0)
    for at_s in (1010.0, 1011.0, 1012.0):
        clock.received(at_s + step_s, at_s)
    assert clock.here(1012.0 + step_s) == pytest.approx(1012.0)
