"""How many sequences may wait, and what a request that is refused is promised. Pure; times are arguments.

**Limits.** The queue of a router holds a number of sequences; with a bound on waiting at most as many as start within
half of it. A part is kept for each model (`kept_for_models`). With API keys a tenant may have as many waiting as are
free, twice: the more the others queue, the less one of them may (dynamic threshold, Choudhury and Hahne 1998), so one
tenant alone fills two thirds and never the whole.

**Tickets.** A refusal is a position in a virtual queue behind the real one. Its delay is the number of sequences before
it divided by the rate at which waiting sequences start. Who comes back with the ticket, after the delay,
goes before everyone without one: newcomers find the positions of tickets taken that are due before the queue has been
served once. How many come back is measured, and of tickets that are out that part counts. A ticket is signed, so any
router with the secret honours it, for its tenant and model, once at each router.
"""

from __future__ import annotations

import hmac
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heappop, heappush

from muxmesh.errors import Overloaded

_TENANT_FACTOR = 2
"""A tenant may have this many sequences waiting for each position that is free."""
_RATE_WINDOW_S = 10.0
"""Over which the rate is measured at which waiting sequences start."""
_MIN_BUSY_S = 0.5
_MIN_DELAY_S, _MAX_DELAY_S = 0.05, 600.0
_MIN_GRACE_S, _GRACE = 5.0, 0.5
"""A ticket is valid from its delay on for half of it again, and for at least 5 s."""
_MISSED_S = 2.0
"""So long after its delay a position is given to others, though the ticket is still valid."""
_EARLY_S = 0.1
"""A clock of a client may be that much ahead."""
_HEADROOM = 0.1
"""Part of the limit by which holders of tickets may exceed it: the rate is an estimate."""
_ALWAYS_USED = 0.25
"""Part of the queue that newcomers fill whatever tickets are out, so that the workers never lack requests."""
_RETURN_WEIGHT = 0.01
"""Of one ticket in the mean part that comes back."""
_RETURN_DEVIATIONS = 2.0
"""Standard deviations of that mean that are added to it: too few positions would refuse those who come back."""
_MAC_BYTES = 16
_MAX_TICKETS = 100_000
"""Tickets that are out, of a router. Beyond it refusals have none."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A request that asks for positions in the queue. ``ticket``: of an earlier refusal, or empty."""

    model: str
    tenant_id: str
    num_sequences: int
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class _Ticket:
    number: str
    tenant_id: str
    num_sequences: int
    due_unix_s: float
    expires_unix_s: float

    def is_due(self, unix_s: float) -> bool:
        return unix_s >= self.due_unix_s - _EARLY_S


class StartRate:
    """Waiting sequences that start per second, while some wait: what the units can do, not what they are asked for.

    Both are means over about `_RATE_WINDOW_S` of such time.
    """

    def __init__(self) -> None:
        self._num_started = 0.0
        self._busy_s = 0.0
        self._last_s: float | None = None

    def advance(self, now_s: float, is_waiting: bool) -> None:
        """Time passes until ``now_s`` (monotonic). ``is_waiting``: whether sequences waited since the last call."""
        if is_waiting and self._last_s is not None:
            elapsed_s = max(0.0, now_s - self._last_s)
            self._num_started *= math.exp(-elapsed_s / _RATE_WINDOW_S)
            self._busy_s = self._busy_s * math.exp(-elapsed_s / _RATE_WINDOW_S) + elapsed_s
        self._last_s = now_s

    def start(self) -> None:
        """A sequence starts."""
        self._num_started += 1

    @property
    def per_s(self) -> float:
        """0 until sequences have waited for `_MIN_BUSY_S`."""
        return self._num_started / self._busy_s if self._busy_s >= _MIN_BUSY_S else 0.0


