"""One attempt to serve a request: both calls at once, their tokens in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
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
    """Channels to workers, by address; opened once."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def prefill(self, address: str) -> prefill_pb2_grpc.PrefillServiceAsyncStub:
        """The prefill worker at ``address``."""
        return prefill_pb2_grpc.PrefillServiceStub(self._channel(address))

    def decode(self, address: str) -> decode_pb2_grpc.DecodeServiceAsyncStub:
        """The decode worker at ``address``."""
        return decode_pb2_grpc.DecodeServiceStub(self._channel(address))

    async def close(self) -> None:
        """Closes every channel."""
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
    wire = convert.request_to_wire(request)
    decode = workers.decode(credit.decode_address).Decode(
        decode_pb2.DecodeRequest(request=wire, lease_id=credit.lease.lease_id)
    )
    prefill = workers.prefill(credit.prefill_address).Prefill(
        prefill_pb2.PrefillRequest(
            request=wire, lease=convert.ref_to_wire(credit.lease), decode_worker=credit.decode_worker
        )
    )
    messages = aiter(decode)
    prefilled = asyncio.create_task(_answer(prefill))
    first = asyncio.create_task(anext(messages, None))
    called_at_s = clock.monotonic_s()
    try:
        await asyncio.wait({prefilled, first}, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()  # a decode worker that is lost need not be computed for
        response = await prefilled
        waited_s = clock.monotonic_s() - called_at_s
        place = len(request.resume_token_ids)
        yield Prefilled(response.num_cached_tokens, convert.logprobs_from_wire(response.prompt_logprobs), waited_s)
        yield Tokens(place, (response.token_id,), convert.logprobs_from_wire(response.logprobs))
        place += 1
        if response.HasField("finish"):
            yield Finished(convert.finish_from_wire(response.finish))
            return
        message = await first
        while message is not None:
            if message.HasField("finish"):
                yield Finished(convert.finish_from_wire(message.finish))
                return
            if message.start_index != place:
                raise InternalError(f"decode sent token {message.start_index}, expected {place}")
            place += len(message.token_ids)
            logprobs = convert.logprobs_from_wire(message.logprobs) if message.HasField("logprobs") else ()
            yield Tokens(message.start_index, tuple(message.token_ids), logprobs)
            message = await anext(messages, None)
        raise InternalError("decode ended its stream without a finish")
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    finally:
        for call in (prefill, decode):
            call.cancel()
        for task in (prefilled, first):
            task.add_done_callback(_look_at)


async def _answer(call: grpc.aio.UnaryUnaryCall[Any, prefill_pb2.PrefillResponse]) -> prefill_pb2.PrefillResponse:
    return await call


def _look_at(task: asyncio.Task[Any]) -> None:
    """An error of a call that nobody waits for any more is no news."""
    if not task.cancelled():
        task.exception()
