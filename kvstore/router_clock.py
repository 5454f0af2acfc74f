"""Times of a router's clock on the clock of its unit. Pure; times are arguments.

Hosts' clocks differ, and arrivals order requests of several routers. Each message has the time at which it was sent, so
the difference of the clocks is at most the time of receipt less that. The least such difference is kept, since it has
the least delay in it. It may grow slowly, as clocks drift, and at once if several messages in a row show that a clock
was set.
"""

from __future__ import annotations

_DRIFT = 1e-3
"""Seconds by which the difference may grow in a second."""
_JUMP_S, _JUMP_MESSAGES = 1.0, 3
"""So many messages in a row whose difference is larger by more than that mean that a clock was set."""


class RouterClock:
    """Owns the difference between the clocks of one router and of this unit."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None
        """By how much this clock is ahead of the router's."""
        self._received_s = 0.0
        self._num_late = 0
        """Messages in a row that were late by more than `_JUMP_S`."""

    def received(self, sent_at_unix_s: float, now_unix_s: float) -> None:
        """A message came that the router sent at ``sent_at_unix_s``, by its clock; now it is ``now_unix_s`` here."""
        found_s, before_s = now_unix_s - sent_at_unix_s, self._ahead_s
        is_late = before_s is not None and found_s > before_s + _JUMP_S
        self._num_late = self._num_late + 1 if is_late else 0
        if before_s is None or self._num_late >= _JUMP_MESSAGES:
            self._ahead_s, self._num_late = found_s, 0
        else:
            drift_s = _DRIFT * max(0.0, now_unix_s - self._received_s)
            self._ahead_s = min(found_s, before_s + drift_s)
        self._received_s = now_unix_s

    def here(self, unix_s: float) -> float:
        """A time of the router on this unit's clock; as it is before the first message."""
        return unix_s if self._ahead_s is None else unix_s + self._ahead_s
