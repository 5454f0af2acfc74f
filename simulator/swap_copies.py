"""The copies of KV between the pool and the swap region in virtual time. Knows no lease and no KV block."""

from __future__ import annotations

from collections.abc import Callable

from simulator.timeline import Timeline


class SwapCopies:
    """Owns the copies of one worker: one at a time in the order of their requests, beside compute, as `KvSwapper`."""

    def __init__(self, timeline: Timeline, bytes_per_s: float) -> None:
        self._timeline = timeline
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self.copied_bytes = 0

    def copy(self, num_bytes: int, then: Callable[[], None]) -> None:
        """Copies ``num_bytes``, and calls ``then`` at the end."""
        self.copied_bytes += num_bytes
        self._free_at_s = max(self._free_at_s, self._timeline.now_s) + num_bytes / self._bytes_per_s
        self._timeline.at(self._free_at_s, then)
