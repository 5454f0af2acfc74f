"""What clients of the public API may use of its server: connections, calls, memory for messages, time to read.

A client is known by its address: a host that opens many connections is one client. `ClientCalls` counts, `Receptions`
bounds the memory of messages that arrive slowly; neither knows what a call is about.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc

from muxmesh.errors import Overloaded, RequestAborted

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Context = grpc.aio.ServicerContext[Any, Any]

_RECEPTION_BYTES = 128 * 1024 * 1024
"""Memory for messages that have not arrived completely."""
_MIN_RECEPTIONS = 8
_MAX_RECEPTIONS = 1024
_MIN_RECEPTION_S = 0.25
"""A message that takes longer gives its memory to the next one if there is no more."""
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
            ("grpc.keepalive_time_ms", int(1000 * _KEEPALIVE_TIME_S)),
            ("grpc.keepalive_timeout_ms", int(1000 * _KEEPALIVE_TIMEOUT_S)),
            ("grpc.http2.ping_timeout_ms", int(1000 * _KEEPALIVE_TIMEOUT_S)),
            ("grpc.http2.max_pings_without_data", 0),
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


class ClientCalls:
    """Counts the calls in progress of each client."""

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


class Receptions:
    """Receives messages, a bounded number at the same time. The oldest one is aborted if others wait for it."""

    def __init__(self, limits: PublicLimits) -> None:
        fitting = _RECEPTION_BYTES // limits.max_message_bytes
        self._capacity = min(max(fitting, _MIN_RECEPTIONS), _MAX_RECEPTIONS)
        self._slow_client_s = limits.slow_client_s
        self._turn = asyncio.Lock()
        self._ended = asyncio.Event()
        self._receiving: dict[asyncio.Timeout, float] = {}
        """Time of its start, in order of the starts."""

    async def read(self, context: Context) -> bytes | None:
        """The next message of a call; None after the last one.

        Raises RequestAborted if the message does not arrive in time, Overloaded if it is slow and others wait.
        """
        loop = asyncio.get_running_loop()
        if len(self._receiving) >= self._capacity or self._turn.locked():
            async with self._turn:
                await self._until_free()
        started_at_s = loop.time()
        patience = asyncio.timeout(self._slow_client_s)
        try:
            async with patience:
                self._receiving[patience] = started_at_s
                raw = await context.read()
        except TimeoutError:
            if loop.time() - started_at_s < self._slow_client_s:
                raise Overloaded("the request arrives too slowly while others wait to be received") from None
            raise RequestAborted(f"the request did not arrive within {self._slow_client_s:g} s") from None
        finally:
            self._receiving.pop(patience, None)
            self._ended.set()
        return raw if isinstance(raw, bytes) else None

    async def _until_free(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._receiving) >= self._capacity:
            oldest, started_at_s = next(iter(self._receiving.items()))
            patience_s = started_at_s + _MIN_RECEPTION_S - loop.time()
            if patience_s <= 0:
                del self._receiving[oldest]
                if not oldest.expired():
                    oldest.reschedule(loop.time())
                return
            self._ended.clear()
            try:
                async with asyncio.timeout(patience_s):
                    await self._ended.wait()
            except TimeoutError:
                continue
