"""Reservations that a router makes ahead of requests of one tenant, so that most of these wait for no answer. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

STOCK_EVERY_S = 0.05
"""The interval after which stocks are filled."""
_KEEP_S = 2.0
"""A reservation that no request has taken for so long is given back."""
_MOST = 64
_DECAY = 0.9
"""Of the number of recent requests, in each interval: half of them are of the last 0.35 s. Of their size, in each that
has requests."""
_AHEAD = 0.2
"""Of these requests so many are expected in two intervals."""
_FEW = 1.5
"""So few recent requests are too few to expect another one."""


class Reserved(Protocol):
    """A reservation."""

    @property
    def num_tokens(self) -> int:
        """What it is for: prompt and expected output."""


@dataclass(frozen=True, slots=True)
class Spare:
    """What a tenant can spare for reservations that may not be needed: their number, and the sum of their tokens."""

    num_requests: float
    num_tokens: float


NOTHING_TO_SPARE = Spare(0, 0)


R = TypeVar("R", bound=Reserved)


class ReservationStock(Generic[R]):
    """Owns the free reservations of a tenant: as many as it needs in two intervals, each for its largest requests.

    `note` and `take` are called for each request, `end_interval` every `STOCK_EVERY_S`, then the others.
    """

    def __init__(self) -> None:
        self._free: deque[tuple[float, R]] = deque()
        """The time of each one, the oldest first."""
        self._num_new = self._largest_new = 0
        self._demand = self._num_tokens = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left, and hardly a request has come lately."""
        return not self._free and not self._num_new and self._demand < 0.1

    def __iter__(self) -> Iterator[R]:
        return (one for _, one in self._free)

    def note(self, num_tokens: int) -> None:
        """A request needs so many tokens."""
        self._num_new += 1
        self._largest_new = max(self._largest_new, num_tokens)

    def take(self, num_tokens: int) -> R | None:
        """Removes and returns the oldest reservation that is large enough."""
        for index, (_, one) in enumerate(self._free):
            if one.num_tokens >= num_tokens:
                del self._free[index]
                return one
        return None

    def put(self, one: R, now_s: float) -> None:
        """Adds a reservation."""
        self._free.append((now_s, one))

    def end_interval(self) -> None:
        """The requests since the last call are those of one interval."""
        self._demand = self._demand * _DECAY + self._num_new
        if self._num_new:
            self._num_tokens = max(self._largest_new, self._num_tokens * _DECAY)
        self._num_new = self._largest_new = 0

    def missing(self, spare: Spare) -> tuple[int, int]:
        """How many reservations to make now, of how many tokens each. None for one request that came alone."""
        if self._demand < _FEW:
            return 0, 0
        num_tokens = max(1, math.ceil(self._num_tokens))
        spare_tokens = spare.num_tokens - sum(one.num_tokens for one in self)
        most = min(_MOST, math.ceil(_AHEAD * self._demand), spare.num_requests) - len(self._free)
        return max(0, int(min(most, spare_tokens / num_tokens))), num_tokens

    def unused(self, now_s: float) -> list[R]:
        """Removes and returns what no request has taken for too long."""
        found = []
        while self._free and now_s - self._free[0][0] >= _KEEP_S:
            found.append(self._free.popleft()[1])
        return found

    def clear(self) -> list[R]:
        """Removes and returns all."""
        found = list(self)
        self._free.clear()
        return found
