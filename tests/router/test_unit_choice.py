"""Which of two units is chosen."""

import pytest

from router.unit_choice import unit_load


@pytest.mark.parametrize(
    ("chosen", "other"),
    [((True, 0), (True, 1)), ((True, 3), (True, 4)), ((True, 50), (False, 0)), ((False, 1), (False, 2))],
)
def test_the_least_loaded_connected_unit_comes_first(chosen: tuple[bool, int], other: tuple[bool, int]) -> None:
    first, second = (
        unit_load(is_connected=connected, num_assigned=assigned) for connected, assigned in (chosen, other)
    )
    assert first < second
