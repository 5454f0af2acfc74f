"""One attempt to serve a request: both calls at once, their tokens in one stream."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc

from muxmesh.clock import Clock
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import InternalError
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.status import from_rpc_error
from muxmesh.types import EngineRequest, TokenLogprobs
from router.credits import Credit
from router.tokens import Mailbox, TokenStream


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is computed. ``num_cached_tokens`` of it were in the prefix cache; log-probabilities if wanted.

    ``waited_s``: from the calls to the workers to their answer.
    """

    num_cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    waited_s: float = 0.0


AnswerEvent = Prefilled | Tokens | Finished
"""What an attempt tells of an answer: Prefilled first, Finished last."""


class Workers:
    """Channels to workers and streams of their tokens, by address; opened once."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[str, TokenStream] = {}
        self._num_streams = 0

    def prefill(self, address: str) -> prefill_pb2_grpc.PrefillServiceAsyncStub:
        """The prefill worker at ``address``."""
        return prefill_pb2_grpc.PrefillServiceStub(self._channel(address))

    def decode(self, address: str) -> decode_pb2_grpc.DecodeServiceAsyncStub:
        """The decode worker at ``address``."""
        return decode_pb2_grpc.DecodeServiceStub(self._channel(address))

    async def tokens(self, address: str) -> TokenStream:
        """The stream of tokens of the decode worker at ``address``. Raises WorkerLost, Unavailable."""
        stream = self._streams.get(address)
        if stream is None or not stream.is_open:
            self._num_streams += 1
            watcher = f"router-{os.getpid()}-{self._num_streams}"
            stream = self._streams[address] = TokenStream(self.decode(address), watcher)
        await stream.opened()
        return stream

    async def close(self) -> None:
        """Closes every channel."""
        for stream in self._streams.values():
            stream.close()
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = internal_channel(address)
        return self._channels[address]


async def run_attempt(
    workers: Workers, clock: Clock, request: EngineRequest, credit: Credit
) -> AsyncGenerator[AnswerEvent, None]:
    """Tokens from place ``len(request.resume_token_ids)`` on, then Finished.

    Raises whatever ended the attempt (WorkerLost, Unavailable, LeaseLost, EngineFailed, ...). Closing it cancels both
    calls, and with them the work.
    """
    called_at_s = clock.monotonic_s()
    stream = await workers.tokens(credit.decode_address)
    wire, lease_id = convert.request_to_wire(request), credit.lease.lease_id
    with stream.answer(lease_id) as mailbox, ExitStack() as calls:
        decode = workers.decode(credit.decode_address).Decode(
            decode_pb2.DecodeRequest(request=wire, lease_id=lease_id, watcher=stream.watcher)
        )
        calls.callback(decode.cancel)
        prefill = workers.prefill(credit.prefill_address).Prefill(
            prefill_pb2.PrefillRequest(
                request=wire, lease=convert.ref_to_wire(credit.lease), decode_worker=credit.decode_worker
            )
        )
        calls.callback(prefill.cancel)
        ending = asyncio.create_task(_pass_on(decode, mailbox))
        prefilled = asyncio.create_task(_answer(prefill))
        for task in (ending, prefilled):
            calls.callback(task.add_done_callback, _look_at)
        either: set[asyncio.Future[Any]] = {prefilled, mailbox.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if mailbox.lost.done():
            raise mailbox.lost.result()  # a decode worker that is lost need not be computed for
        response = await prefilled
        waited_s = clock.monotonic_s() - called_at_s
        place = len(request.resume_token_ids)
        yield Prefilled(response.num_cached_tokens, convert.logprobs_from_wire(response.prompt_logprobs), waited_s)
        yield Tokens(place, (response.token_id,), convert.logprobs_from_wire(response.logprobs))
        place += 1
        if response.HasField("finish"):
            yield Finished(convert.finish_from_wire(response.finish))
            return
        ended: decode_pb2.DecodeResponse | None = None
        while ended is None or place < ended.num_output_tokens:
            news = await mailbox.get()
            if isinstance(news, decode_pb2.DecodeResponse):
                ended = news
                continue
            if news.start_index != place:
                raise InternalError(f"decode sent token {news.start_index}, expected {place}")
            place += len(news.token_ids)
            logprobs = convert.logprobs_from_wire(news.logprobs) if news.HasField("logprobs") else ()
            yield Tokens(news.start_index, tuple(news.token_ids), logprobs)
        yield Finished(convert.finish_from_wire(ended.finish))


async def _pass_on(decode: grpc.aio.UnaryUnaryCall[Any, decode_pb2.DecodeResponse], mailbox: Mailbox) -> None:
    """How the Decode call ended belongs to the answer, too."""
    try:
        mailbox.put(await decode)
    except grpc.aio.AioRpcError as error:
        mailbox.put(from_rpc_error(error))


async def _answer(call: grpc.aio.UnaryUnaryCall[Any, prefill_pb2.PrefillResponse]) -> prefill_pb2.PrefillResponse:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _look_at(task: asyncio.Task[Any]) -> None:
    """An error of a call that nobody waits for any more is no news."""
    if not task.cancelled():
        task.exception()
