"""How many sequences may wait. Pure; times are arguments.

The queue of a router holds a number of sequences; with a bound on waiting at most as many as start within half of it. A
part is kept for each model (`kept_for_models`). With API keys a tenant may have as many waiting as are free, twice: the
more the others queue, the less one of them may (dynamic threshold, Choudhury and Hahne 1998), so one tenant alone fills
two thirds and never the whole.

A refusal is a position in a virtual queue behind the real one, with a ticket (`router.tickets`). Its delay is the
number of sequences before it divided by the rate at which waiting sequences start. A request that is sent again with
the ticket after the delay precedes those of its tenant without one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from muxmesh.errors import Overloaded
from router.tickets import Newcomer, Tickets

_TENANT_FACTOR = 2
"""A tenant may have this many sequences waiting for each position that is free."""
_RATE_WINDOW_S = 10.0
"""Over which the rate is measured at which waiting sequences start."""
_MIN_BUSY_S = 0.5
_FRESH_S = 2.0
"""After the last start the rate counts for that long in the refusal of deadlines."""
_MIN_DELAY_S, _MAX_DELAY_S = 0.05, 600.0
_HEADROOM = 0.1
"""Part of the limit by which requests with tickets may exceed it: the rate is an estimate."""
_WAIT_HEADROOM = 0.5
"""The same of a limit that follows from a bound on waiting, of which it is only half."""
_ALWAYS_USED = 0.25
"""Part of the queue that newcomers fill whatever tickets are out, so that the workers never lack requests."""


class StartRate:
    """Waiting sequences that start per second, while some wait: what the units can do, not what they are asked for.

    Both are means over about `_RATE_WINDOW_S` of such time.
    """

    def __init__(self) -> None:
        self._num_started = 0.0
        self._busy_s = 0.0
        self._last_s: float | None = None
        self._started_s: float | None = None

    def advance(self, now_s: float, is_waiting: bool) -> None:
        """Time passes until ``now_s`` (monotonic). ``is_waiting``: whether sequences waited since the last call."""
        if is_waiting and self._last_s is not None:
            elapsed_s = max(0.0, now_s - self._last_s)
            self._num_started *= math.exp(-elapsed_s / _RATE_WINDOW_S)
            self._busy_s = self._busy_s * math.exp(-elapsed_s / _RATE_WINDOW_S) + elapsed_s
        self._last_s = now_s

    def start(self) -> None:
        """A sequence starts, at the time of the last `advance`."""
        self._num_started += 1
        self._started_s = self._last_s

    def is_fresh(self, now_s: float) -> bool:
        """Whether a sequence has started within `_FRESH_S`."""
        return self._started_s is not None and now_s - self._started_s <= _FRESH_S

    @property
    def per_s(self) -> float:
        """0 until sequences have waited for `_MIN_BUSY_S`."""
        return self._num_started / self._busy_s if self._busy_s >= _MIN_BUSY_S else 0.0


class QueueLimit:
    """Owns the counts of waiting sequences by tenant, and the rate at which they start."""

    def __init__(
        self,
        limit: int,
        secret: bytes,
        limits_tenants: bool,
        longest_wait_s: float = math.inf,
        num_slots: Callable[[], int] = lambda: 1,
    ) -> None:
        """``limit``: sequences that may wait. ``secret``: signs tickets; the same for all routers of a mesh.

        ``limits_tenants``: whether callers are told apart. ``longest_wait_s``: no more sequences may wait than start in
        that time, or than are free of the slots of all units (``num_slots``): on an idle unit a request waits for its
        prefill too.
        """
        self._num_slots = num_slots
        self._most, self._limits_tenants, self._longest_wait_s = limit, limits_tenants, longest_wait_s
        self.tickets = Tickets(secret)
        self._by_tenant: Counter[str] = Counter()
        self._num_running = 0
        self._rate = StartRate()

    def enter(self, tenant_id: str, num_sequences: int, now_s: float) -> WaitingSequences:
        """Sequences of an admitted request begin to wait at ``now_s`` (monotonic)."""
        self._rate.advance(now_s, bool(self._by_tenant))
        self._by_tenant[tenant_id] += num_sequences
        return WaitingSequences(self, tenant_id, num_sequences)

    def leave(self, tenant_id: str, num_sequences: int, now_s: float) -> None:
        """Sequences wait no longer."""
        self._rate.advance(now_s, bool(self._by_tenant))
        self._by_tenant[tenant_id] -= num_sequences
        if not self._by_tenant[tenant_id]:
            del self._by_tenant[tenant_id]

    def start(self) -> None:
        """A sequence that has just left has its first token."""
        self._num_running += 1
        self._rate.start()

    def end(self, num_sequences: int) -> None:
        """Sequences that have started have ended."""
        self._num_running -= num_sequences

    @property
    def limit(self) -> int:
        """Sequences that may wait now."""
        return min(self._most, self._limit_by_wait)

    @property
    def _limit_with_ticket(self) -> int:
        """Sequences that may wait if the last of them has a ticket that is due."""
        return math.floor(min(self._most * (1 + _HEADROOM), self._limit_by_wait * (1 + _WAIT_HEADROOM)))

    @property
    def _limit_by_wait(self) -> int:
        """As many as start within the longest wait, or as are free slots; `_most` without such a bound."""
        rate = self._rate.per_s
        if self._longest_wait_s == math.inf or not rate:
            return self._most
        return max(1, self._num_slots() - self._num_running, math.floor(rate * self._longest_wait_s))

    def check(self, newcomer: Newcomer, waiting: Mapping[str, int], now_s: float, unix_s: float) -> None:
        """Raises Overloaded, with a ticket and its delay, unless the newcomer may enter the queue.

        ``waiting``: sequences of each served model that wait.
        """
        self._rate.advance(now_s, bool(self._by_tenant))
        limit, rate = self.limit, self._rate.per_s
        self.tickets.pass_time(min(limit / rate, _MAX_DELAY_S) if rate else _MAX_DELAY_S, unix_s)
        held = self.tickets.valid(newcomer, unix_s)
        is_due = held is not None and held.is_due(unix_s)
        num_kept = 0
        if is_due:
            num_kept = limit - self._limit_with_ticket
        elif sum(waiting.values()) + newcomer.num_sequences > limit * _ALWAYS_USED:
            num_kept = self.tickets.num_kept(newcomer.tenant_id)
        excess, problem = self._excess(newcomer, waiting, limit, num_kept)
        if held is not None and excess > 0 and not is_due:
            raise _refused("the ticket is not due yet", held.due_unix_s - unix_s, newcomer.ticket)
        if held is not None:
            self.tickets.use(held)
        if excess <= 0:
            return
        num_ahead = 0 if is_due else self.tickets.num_ahead(newcomer.tenant_id)
        delay_s = self._delay_s(excess - num_kept + num_ahead)  # a refused holder: until the headroom is free again
        raise _refused(problem, delay_s, self.tickets.issue(newcomer, delay_s, unix_s))

    def check_deadline(self, num_before: int, left_s: float, now_s: float) -> None:
        """Raises Overloaded, without a ticket, if a newcomer would start more than ``left_s`` from now.

        ``num_before``: sequences of one model on one unit that start first. The rate is that of all units, so the
        estimate is rather too early. There is none if nothing has started lately, as of a model that wakes up.
        """
        rate = self._rate.per_s
        if not rate or left_s <= 0 or num_before <= rate * left_s or not self._rate.is_fresh(now_s):
            return
        delay_s = self._delay_s(math.ceil(num_before - rate * left_s))
        problem = (
            f"{num_before} sequences start before it, so it would start in about {num_before / rate:.3g} s, after its "
            f"deadline, which is in {left_s:.3g} s"
        )
        raise _refused(problem, delay_s, "")

    def _excess(self, newcomer: Newcomer, waiting: Mapping[str, int], limit: int, num_kept: int) -> tuple[int, str]:
        """How many sequences have to leave first, at most 0: none; and why.

        ``num_kept``: positions that are kept for tickets; negative: that the newcomer may have beyond the limit.
        """
        num_new = newcomer.num_sequences
        excess, problem = _full(waiting, newcomer.model, num_new, limit, num_kept)
        if problem is not None:
            return excess, problem
        own = self._by_tenant[newcomer.tenant_id]
        if self._limits_tenants and newcomer.tenant_id:
            most = max(1, _TENANT_FACTOR * (limit - min(num_kept, 0) - sum(waiting.values())))
            if own and own + num_new > most:
                return own + num_new - most, (
                    f"{own} sequences of this tenant are waiting and {num_new} would be added; at most {most} may wait "
                    "now"
                )
        return 0, ""

    def _delay_s(self, excess: int) -> float:
        rate = self._rate.per_s
        return min(max(excess / rate, _MIN_DELAY_S), _MAX_DELAY_S) if rate else 1.0


@dataclass(slots=True)
class WaitingSequences:
    """The sequences of one request that wait. `end` has to be called, however the request ends.

    Times are monotonic.
    """

    _limit: QueueLimit
    _tenant_id: str
    _num_left: int
    _num_started: int = 0

    def start(self, now_s: float) -> None:
        """One of them has its first token."""
        if self._num_left:
            self._leave(1, now_s)
            self._num_started += 1
            self._limit.start()

    def end(self, now_s: float) -> None:
        """The request has ended."""
        self._leave(self._num_left, now_s)
        self._limit.end(self._num_started)
        self._num_started = 0

    def _leave(self, number: int, now_s: float) -> None:
        if number:
            self._num_left -= number
            self._limit.leave(self._tenant_id, number, now_s)


def check_total(waiting: Mapping[str, int], model: str, num_sequences: int, limit: int) -> None:
    """Raises Overloaded unless ``num_sequences`` further ones of ``model`` may wait, whatever was promised to others.

    ``waiting``: sequences of each served model that wait. The simulator refuses requests by it.
    """
    if (problem := _full(waiting, model, num_sequences, limit)[1]) is not None:
        raise Overloaded(problem)


def kept_for_models(waiting: Mapping[str, int], model: str, limit: int) -> int:
    """Positions that newcomers of ``model`` do not get: half of the limit is divided equally among the models.

    So requests of one model cannot fill the queue for the others: the unused part of each other model counts as taken.
    """
    own_part = limit // (2 * len(waiting))
    return sum(max(0, own_part - num) for name, num in waiting.items() if name != model)


def _full(
    waiting: Mapping[str, int], model: str, num_new: int, limit: int, num_promised: int = 0
) -> tuple[int, str | None]:
    """How many sequences have to leave before ``num_new`` ones of ``model`` may enter, and why; None: they may."""
    num_waiting, kept = sum(waiting.values()), kept_for_models(waiting, model, limit)
    excess = num_waiting + kept + num_promised + num_new - limit
    if excess <= 0:
        return 0, None
    kept_for = [f"{kept} kept for other models"] if kept else []
    kept_for += [f"{num_promised} for tickets of earlier requests"] if num_promised > 0 else []
    with_kept = f", with {' and '.join(kept_for)}" if kept_for else ""
    return excess, (
        f"{num_waiting} sequences are waiting and {num_new} would be added; at most {limit} may wait{with_kept}"
    )


def _refused(problem: str, delay_s: float, ticket: str) -> Overloaded:
    return Overloaded(f"{problem}; try again in {delay_s:.3g} s", delay_s, ticket)
