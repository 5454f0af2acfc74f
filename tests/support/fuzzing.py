"""How many inputs a fuzz test tries: few in `make test`, its part of all inputs in `make test-long`."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

ALL_INPUTS = int(os.environ.get("FUZZ_INPUTS", "0"))
"""Inputs of all fuzz tests together. 0: each test tries as many as it gives for a quick run."""


def fuzz(quick: int, part: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Settings of a hypothesis test that tries ``quick`` inputs, or ``part`` (0 to 1) of `ALL_INPUTS`."""
    return settings(
        max_examples=max(quick, round(ALL_INPUTS * part)),
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
