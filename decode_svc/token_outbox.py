"""Tokens on their way to routers: those of one step for all sequences of a router leave in one message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from muxmesh.errors import Unavailable
from muxmesh.internal.v1 import decode_pb2


class TokenOutbox:
    """Owns the tokens that one watcher has not been sent yet. Bounded by the outputs of its sequences."""

    def __init__(self) -> None:
        self._pending: list[decode_pb2.NewTokens] = []
        self._not_empty = asyncio.Event()

    def put(self, new: decode_pb2.NewTokens) -> None:
        """Appends tokens to the next message."""
        self._pending.append(new)
        self._not_empty.set()

    async def take(self) -> list[decode_pb2.NewTokens]:
        """All pending tokens, once there are any."""
        await self._not_empty.wait()
        self._not_empty.clear()
        taken, self._pending = self._pending, []
        return taken


class TokenOutboxes:
    """Owns the outboxes of connected watchers."""

    def __init__(self) -> None:
        self._outboxes: dict[str, TokenOutbox] = {}

    @contextmanager
    def watching(self, watcher: str) -> Iterator[TokenOutbox]:
        """The watcher is connected until the context ends."""
        self._outboxes[watcher] = TokenOutbox()
        try:
            yield self._outboxes[watcher]
        finally:
            del self._outboxes[watcher]

    def outbox(self, watcher: str) -> TokenOutbox:
        """The outbox of a watcher. Raises Unavailable if it is not connected."""
        if watcher not in self._outboxes:
            raise Unavailable(f"no watcher {watcher!r} is connected")
        return self._outboxes[watcher]
