"""What clients of the public API may use of its server: connections, calls, memory for messages, time to read.

A client is known by its address: a host that opens many connections is one client. `CallLimiter` counts its calls,
`RequestReader` bounds the memory of messages that arrive slowly; neither knows what a call is about.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import unquote

import grpc

from muxmesh.errors import Overloaded, RequestAborted
from muxmesh.rpc.limits import keepalive_options

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Context = grpc.aio.ServicerContext[Any, Any]

_READ_BYTES = 128 * 1024 * 1024
"""Memory for messages that have not arrived completely."""
_MIN_READS = 8
_MAX_READS = 1024
_READ_S = 0.25
"""A message that takes longer is aborted if others wait to be read."""
_SHORT_READ_S = 0.1
"""The same if one of them has waited for `_MAX_WAIT_S`."""
_MAX_WAIT_S = 0.1
_TURN_S = 0.005
_HANDSHAKE_S = 10.0
_KEEPALIVE_TIME_S = 15.0
_KEEPALIVE_TIMEOUT_S = 10.0
_IPV6_SITE_BITS = 64
"""A host has all addresses of such a network to choose from."""


@dataclass(frozen=True, slots=True)
class PublicLimits:
    """Limits of a public server.

    ``max_message_bytes``: of a request. ``max_connections``: of all clients. ``max_calls``: in progress for one client,
    and on one connection; clients in the networks ``exempt`` may open more connections. A connection without calls ends
    after ``max_idle_s``; a call whose request does not arrive, or whose output is not read, after ``slow_client_s``.
    """

    max_message_bytes: int
    max_connections: int
    max_calls: int
    max_idle_s: float
    slow_client_s: float
    exempt: tuple[Network, ...] = ()

    def server_options(self) -> tuple[tuple[str, int], ...]:
        """The options of a gRPC server that enforce what gRPC itself can enforce."""
        return (
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.max_concurrent_streams", self.max_calls),
            ("grpc.max_connection_idle_ms", int(1000 * self.max_idle_s)),
            ("grpc.server_handshake_timeout_ms", int(1000 * _HANDSHAKE_S)),
            # Above it gRPC rejects calls at random, anybody's.
            ("grpc.server.max_pending_requests", self.max_calls),
            ("grpc.server.max_pending_requests_hard_limit", 2 * self.max_calls),
            # Fixed windows: what a client sends before its message is read does not grow with the bandwidth.
            ("grpc.http2.bdp_probe", 0),
            *keepalive_options(_KEEPALIVE_TIME_S, _KEEPALIVE_TIMEOUT_S),
        )


@functools.lru_cache(maxsize=4096)
def client_of(peer: str) -> str | None:
    """The client of a peer as gRPC writes it (``ipv4:192.0.2.1:5001``), or None for a unix socket.

    An IPv6 client is a /64 network.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(address), _IPV6_SITE_BITS), strict=False))
        address = address.ipv4_mapped
    return str(address)


class CallLimiter:
    """Limits the calls in progress of each client."""

    def __init__(self, max_calls: int, exempt: tuple[Network, ...]) -> None:
        self._max_calls = max_calls
        self._exempt = exempt
        self._num_calls: Counter[str] = Counter()

    @contextmanager
    def counted(self, peer: str) -> Iterator[None]:
        """Counts a call while it is in progress. Raises Overloaded if its client has too many."""
        client = client_of(peer)
        if client is None or self._is_exempt(client):
            yield
            return
        num_calls = self._num_calls[client]
        if num_calls >= self._max_calls:
            raise Overloaded(f"the client {client} has {num_calls} calls in progress; at most {self._max_calls}")
        self._num_calls[client] += 1
        try:
            yield
        finally:
            self._num_calls[client] -= 1
            if not self._num_calls[client]:
                del self._num_calls[client]

    def _is_exempt(self, client: str) -> bool:
        if not self._exempt:
            return False
        network = ipaddress.ip_network(client)
        return any(network.version == one.version and network.overlaps(one) for one in self._exempt)


