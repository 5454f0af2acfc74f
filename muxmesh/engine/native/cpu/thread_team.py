"""A team of threads that runs one compiled function together: tasks of a phase are claimed, not assigned.

A phase ends when its tasks are done, not when every thread has come, so a thread that the system holds back delays
only the task it has in hand. No OpenMP: nothing spins between steps, and the function runs without the GIL.
"""

# mypy: disable-error-code="call-arg, misc, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from muxmesh.engine.native.cpu.vector import fetch_add, load_acquire, pause, yield_cpu

JIT: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}
"""How every kernel is compiled. They are module globals: numba's cache never finds a kernel again that refers to
compiled functions of its own closure."""

_LINE = 64
_SPINS = 2000


def new_counters(num_phases: int) -> np.ndarray:
    """Two counters for each phase, each on a cache line of its own (int64, [phases, 16])."""
    return np.zeros((num_phases, 2 * _LINE // 8), dtype=np.int64)


@numba.njit(**JIT)
def claim(counters, phase):  # type: ignore[no-untyped-def]
    """The next task of the phase that nobody has."""
    return fetch_add(counters + phase * 2 * _LINE, 1)


@numba.njit(**JIT)
def claim_next(counters, phase):  # type: ignore[no-untyped-def]
    """The claimed task is done; the next one."""
    fetch_add(counters + phase * 2 * _LINE + _LINE, 1)
    return claim(counters, phase)


@numba.njit(**JIT)
def wait(counters, phase, num_tasks):  # type: ignore[no-untyped-def]
    """Returns when all tasks of the phase are done, and their results are seen."""
    spins = 0
    while load_acquire(counters + phase * 2 * _LINE + _LINE) < num_tasks:
        spins += 1
        if spins % _SPINS == 0:
            yield_cpu()
        else:
            pause()


class Team:
    """Owns ``num_threads - 1`` threads; the caller of `run` is the first of the team."""

    def __init__(self, num_threads: int) -> None:
        self._others = num_threads - 1
        self._pool = ThreadPoolExecutor(self._others, thread_name_prefix="team") if self._others else None

    def run(self, function: Callable[[], None]) -> None:
        """Every thread of the team runs ``function``; returns when all have."""
        futures = [self._pool.submit(function) for _ in range(self._others)] if self._pool else []
        function()
        for future in futures:
            future.result()
