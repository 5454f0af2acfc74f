"""A team of threads that runs one compiled function, and the counters over which its threads share the tasks.

Threads claim the tasks of a phase one by one. A phase ends when all its tasks are done, not when every thread arrives,
so a thread that the operating system suspends delays only its own task. There is no OpenMP: no thread spins between
steps, and the function runs without the GIL. Knows nothing of models.
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
"""Options of every kernel. Kernels are module globals, because numba's cache never finds a kernel again whose closure
holds compiled functions."""

_LINE_BYTES = 64
_SPINS = 2000
"""Checks of a counter between two yields of the core."""


def new_counters(num_phases: int) -> np.ndarray:
    """Returns zeroed counters, int64 [phases, 16]: claimed and done tasks of each phase, each on its own cache line."""
    return np.zeros((num_phases, 2 * _LINE_BYTES // 8), dtype=np.int64)


@numba.njit(**JIT)
def claim(counters, phase):  # type: ignore[no-untyped-def]
    """Claims a task of ``phase`` and returns its index, which may be past the last task. counters: an address."""
    return fetch_add(counters + phase * 2 * _LINE_BYTES, 1)


@numba.njit(**JIT)
def claim_next(counters, phase):  # type: ignore[no-untyped-def]
    """Counts the claimed task as done and claims the next one."""
    fetch_add(counters + phase * 2 * _LINE_BYTES + _LINE_BYTES, 1)
    return claim(counters, phase)


@numba.njit(**JIT)
def wait(counters, phase, num_tasks):  # type: ignore[no-untyped-def]
    """Returns when ``num_tasks`` tasks of the phase are done; their stores are visible to this thread."""
    spins = 0
    while load_acquire(counters + phase * 2 * _LINE_BYTES + _LINE_BYTES) < num_tasks:
        spins += 1
        if spins % _SPINS == 0:
            yield_cpu()
        else:
            pause()


class Team:
    """A fixed team: the caller of `run` and ``num_threads - 1`` threads of its own."""

    def __init__(self, num_threads: int) -> None:
        """Raises ValueError if ``num_threads`` is below 1."""
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; a team has at least 1 thread")
        self._others = num_threads - 1
        self._pool: ThreadPoolExecutor | None = None

    def run(self, function: Callable[[], None]) -> None:
        """Runs ``function`` once in every thread of the team; returns when all are done. One call at a time."""
        if self._pool is None and self._others:
            self._pool = ThreadPoolExecutor(self._others, thread_name_prefix="team")
        futures = [self._pool.submit(function) for _ in range(self._others)] if self._pool else []
        function()
        for future in futures:
            future.result()

    def rest(self) -> None:
        """Ends the threads of its own, until `run` is called again."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
