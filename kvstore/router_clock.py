"""Times of a router's clock on the clock of its unit. Pure; times are arguments.

Hosts' clocks differ, and arrivals order requests of several routers. Each message has the time at which it was sent, so
the difference of the clocks is at most the time of receipt less that. The least such difference is kept, since it has
the least delay in it; one that is larger by more than `_MAX_DELAY_S` means that a clock was set.
"""

from __future__ import annotations

_MAX_DELAY_S = 1.0
"""A message is seldom on its way for longer. While one is, arrivals are taken for later by that much at most."""


class RouterClock:
    """Owns the difference between the clocks of one router and of this unit."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None
        """By how much this clock is ahead of the router's."""

    def received(self, sent_at_unix_s: float, now_unix_s: float) -> None:
        """A message came that the router sent at ``sent_at_unix_s``, by its clock; now it is ``now_unix_s`` here."""
        ahead_s = now_unix_s - sent_at_unix_s
        before_s = self._ahead_s
        if before_s is None or ahead_s < before_s or ahead_s > before_s + _MAX_DELAY_S:
            self._ahead_s = ahead_s

    def here(self, unix_s: float) -> float:
        """A time of the router on this unit's clock; as it is before the first message."""
        return unix_s if self._ahead_s is None else unix_s + self._ahead_s
