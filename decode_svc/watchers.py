"""Tokens on their way to routers: what one step gives all answers of a router leaves in one message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from muxmesh.errors import Unavailable
from muxmesh.internal.v1 import decode_pb2


class Outbox:
    """Owns what one watcher has not been sent yet. Whoever puts does not wait: an answer is never larger than it is."""

    def __init__(self) -> None:
        self._waiting: list[decode_pb2.NewTokens] = []
        self._there_is_some = asyncio.Event()

    def put(self, new: decode_pb2.NewTokens) -> None:
        """Goes out with the next message, after what was put before."""
        self._waiting.append(new)
        self._there_is_some.set()

    async def take(self) -> list[decode_pb2.NewTokens]:
        """Everything that waits, as soon as there is something."""
        await self._there_is_some.wait()
        self._there_is_some.clear()
        taken, self._waiting = self._waiting, []
        return taken


class Watchers:
    """Owns the outboxes of the watchers that are there."""

    def __init__(self) -> None:
        self._outboxes: dict[str, Outbox] = {}

    @contextmanager
    def watching(self, watcher: str) -> Iterator[Outbox]:
        """The watcher is there until the context ends."""
        self._outboxes[watcher] = Outbox()
        try:
            yield self._outboxes[watcher]
        finally:
            del self._outboxes[watcher]

    def outbox(self, watcher: str) -> Outbox:
        """Raises Unavailable if the watcher is not there (any more)."""
        if watcher not in self._outboxes:
            raise Unavailable(f"nobody watches as {watcher!r}")
        return self._outboxes[watcher]
