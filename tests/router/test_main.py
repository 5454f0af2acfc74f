"""The router's own command line options."""

import pytest

from muxmesh.errors import ConfigError
from router.__main__ import _drain_s
from router.app import DRAIN_S


def test_the_drain_is_a_number_of_seconds() -> None:
    assert (_drain_s(None), _drain_s("0"), _drain_s("60"), _drain_s("1.5")) == (DRAIN_S, 0.0, 60.0, 1.5)


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "86401"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _drain_s(text)
    assert str(refused.value) == f"--drain: is '{text}'; must be seconds, from 0 to 86400"
