"""A relay of messages with grpc.aio and nothing else. Its CPU time is a lower bound for the router's.

Three processes: a source that streams one token a message, a relay that converts each into the public response, and a
sink (`benchmarks.router`). Arguments: ROLE ADDRESS SOURCE. As in a mesh, the source has a Unix socket and the relay a
port.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from muxmesh.v1 import inference_pb2, inference_pb2_grpc

NUM_TOKENS = 400


class Source(decode_pb2_grpc.DecodeServiceServicer):
    """Streams as a decode worker does for a single request, without computing."""

    async def Decode(self, request: decode_pb2.DecodeRequest, context: Any) -> decode_pb2.DecodeResponse:
        """Not measured."""
        raise NotImplementedError

    async def WatchTokens(
        self, request: decode_pb2.WatchTokensRequest, context: Any
    ) -> AsyncIterator[decode_pb2.WatchTokensResponse]:
        """One token a message."""
        for index in range(NUM_TOKENS):
            yield decode_pb2.WatchTokensResponse(sequences=[decode_pb2.NewTokens(start_index=index, token_ids=[index])])


_Servicer: Any = inference_pb2_grpc.InferenceServicer
"""Without its abstract methods, which only the type checker sees: other RPCs are not measured."""


class Relay(_Servicer):  # type: ignore[misc]
    """Serves the public RPC without any logic of the router."""

    def __init__(self, source: decode_pb2_grpc.DecodeServiceAsyncStub) -> None:
        self._source = source

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Relays each message."""
        async for message in self._source.WatchTokens(decode_pb2.WatchTokensRequest()):
            (new,) = message.sequences
            output = inference_pb2.SequenceOutput(text="word", num_tokens=1, token_ids=new.token_ids)
            yield inference_pb2.GenerateResponse(outputs=output)


async def serve(role: str, address: str, source: str) -> None:
    """Serves until it is killed."""
    server = grpc.aio.server()
    if role == "source":
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(Source(), server)
    else:
        stub = decode_pb2_grpc.DecodeServiceStub(grpc.aio.insecure_channel(source))
        inference_pb2_grpc.add_InferenceServicer_to_server(Relay(stub), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1], sys.argv[2], sys.argv[-1]))
