"""How long a worker on a CPU has to wait between two steps, so that it uses no more than its share. Pure.

Threads limit a worker to whole cores; the pacer limits the rest of its share, and what the process computes beside its
engine. It is a token bucket of CPU time: the share fills it, each step empties it, and a step may start while it is not
empty. So over any t seconds a worker uses at most share x cores x (t + BURST_S), and one step more.
"""

from __future__ import annotations

BURST_S = 0.1
"""The bucket holds the CPU time of the share in this time. More is not saved up by an idle worker."""

_SHORTEST_DELAY_S = 0.0005
"""A shorter delay is added to the next one: timers are not more precise."""


class SharePacer:
    """Owns the CPU time that one worker may still use. Nothing of a worker's output depends on it."""

    def __init__(self, cores: float) -> None:
        """``cores``: the worker's share in cores, above 0."""
        self._cores = cores
        self._left_s = cores * BURST_S
        self._counted: tuple[float, float] | None = None
        """Monotonic time and CPU time of the process up to which ``_left_s`` is counted."""

    def restart(self) -> None:
        """What the process has used since the last call of `delay_s` does not count: it was loading a model."""
        self._counted = None

    def delay_s(self, now_s: float, cpu_s: float) -> float:
        """Seconds until the worker may compute its next step; 0: now.

        ``cpu_s``: CPU time of all threads of the process so far. What was used before the first call does not count.
        """
        if self._counted is not None:
            counted_s, counted_cpu_s = self._counted
            filled_s = self._left_s + self._cores * (now_s - counted_s) - (cpu_s - counted_cpu_s)
            self._left_s = min(self._cores * BURST_S, filled_s)
        self._counted = (now_s, cpu_s)
        delay_s = -self._left_s / self._cores
        return delay_s if delay_s >= _SHORTEST_DELAY_S else 0.0
