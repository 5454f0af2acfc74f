"""The stream of a decode worker's tokens, with a real gRPC worker at the other end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from muxmesh.errors import MeshError, Unavailable
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from router.token_stream import TokenStream


class Worker(decode_pb2_grpc.DecodeServiceServicer):
    """Sends what the test tells it to; None ends the stream, an exception's text aborts it."""

    def __init__(self) -> None:
        self.script: asyncio.Queue[list[decode_pb2.NewTokens] | str | None] = asyncio.Queue()

    async def Decode(self, request: decode_pb2.DecodeRequest, context: Any) -> decode_pb2.DecodeResponse:
        raise NotImplementedError

    async def WatchTokens(
        self, request: decode_pb2.WatchTokensRequest, context: Any
    ) -> AsyncIterator[decode_pb2.WatchTokensResponse]:
        await context.send_initial_metadata(())
        while (act := await self.script.get()) is not None:
            if isinstance(act, str):
                await context.abort(grpc.StatusCode.UNAVAILABLE, act)
            else:
                yield decode_pb2.WatchTokensResponse(sequences=act)


Parts = tuple[Worker, Any]


@pytest_asyncio.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Parts]:
    served = Worker()
    server = grpc.aio.server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(served, server)
    server.add_insecure_port(f"unix:{tmp_path}/d.sock")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/d.sock") as channel:
        yield served, decode_pb2_grpc.DecodeServiceStub(channel)
    await server.stop(0)


def new(lease_id: int, start_index: int) -> decode_pb2.NewTokens:
    return decode_pb2.NewTokens(lease_id=lease_id, start_index=start_index, token_ids=[start_index + 5])


async def test_each_sequence_gets_its_own_tokens_in_order(worker: Parts) -> None:
    served, stub = worker
    stream = TokenStream(stub, "r-1")
    await stream.opened()
    with stream.mailbox(1) as first, stream.mailbox(2) as second:
        served.script.put_nowait([new(1, 0), new(2, 0), new(9, 0), new(1, 1)])
        served.script.put_nowait([new(2, 1)])
        ended = decode_pb2.DecodeResponse(num_output_tokens=2)
        got = [await first.get(), await first.get()]
        first.put(ended)
        assert [*got, await first.get()] == [new(1, 0), new(1, 1), ended]
        assert [await second.get(), await second.get()] == [new(2, 0), new(2, 1)]
    assert stream.is_open
    stream.close()


@pytest.mark.parametrize("act", ["the worker is going", None])
async def test_when_the_stream_ends_every_sequence_gets_the_error(worker: Parts, act: str | None) -> None:
    served, stub = worker
    stream = TokenStream(stub, "r-1")
    await stream.opened()
    with stream.mailbox(1) as first, stream.mailbox(2) as second:
        served.script.put_nowait([new(1, 0)])
        served.script.put_nowait(act)
        assert await first.get() == new(1, 0)
        for mailbox in (first, second):
            assert isinstance(await asyncio.wait_for(mailbox.lost, 20), MeshError)
            with pytest.raises(Unavailable):
                await mailbox.get()
    assert not stream.is_open


async def test_a_worker_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/none.sock") as channel:
        stream = TokenStream(decode_pb2_grpc.DecodeServiceStub(channel), "r-1")
        with pytest.raises(Unavailable):
            await stream.opened()
        async with asyncio.timeout(20):
            while stream.is_open:
                await asyncio.sleep(0)
