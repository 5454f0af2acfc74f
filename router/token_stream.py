"""The tokens of one decode worker: one stream for all sequences of this router, divided into a mailbox for each.

Knows leases only as numbers, and does not check the order of tokens (`router.attempt`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from muxmesh.errors import MeshError, WorkerLost
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from muxmesh.rpc.status_codes import from_rpc_error

Message = decode_pb2.NewTokens | decode_pb2.DecodeResponse | MeshError
"""Tokens of a sequence, the response of its Decode call, or the error that ended either call."""


class TokenMailbox:
    """The messages of one sequence, in order. ``lost`` is done once an error is delivered, even if it is not read."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[MeshError] = self._loop.create_future()
        self._messages: deque[Message] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, message: Message) -> None:
        self._messages.append(message)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if isinstance(message, MeshError) and not self.lost.done():
            self.lost.set_result(message)

    async def get(self) -> decode_pb2.NewTokens | decode_pb2.DecodeResponse:
        """Waits for the next message. For one reader. Raises a delivered error, after the messages before it."""
        while not self._messages:
            self._reader = self._loop.create_future()
            await self._reader
        message = self._messages.popleft()
        if isinstance(message, MeshError):
            raise message
        return message


class TokenStream:
    """One WatchTokens call. Owns the mailboxes of its sequences; when the call ends, each of them gets the error."""

    def __init__(self, worker: decode_pb2_grpc.DecodeServiceAsyncStub, watcher: str) -> None:
        self.watcher = watcher
        self._call = worker.WatchTokens(decode_pb2.WatchTokensRequest(watcher=watcher))
        self._mailboxes: dict[int, TokenMailbox] = {}
        self._reader = asyncio.create_task(self._read(), name=f"tokens for {watcher}")

    @property
    def is_open(self) -> bool:
        """False once the call has ended."""
        return not self._reader.done()

    async def opened(self) -> None:
        """Returns once the worker sends to this stream. Raises WorkerLost, Unavailable."""
        try:
            await self._call.initial_metadata()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if self._call.done():
            raise WorkerLost("the decode worker ended its token stream")

    @contextmanager
    def mailbox(self, lease_id: int) -> Iterator[TokenMailbox]:
        """The mailbox of one sequence while the block runs. Tokens that arrive later are dropped."""
        mailbox = self._mailboxes[lease_id] = TokenMailbox()
        try:
            yield mailbox
        finally:
            del self._mailboxes[lease_id]

    def close(self) -> None:
        """Cancels the call."""
        self._call.cancel()

    async def _read(self) -> None:
        reason: MeshError = WorkerLost("the decode worker ended its token stream")
        try:
            async for message in self._call:
                for tokens in message.sequences:
                    if (mailbox := self._mailboxes.get(tokens.lease_id)) is not None:
                        mailbox.put(tokens)
        except grpc.aio.AioRpcError as error:
            reason = from_rpc_error(error)
        except asyncio.CancelledError:
            pass
        finally:
            for mailbox in self._mailboxes.values():
                mailbox.put(reason)
