"""Whether and when a failed call is sent again. Decides; sends nothing and waits for nothing.

Only calls that have returned nothing are sent again, so no token is generated twice for the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from muxmesh.errors import MeshError, Overloaded, TlsFailed, Unavailable

_MAX_DOUBLINGS = 64


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a call is repeated that failed before its first token because the mesh could not be reached.

    Retry n (from 0) follows after a random time between a half and the whole of ``initial_delay_s * 2**n``, at most
    ``max_delay_s``.
    """

    max_retries: int = 4
    initial_delay_s: float = 0.2
    max_delay_s: float = 2.0
    on_overload: bool = False
    """Also repeats a call that the mesh refused with Overloaded, after the delay that it asked for."""

    def delay_s(self, error: MeshError, num_retries: int, rng: Random) -> float | None:
        """Seconds to wait after ``error`` and ``num_retries`` retries so far; None if the call is not repeated."""
        if num_retries >= self.max_retries:
            return None
        backoff_s = (
            min(self.initial_delay_s * 2.0 ** min(num_retries, _MAX_DOUBLINGS), self.max_delay_s)
            * (1 + rng.random())
            / 2
        )
        if isinstance(error, Unavailable) and not isinstance(error, TlsFailed):
            return backoff_s
        if isinstance(error, Overloaded) and self.on_overload:
            return error.retry_after_s + backoff_s
        return None


NO_RETRIES = Retries(max_retries=0)


class Attempts:
    """The attempts of one call until its deadline. Times are those of the event loop.

    ``has_begun``: something was returned, so the call is not sent again.
    """

    def __init__(self, retries: Retries, rng: Random, deadline_s: float | None) -> None:
        self._retries = retries
        self._rng = rng
        self._deadline_s = deadline_s
        self._num_retries = 0
        self.has_begun = False

    def remaining_s(self, now_s: float) -> float | None:
        """Seconds until the deadline, at least 0; None without a deadline."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - now_s)

    def delay_before_retry_s(self, error: MeshError, now_s: float) -> float:
        """Seconds to wait before the call is sent again. Raises ``error`` if it is not, or not before the deadline."""
        delay_s = None if self.has_begun else self._retries.delay_s(error, self._num_retries, self._rng)
        remaining_s = self.remaining_s(now_s)
        if delay_s is None or (remaining_s is not None and delay_s >= remaining_s):
            raise error
        self._num_retries += 1
        return delay_s
