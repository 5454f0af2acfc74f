import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.durations import duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (4e-5, "0 s"),
        (0.0004, "0.4 ms"),
        (0.041, "41 ms"),
        (0.25, "250 ms"),
        (0.9996, "1 s"),
        (2.34, "2.3 s"),
        (9.96, "10 s"),
        (31.0, "31 s"),
        (1800.0, "30 min"),
        (7200.0, "2 h"),
        (200_000.0, "2.3 d"),
        (1e15, "11574074074 d"),
    ],
)
def test_a_duration_is_shown_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.floats(1e-3, 1e9))
def test_the_text_differs_from_the_duration_by_at_most_a_twentieth(seconds: float) -> None:
    number, unit = duration_text(seconds).split()
    shown_s = float(number) * {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}[unit]
    assert abs(shown_s - seconds) <= 0.051 * seconds
