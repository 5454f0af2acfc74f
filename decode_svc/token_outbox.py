"""Tokens that wait to be sent to routers. Those of one step, for all sequences of one router, go into one message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from muxmesh.errors import Unavailable
from muxmesh.internal.v1 import decode_pb2
from muxmesh.quoting import quoted


class TokenOutbox:
    """Owns the tokens that are not sent yet to one watcher, a router's WatchTokens call.

    It has no bound of its own: the outputs of the watcher's sequences bound it.
    """

    def __init__(self) -> None:
        self._pending: list[decode_pb2.NewTokens] = []
        self._not_empty = asyncio.Event()

    def put(self, new: decode_pb2.NewTokens) -> None:
        """Appends tokens to the next message."""
        self._pending.append(new)
        self._not_empty.set()

    async def take(self) -> list[decode_pb2.NewTokens]:
        """Waits until there are pending tokens, and removes and returns all of them, oldest first."""
        await self._not_empty.wait()
        self._not_empty.clear()
        taken, self._pending = self._pending, []
        return taken


class TokenOutboxes:
    """Owns the outboxes of the connected watchers, by watcher id."""

    def __init__(self) -> None:
        self._outboxes: dict[str, TokenOutbox] = {}

    @contextmanager
    def watching(self, watcher: str) -> Iterator[TokenOutbox]:
        """Keeps the watcher connected, with a new outbox, until the context ends."""
        self._outboxes[watcher] = TokenOutbox()
        try:
            yield self._outboxes[watcher]
        finally:
            del self._outboxes[watcher]

    def outbox(self, watcher: str) -> TokenOutbox:
        """Returns the outbox of a watcher. Raises Unavailable if it is not connected."""
        if watcher not in self._outboxes:
            raise Unavailable(f"no watcher {quoted(watcher)} is connected")
        return self._outboxes[watcher]
