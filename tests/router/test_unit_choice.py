"""Which of two units is chosen."""

import pytest

from router.unit_choice import unit_load


@pytest.mark.parametrize(
    ("chosen", "other"),
    [
        ((True, 0, 0), (True, 0, 1)),
        ((True, 0, 0), (True, 1, 0)),
        ((True, 0, 3), (True, 4, 0)),
        ((True, 1, 1), (True, 0, 3)),
        ((True, 50, 16), (False, 0, 0)),
        ((False, 0, 1), (False, 2, 0)),
    ],
)
def test_the_least_loaded_connected_unit_comes_first(
    chosen: tuple[bool, int, int], other: tuple[bool, int, int]
) -> None:
    first, second = (
        unit_load(is_connected=connected, num_queued=queued, num_running=running)
        for connected, queued, running in (chosen, other)
    )
    assert first < second