class RequestReader:
    """Reads the requests of calls, a bounded number at the same time. The oldest read ends if others wait.

    Requests are read in the order of the calls. While the first one has waited for `_MAX_WAIT_S`, the newest is
    next, so that a small message does not wait for all half-sent ones before it (adaptive LIFO: Maurer, "Fail at
    Scale", ACM Queue 13(8), 2015).
    """

    def __init__(self, limits: PublicLimits) -> None:
        fitting = _READ_BYTES // limits.max_message_bytes
        self._capacity = min(max(fitting, _MIN_READS), _MAX_READS)
        self._slow_client_s = limits.slow_client_s
        self._reading: dict[asyncio.Timeout, float] = {}
        """When each read started, in this order."""
        self._waiting: dict[asyncio.Timeout, _Waiting] = {}
        """The calls that wait, in the order of their arrival."""
        self._timer: asyncio.TimerHandle | None = None
        """Set while calls wait."""

    async def read(self, context: Context) -> bytes | None:
        """The next message of a call; None after the last one.

        Raises RequestAborted if the message does not arrive in time, Overloaded if others wait and it is slow, or
        if it could not begin to be read in that time.
        """
        try:
            async with asyncio.timeout(self._slow_client_s) as limit:
                if self._waiting or len(self._reading) >= self._capacity:
                    await self._wait(limit)
                else:
                    self._reading[limit] = asyncio.get_running_loop().time()
                raw = await context.read()
        except TimeoutError:
            if limit not in self._reading:
                raise Overloaded("the request arrives too slowly while others wait to be received") from None
            raise RequestAborted(f"the request did not arrive within {self._slow_client_s:g} s") from None
        finally:
            self._reading.pop(limit, None)
            self._start_waiting()
        return raw if isinstance(raw, bytes) else None

    async def _wait(self, limit: asyncio.Timeout) -> None:
        """Returns when the call of ``limit`` may read; ``limit`` counts from then."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting[limit] = _Waiting(loop.time(), loop.create_future())
        self._start_waiting()
        try:
            await waiting.turn
        finally:
            self._waiting.pop(limit, None)

    def _start_waiting(self) -> None:
        """Starts as many reads as there is capacity for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        now_s = asyncio.get_running_loop().time()
        while self._waiting and len(self._reading) < self._capacity:
            limit = self._next(now_s)
            turn = self._waiting.pop(limit).turn
            if not turn.done():  # else its call was cancelled
                self._reading[limit] = now_s
                limit.reschedule(now_s + self._slow_client_s)
                turn.set_result(None)
        if self._waiting:
            self._set_timer()

    def _next(self, now_s: float) -> asyncio.Timeout:
        first = next(iter(self._waiting))
        return first if now_s < self._waiting[first].since_s + _MAX_WAIT_S else next(reversed(self._waiting))

    def _set_timer(self) -> None:
        loop = asyncio.get_running_loop()

        def end_later() -> None:
            # What has arrived while the loop was busy is read in this turn of the loop.
            self._timer = loop.call_later(_TURN_S, self._end_overdue, loop.time())

        self._timer = loop.call_at(self._due_at_s(next(iter(self._reading.values()))), end_later)

    def _due_at_s(self, started_at_s: float) -> float:
        """When a read has to end for those that wait."""
        first = next(iter(self._waiting.values()))
        soon_s = max(started_at_s + _SHORT_READ_S, first.since_s + _MAX_WAIT_S)
        return min(soon_s, started_at_s + _READ_S)

    def _end_overdue(self, now_s: float) -> None:
        """Ends the reads that were due at ``now_s``, at most one for each call that waits."""
        for limit, started_at_s in list(islice(self._reading.items(), len(self._waiting))):
            if self._due_at_s(started_at_s) > now_s:
                break
            del self._reading[limit]
            if not limit.expired():
                limit.reschedule(now_s)
        self._start_waiting()


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A call that waits for its turn to read: since when, and what is set then."""

    since_s: float
    turn: asyncio.Future[None]
