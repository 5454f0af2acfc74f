"""The tokens of one decode worker: one stream for all answers of this router, taken apart again here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from muxmesh.errors import MeshError, WorkerLost
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from muxmesh.rpc.status import from_rpc_error

News = decode_pb2.NewTokens | decode_pb2.DecodeResponse | MeshError
"""What an answer waits for: tokens, how its Decode call ended, or why no more come."""


class Mailbox:
    """What has come for one answer, in order. ``lost`` is done as soon as no more tokens will come."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[MeshError] = self._loop.create_future()
        self._news: deque[News] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, news: News) -> None:
        """Something came."""
        self._news.append(news)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if isinstance(news, MeshError) and not self.lost.done():
            self.lost.set_result(news)

    async def get(self) -> decode_pb2.NewTokens | decode_pb2.DecodeResponse:
        """The next that came, for one reader. Raises the error if there will be none."""
        while not self._news:
            self._reader = self._loop.create_future()
            await self._reader
        news = self._news.popleft()
        if isinstance(news, MeshError):
            raise news
        return news


class TokenStream:
    """One WatchTokens call. Owns the mailboxes of the answers that it serves; when it ends, each of them is told."""

    def __init__(self, worker: decode_pb2_grpc.DecodeServiceAsyncStub, watcher: str) -> None:
        self.watcher = watcher
        self._call = worker.WatchTokens(decode_pb2.WatchTokensRequest(watcher=watcher))
        self._answers: dict[int, Mailbox] = {}
        self._reader = asyncio.create_task(self._read(), name=f"tokens for {watcher}")

    @property
    def is_open(self) -> bool:
        """False once it has ended."""
        return not self._reader.done()

    async def opened(self) -> None:
        """Returns when the worker watches out. Raises WorkerLost, Unavailable."""
        try:
            await self._call.initial_metadata()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if self._call.done():
            raise WorkerLost("the decode worker ended the stream of its tokens")

    @contextmanager
    def answer(self, lease_id: int) -> Iterator[Mailbox]:
        """The mailbox of one answer, until the context ends."""
        mailbox = self._answers[lease_id] = Mailbox()
        try:
            yield mailbox
        finally:
            del self._answers[lease_id]

    def close(self) -> None:
        """Ends the call."""
        self._call.cancel()

    async def _read(self) -> None:
        reason: MeshError = WorkerLost("the decode worker ended the stream of its tokens")
        try:
            async for message in self._call:
                for new in message.answers:
                    if (mailbox := self._answers.get(new.lease_id)) is not None:
                        mailbox.put(new)
        except grpc.aio.AioRpcError as error:
            reason = from_rpc_error(error)
        except asyncio.CancelledError:
            pass
        finally:
            for mailbox in self._answers.values():
                mailbox.put(reason)
