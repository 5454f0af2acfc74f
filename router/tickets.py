"""Tickets: promises to requests that were refused, which have positions in a virtual queue. Pure; times are arguments.

A ticket is signed, so any router with the secret honours it, for its tenant and model, for at most as many sequences,
and once at each router. Positions are kept for tickets that are near: due before the queue has been served once. Which
part of the tickets is used is measured, and positions are kept for that part.
"""

from __future__ import annotations

import hmac
import math
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heappop, heappush

_MIN_GRACE_S, _GRACE = 5.0, 0.5
"""A ticket is valid from its delay on for half of it again, and for at least 5 s."""
_MISSED_S = 2.0
"""So long after its delay a position is given to others, though the ticket is still valid."""
_EARLY_S = 0.1
"""A clock of a client may be that much ahead."""
_RETURN_WEIGHT = 0.01
"""Of one ticket in the mean part that is used."""
_RETURN_DEVIATIONS = 2.0
"""Standard deviations of that mean that are added to it: with too few positions, tickets would be refused."""
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
class Ticket:
    """``text``: as the client has it."""

    text: str
    tenant_id: str
    num_sequences: int
    due_unix_s: float
    expires_unix_s: float

    def is_due(self, unix_s: float) -> bool:
        """Whether its delay has passed."""
        return unix_s >= self.due_unix_s - _EARLY_S


class Tickets:
    """Owns the tickets of one router that are out: issued, and neither used nor missed.

    Invariant: ``_num_out`` has the sequences of ``_out`` by tenant, ``_num_near`` those of ``_near_texts`` among them.
    """

    def __init__(self, secret: bytes) -> None:
        """``secret``: the same for all routers of a mesh."""
        self._secret = secret
        self._out: dict[str, Ticket] = {}
        self._later: list[tuple[float, str]] = []
        self._near: list[tuple[float, str]] = []
        """Heaps of tickets by their times. Both may have tickets that are no longer out."""
        self._near_texts: set[str] = set()
        self._num_near: Counter[str] = Counter()
        self._num_out: Counter[str] = Counter()
        self._used: dict[str, float] = {}
        """Used tickets → when they expire (unix time)."""
        self._used_checked_unix_s = 0.0
        self._last_number = 0
        self.return_rate = 1.0
        """Mean part of the tickets that are used, the latest ones with the largest weight."""

    @property
    def num_out(self) -> int:
        """Sequences of all tickets that are out."""
        return self._num_out.total()

    @property
    def expected_return(self) -> float:
        """The part of the tickets for which positions are kept."""
        deviation = math.sqrt(self.return_rate * (1 - self.return_rate) * _RETURN_WEIGHT)
        return min(1.0, self.return_rate + _RETURN_DEVIATIONS * deviation)

    def num_kept(self, tenant_id: str) -> int:
        """Positions that are kept from newcomers of a tenant for its tickets that are near."""
        return math.ceil(self._num_near[tenant_id] * self.expected_return)

    def num_ahead(self, tenant_id: str) -> int:
        """Positions of all tickets of a tenant in the virtual queue."""
        return math.ceil(self._num_out[tenant_id] * self.expected_return)

    def issue(self, newcomer: Newcomer, delay_s: float, unix_s: float) -> str:
        """A ticket that is due after ``delay_s``; an empty text if too many are out."""
        if len(self._out) >= _MAX_TICKETS:
            return ""
        self._last_number += 1
        due, valid_s = unix_s + delay_s, max(_MIN_GRACE_S, _GRACE * delay_s)
        fields = f"{self._last_number:x}-{newcomer.num_sequences:x}-{int(due * 1000):x}-{int(valid_s * 1000):x}"
        text = f"{fields}-{self._mac(fields, newcomer)}"
        ticket = Ticket(text, newcomer.tenant_id, newcomer.num_sequences, due, due + valid_s)
        self._out[text] = ticket
        heappush(self._later, (ticket.due_unix_s, text))
        self._num_out[ticket.tenant_id] += ticket.num_sequences
        return text

    def valid(self, newcomer: Newcomer, unix_s: float) -> Ticket | None:
        """The ticket of a newcomer; None if it has none that counts: then it is one without a ticket."""
        fields, _, mac = newcomer.ticket.rpartition("-")
        is_signed = hmac.compare_digest(_encoded(mac), _encoded(self._mac(fields, newcomer)))
        if not is_signed or newcomer.ticket in self._used:
            return None
        _, num_sequences, due_ms, valid_ms = (int(part, 16) for part in fields.split("-"))  # signed, so well-formed
        due_unix_s = due_ms / 1000
        ticket = Ticket(newcomer.ticket, newcomer.tenant_id, num_sequences, due_unix_s, due_unix_s + valid_ms / 1000)
        return ticket if ticket.expires_unix_s > unix_s and newcomer.num_sequences <= num_sequences else None

    def use(self, ticket: Ticket) -> None:
        """A ticket is used up, of whichever router it is."""
        self._remove(ticket.text)
        self.return_rate += _RETURN_WEIGHT * (1 - self.return_rate)
        self._used[ticket.text] = ticket.expires_unix_s

    def pass_time(self, served_once_s: float, unix_s: float) -> None:
        """Tickets become near, and are missed if they are not used in time.

        ``served_once_s``: seconds until all that waits now has started.
        """
        while self._later and self._later[0][0] <= unix_s + served_once_s:
            entry = heappop(self._later)
            ticket = self._out.get(entry[1])
            if ticket is not None:
                heappush(self._near, entry)
                self._near_texts.add(ticket.text)
                self._num_near[ticket.tenant_id] += ticket.num_sequences
        while self._near and self._near[0][0] <= unix_s - _MISSED_S:
            if self._remove(heappop(self._near)[1]):
                self.return_rate -= _RETURN_WEIGHT * self.return_rate
        if len(self._used) > _MAX_TICKETS or unix_s >= self._used_checked_unix_s + _MISSED_S:
            self._used_checked_unix_s = unix_s
            self._used = {text: expires_s for text, expires_s in self._used.items() if expires_s > unix_s}

    def _remove(self, text: str) -> bool:
        """Whether the ticket was out."""
        ticket = self._out.pop(text, None)
        if ticket is None:
            return False
        _subtract(self._num_out, ticket)
        if text in self._near_texts:
            self._near_texts.remove(text)
            _subtract(self._num_near, ticket)
        return True

    def _mac(self, fields: str, newcomer: Newcomer) -> str:
        signed = _encoded(f"{fields} {newcomer.tenant_id} {newcomer.model}")
        return blake2b(signed, key=self._secret, digest_size=_MAC_BYTES, person=b"ticket").hexdigest()


def _subtract(numbers: Counter[str], ticket: Ticket) -> None:
    numbers[ticket.tenant_id] -= ticket.num_sequences
    if not numbers[ticket.tenant_id]:
        del numbers[ticket.tenant_id]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
