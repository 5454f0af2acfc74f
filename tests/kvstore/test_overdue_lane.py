"""Which overdue requests precede all others."""

import pytest

from kvstore.overdue_lane import OverdueRequest, lane_capacity, lane_members


@pytest.mark.parametrize(("share", "num_slots", "capacity"), [(0.25, 16, 4), (0.25, 3, 1), (0.5, 5, 2), (1.0, 8, 8)])
def test_the_lane_has_room_for_its_share_of_the_slots_and_at_least_one(
    share: float, num_slots: int, capacity: int
) -> None:
    assert lane_capacity(share, num_slots) == capacity


def test_tenants_take_turns_each_with_its_oldest_request() -> None:
    flood = [OverdueRequest("flood", float(number), number) for number in range(100)]
    others = [OverdueRequest("b", 500.0, 500), OverdueRequest("c", 400.0, 400), OverdueRequest("b", 600.0, 600)]
    assert lane_members(flood + others, 4) == {0, 400, 500, 1}
    assert lane_members(flood, 4) == {0, 1, 2, 3}
    assert lane_members([], 4) == set()
