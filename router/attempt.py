"""One attempt to compute a sequence: calls both workers at once and merges their tokens into one stream.

Does not retry (`router.sequence_driver`) and knows no text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc

from muxmesh.clock import Clock
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import InternalError, RequestPreempted
from muxmesh.execution import Execution
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.status_codes import from_rpc_error, response_of
from muxmesh.types import EngineRequest, TokenLogprobs
from router.admission_client import Credit
from router.token_stream import TokenMailbox, TokenStream


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is computed; ``num_cached_tokens`` of it were in the prefix cache.

    ``logprobs``: of the second prompt token and those after it, if requested. ``waited_s``: seconds from calling
    the workers to the response of prefill; in ``device_wait_s`` of them the prefill worker did not compute it.
    """

    num_cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    waited_s: float = 0.0
    device_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reported:
    """What became of the sequence in the decode worker so far. ``is_final``: the worker does not have it any more."""

    execution: Execution
    is_final: bool = False


AttemptEvent = Prefilled | Tokens | Reported | Finished
"""Prefilled first, Finished last. Reported after pre-emptions, and before the end if the sequence ends in decode."""


class WorkerChannels:
    """Owns a channel for each worker address and a token stream for each decode worker, opened on first use."""

    def __init__(self, router: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        """``router``: name of this router, unique in the mesh. ``credentials``: for TLS with workers on the network."""
        self._router = router
        self._credentials = credentials
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[str, TokenStream] = {}
        self._num_streams = 0

    def prefill(self, address: str) -> prefill_pb2_grpc.PrefillServiceAsyncStub:
        return prefill_pb2_grpc.PrefillServiceStub(self._channel(address))

    def decode(self, address: str) -> decode_pb2_grpc.DecodeServiceAsyncStub:
        return decode_pb2_grpc.DecodeServiceStub(self._channel(address))

    async def tokens(self, address: str) -> TokenStream:
        """Returns an open token stream of the decode worker at ``address``. Raises WorkerLost or Unavailable."""
        stream = self._streams.get(address)
        if stream is None or not stream.is_open:
            self._num_streams += 1
            watcher = f"{self._router}-{self._num_streams}"
            stream = self._streams[address] = TokenStream(self.decode(address), watcher)
        await stream.opened()
        return stream

    async def close(self) -> None:
        """Closes every stream and every channel."""
        for stream in self._streams.values():
            stream.close()
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = internal_channel(address, self._credentials)
        return self._channels[address]


async def run_attempt(
    workers: WorkerChannels, clock: Clock, request: EngineRequest, credit: Credit
) -> AsyncGenerator[AttemptEvent, None]:
    """Yields Prefilled, then the tokens from output index ``len(request.resume_token_ids)`` on, then Finished.

    Raises the error that ended the attempt (WorkerLost, Unavailable, LeaseLost, EngineFailed, ...), RequestPreempted
    if the sequence has to be computed again. Closing the generator cancels both calls, and the workers drop the
    sequence.
    """
    called_at_s = clock.monotonic_s()
    stream = await workers.tokens(credit.decode_address)
    wire, lease_id = convert.request_to_wire(request), credit.lease.lease_id
    with stream.mailbox(lease_id) as mailbox, ExitStack() as calls:
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
        decoded = asyncio.create_task(_forward_end(decode, mailbox))
        prefilled = asyncio.create_task(response_of(prefill))
        for task in (decoded, prefilled):
            calls.callback(task.add_done_callback, _retrieve_exception)
        either: set[asyncio.Future[Any]] = {prefilled, mailbox.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if mailbox.lost.done() and not prefilled.done():
            raise mailbox.lost.result()  # without the decode worker, the prompt need not be computed
        response = await prefilled
        waited_s = clock.monotonic_s() - called_at_s
        index = len(request.resume_token_ids)
        yield Prefilled(
            response.num_cached_tokens,
            convert.logprobs_from_wire(response.prompt_logprobs),
            waited_s,
            response.device_wait_s,
        )
        yield Tokens(index, tuple(response.token_ids), convert.logprobs_from_wire(response.logprobs))
        index += len(response.token_ids)
        if response.HasField("finish"):
            yield Finished(convert.finish_from_wire(response.finish))
            return
        end: decode_pb2.DecodeResponse | None = None
        while end is None or index < end.num_output_tokens:
            message = await mailbox.get()
            if isinstance(message, decode_pb2.DecodeResponse):
                end = message
                continue
            if message.start_index != index:
                raise InternalError(f"decode sent the token at index {message.start_index}, expected {index}")
            index += len(message.token_ids)
            if message.HasField("execution"):
                yield Reported(convert.execution_from_wire(message.execution))
            logprobs = convert.logprobs_from_wire(message.logprobs) if message.HasField("logprobs") else ()
            yield Tokens(message.start_index, tuple(message.token_ids), logprobs)
        yield Reported(convert.execution_from_wire(end.execution), is_final=True)
        if not end.HasField("finish"):
            raise RequestPreempted(end.preempted)
        yield Finished(convert.finish_from_wire(end.finish))


async def _forward_end(decode: grpc.aio.UnaryUnaryCall[Any, decode_pb2.DecodeResponse], mailbox: TokenMailbox) -> None:
    """Delivers the response or the error of Decode to the mailbox. The response may overtake the last tokens."""
    try:
        mailbox.put(await decode)
    except grpc.aio.AioRpcError as error:
        mailbox.put(from_rpc_error(error))


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Keeps asyncio from logging the error of a call whose result is not needed."""
    if not task.cancelled():
        task.exception()