class QueueLimit:
    """Owns the counts of waiting sequences by tenant, and the tickets that are out.

    Invariant: ``_num_out`` is the sum of the sequences of ``_tickets``, ``_num_near`` that of those in ``_near``.
    """

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
        that time, or than the units have slots (``num_slots``): on an idle unit a request waits for its prefill too.
        """
        self._num_slots = num_slots
        self._most, self._secret, self._limits_tenants = limit, secret, limits_tenants
        self._longest_wait_s = longest_wait_s
        self._by_tenant: Counter[str] = Counter()
        self._num_waiting = 0
        self._rate = StartRate()
        self._tickets: dict[str, _Ticket] = {}
        """Those that are out and not missed."""
        self._later: list[tuple[float, str]] = []
        """A heap of the tickets that are due after the queue has been served once."""
        self._near: list[tuple[float, str]] = []
        """A heap of the others. Both may have tickets that came back."""
        self._near_numbers: set[str] = set()
        self._num_near: Counter[str] = Counter()
        self._num_out: Counter[str] = Counter()
        """By tenant: what one was promised keeps no other out."""
        self._used: dict[str, float] = {}
        """Those that came back, until they expire."""
        self._used_checked_unix_s = 0.0
        self._last_number = 0
        self.return_rate = 1.0
        """Mean part of the tickets that come back, the latest ones with the largest weight."""

    def enter(self, tenant_id: str, num_sequences: int, now_s: float) -> WaitingSequences:
        """Sequences of an admitted request begin to wait at ``now_s`` (monotonic)."""
        self._rate.advance(now_s, self._num_waiting > 0)
        self._by_tenant[tenant_id] += num_sequences
        self._num_waiting += num_sequences
        return WaitingSequences(self, tenant_id, num_sequences)

    def leave(self, tenant_id: str, num_sequences: int, now_s: float) -> None:
        """Sequences wait no longer."""
        self._rate.advance(now_s, self._num_waiting > 0)
        self._num_waiting -= num_sequences
        self._by_tenant[tenant_id] -= num_sequences
        if not self._by_tenant[tenant_id]:
            del self._by_tenant[tenant_id]

    def start(self) -> None:
        """A sequence that has just left has its first token."""
        self._rate.start()

    @property
    def limit(self) -> int:
        """Sequences that may wait now."""
        rate = self._rate.per_s
        if self._longest_wait_s == math.inf or not rate:
            return self._most
        return min(self._most, max(self._num_slots(), math.floor(rate * self._longest_wait_s)))

    @property
    def expected_return(self) -> float:
        """The part of the tickets for which positions are kept."""
        deviation = math.sqrt(self.return_rate * (1 - self.return_rate) * _RETURN_WEIGHT)
        return min(1.0, self.return_rate + _RETURN_DEVIATIONS * deviation)

    @property
    def num_out(self) -> int:
        """Sequences of tickets that are out."""
        return self._num_out.total()

    def check(self, newcomer: Newcomer, waiting: Mapping[str, int], now_s: float, unix_s: float) -> None:
        """Raises Overloaded, with a ticket and its delay, unless the newcomer may enter the queue.

        ``waiting``: sequences of each served model that wait.
        """
        self._rate.advance(now_s, self._num_waiting > 0)
        limit = self.limit
        self._pass_time(limit, unix_s)
        held = self._valid(newcomer, unix_s)
        if held is not None and not held.is_due(unix_s):
            raise _refused("the ticket is not due yet", held.due_unix_s - unix_s, newcomer.ticket)
        num_waiting = sum(waiting.values())
        num_near, num_out = (
            math.ceil(number[newcomer.tenant_id] * self.expected_return) for number in (self._num_near, self._num_out)
        )
        if num_waiting + newcomer.num_sequences <= limit * _ALWAYS_USED:
            num_near = 0
        num_before = num_near if held is None else -math.floor(limit * _HEADROOM)
        excess, problem = self._excess(newcomer, waiting, limit, num_before)
        if held is not None:
            self._take(held)
        if excess <= 0:
            return
        num_ahead = num_out if held is None else 0
        delay_s = self._delay_s(excess - num_before + num_ahead)
        raise _refused(problem, delay_s, self._issue(newcomer, delay_s, unix_s))

    def _excess(self, newcomer: Newcomer, waiting: Mapping[str, int], limit: int, num_before: int) -> tuple[int, str]:
        """How many sequences have to leave first, at most 0: none; and why.

        ``num_before``: positions that are kept for others; negative: that the newcomer may have beyond the limit.
        """
        num_new = newcomer.num_sequences
        excess, problem = _full(waiting, newcomer.model, num_new, limit, num_before)
        if problem is not None:
            return excess, problem
        own = self._by_tenant[newcomer.tenant_id]
        if self._limits_tenants and newcomer.tenant_id:
            most = max(1, _TENANT_FACTOR * (limit - sum(waiting.values())))
            if own and own + num_new > most:
                return own + num_new - most, (
                    f"{own} sequences of this tenant are waiting and {num_new} would be added; at most {most} may wait "
                    "now"
                )
        return 0, ""

    def _delay_s(self, excess: int) -> float:
        rate = self._rate.per_s
        return min(max(excess / rate, _MIN_DELAY_S), _MAX_DELAY_S) if rate else 1.0

    def _issue(self, newcomer: Newcomer, delay_s: float, unix_s: float) -> str:
        if len(self._tickets) >= _MAX_TICKETS:
            return ""
        self._last_number += 1
        due, valid_s = unix_s + delay_s, max(_MIN_GRACE_S, _GRACE * delay_s)
        fields = f"{self._last_number:x}-{newcomer.num_sequences:x}-{int(due * 1000):x}-{int(valid_s * 1000):x}"
        number = f"{fields}-{self._mac(fields, newcomer)}"
        self._add(_Ticket(number, newcomer.tenant_id, newcomer.num_sequences, due, due + valid_s))
        return number

    def _add(self, ticket: _Ticket) -> None:
        self._tickets[ticket.number] = ticket
        heappush(self._later, (ticket.due_unix_s, ticket.number))
        self._num_out[ticket.tenant_id] += ticket.num_sequences

    def _take(self, ticket: _Ticket) -> None:
        """A ticket is used up."""
        self._drop(ticket.number)
        self.return_rate += _RETURN_WEIGHT * (1 - self.return_rate)
        self._used[ticket.number] = ticket.expires_unix_s

    def _drop(self, number: str) -> bool:
        """Whether the ticket was out."""
        ticket = self._tickets.pop(number, None)
        if ticket is None:
            return False
        _subtract(self._num_out, ticket)
        if number in self._near_numbers:
            self._near_numbers.remove(number)
            _subtract(self._num_near, ticket)
        return True

    def _pass_time(self, limit: int, unix_s: float) -> None:
        """Tickets become near, and are missed if they do not come back in time."""
        rate = self._rate.per_s
        served_once_s = min(limit / rate, _MAX_DELAY_S) if rate else _MAX_DELAY_S
        while self._later and self._later[0][0] <= unix_s + served_once_s:
            entry = heappop(self._later)
            ticket = self._tickets.get(entry[1])
            if ticket is not None:
                heappush(self._near, entry)
                self._near_numbers.add(ticket.number)
                self._num_near[ticket.tenant_id] += ticket.num_sequences
        while self._near and self._near[0][0] <= unix_s - _MISSED_S:
            if self._drop(heappop(self._near)[1]):
                self.return_rate -= _RETURN_WEIGHT * self.return_rate
        if len(self._used) > _MAX_TICKETS or unix_s >= self._used_checked_unix_s + _MISSED_S:
            self._used_checked_unix_s = unix_s
            self._used = {number: expires for number, expires in self._used.items() if expires > unix_s}

    def _valid(self, newcomer: Newcomer, unix_s: float) -> _Ticket | None:
        """The ticket of a newcomer; None if it has none that counts: then it is one without a ticket."""
        fields, _, mac = newcomer.ticket.rpartition("-")
        is_signed = hmac.compare_digest(_encoded(mac), _encoded(self._mac(fields, newcomer)))
        if not is_signed or newcomer.ticket in self._used:
            return None
        _, num_sequences, due_ms, valid_ms = (int(part, 16) for part in fields.split("-"))  # signed, so well-formed
        due_unix_s = due_ms / 1000
        ticket = _Ticket(newcomer.ticket, newcomer.tenant_id, num_sequences, due_unix_s, due_unix_s + valid_ms / 1000)
        return ticket if ticket.expires_unix_s > unix_s and newcomer.num_sequences <= num_sequences else None

    def _mac(self, fields: str, newcomer: Newcomer) -> str:
        signed = _encoded(f"{fields} {newcomer.tenant_id} {newcomer.model}")
        return blake2b(signed, key=self._secret, digest_size=_MAC_BYTES, person=b"ticket").hexdigest()


@dataclass(slots=True)
class WaitingSequences:
    """The sequences of one request that wait. `end` has to be called, however the request ends.

    Times are monotonic.
    """

    _limit: QueueLimit
    _tenant_id: str
    _num_left: int

    def start(self, now_s: float) -> None:
        """One of them has its first token."""
        if self._num_left:
            self._leave(1, now_s)
            self._limit.start()

    def end(self, now_s: float) -> None:
        """None of them waits any longer."""
        self._leave(self._num_left, now_s)

    def _leave(self, number: int, now_s: float) -> None:
        if number:
            self._num_left -= number
            self._limit.leave(self._tenant_id, number, now_s)


def check_total(waiting: Mapping[str, int], model: str, num_sequences: int, limit: int) -> None:
    """Raises Overloaded unless ``num_sequences`` further ones of ``model`` may wait, whatever was promised to others.

    ``waiting``: sequences of each served model that wait. The simulator refuses requests by it: none comes back.
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
    kept_for += [f"{num_promised} for earlier requests that were told to come back"] if num_promised > 0 else []
    with_kept = f", with {' and '.join(kept_for)}" if kept_for else ""
    return excess, (
        f"{num_waiting} sequences are waiting and {num_new} would be added; at most {limit} may wait{with_kept}"
    )


def _subtract(numbers: Counter[str], ticket: _Ticket) -> None:
    numbers[ticket.tenant_id] -= ticket.num_sequences
    if not numbers[ticket.tenant_id]:
        del numbers[ticket.tenant_id]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _refused(problem: str, delay_s: float, ticket: str) -> Overloaded:
    return Overloaded(f"{problem}; try again in {delay_s:.3g} s", delay_s, ticket)
