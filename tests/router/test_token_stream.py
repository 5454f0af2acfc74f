"""The stream of a decode worker's tokens, with a worker on a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from muxmesh.errors import EngineFailed, MeshError, Unavailable, WorkerLost
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from router.token_stream import TokenMailbox, TokenStream
from tests.support.fake_unit import FakeWorker, serving
from tests.support.pipeline_parts import until


@dataclass
class Setup:
    worker: FakeWorker
    stream: TokenStream

    def send(self, *sequences: decode_pb2.NewTokens) -> None:
        self.worker.send("r-1", *sequences)

    def end(self, error: MeshError | None = None) -> None:
        self.worker.token_streams["r-1"].put_nowait(error)


@pytest_asyncio.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    worker = FakeWorker()
    async with serving(tmp_path / "d.sock", worker.services) as address, grpc.aio.insecure_channel(address) as channel:
        stream = TokenStream(decode_pb2_grpc.DecodeServiceStub(channel), "r-1")
        await stream.opened()
        yield Setup(worker, stream)
        stream.close()


def new(lease_id: int, start_index: int) -> decode_pb2.NewTokens:
    return decode_pb2.NewTokens(lease_id=lease_id, start_index=start_index, token_ids=[start_index + 5])


END = decode_pb2.DecodeResponse(num_output_tokens=2)


async def test_each_sequence_gets_its_own_tokens_in_order(setup: Setup) -> None:
    with setup.stream.mailbox(1) as first, setup.stream.mailbox(2) as second:
        setup.send(new(1, 0), new(2, 0), new(9, 0), new(1, 1))
        setup.send(new(2, 1))
        assert [await first.get(), await first.get()] == [new(1, 0), new(1, 1)]
        first.put(END)
        assert await first.get() == END
        assert [await second.get(), await second.get()] == [new(2, 0), new(2, 1)]
    assert setup.stream.is_open


async def test_tokens_for_a_mailbox_that_is_closed_are_dropped(setup: Setup) -> None:
    with setup.stream.mailbox(1) as closed:
        pass
    with setup.stream.mailbox(2) as other:
        setup.send(new(1, 0))
        setup.send(new(2, 0))
        assert await other.get() == new(2, 0)
    closed.put(END)
    assert await closed.get() == END, "nothing precedes it"
    with setup.stream.mailbox(1) as again, setup.stream.mailbox(2) as other:
        setup.send(new(2, 1), new(1, 1))
        assert await other.get() == new(2, 1)
        assert await again.get() == new(1, 1)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(None, WorkerLost), (WorkerLost("restarting"), WorkerLost), (EngineFailed("nan"), EngineFailed)],
)
async def test_when_the_stream_ends_every_sequence_gets_the_error_after_its_tokens(
    setup: Setup, error: MeshError | None, raised: type[MeshError]
) -> None:
    message = str(error or "the decode worker ended its token stream")
    with setup.stream.mailbox(1) as first, setup.stream.mailbox(2) as second:
        setup.send(new(1, 0))
        setup.end(error)
        for mailbox in (first, second):
            assert str(await asyncio.wait_for(asyncio.shield(mailbox.lost), 20)) == message
        assert await first.get() == new(1, 0)
        for mailbox in (first, second):
            with pytest.raises(raised, match=message):
                await mailbox.get()
    assert not setup.stream.is_open


async def test_a_closed_stream_loses_its_sequences(setup: Setup) -> None:
    with setup.stream.mailbox(1) as mailbox:
        setup.stream.close()
        with pytest.raises(WorkerLost, match="the decode worker ended its token stream"):
            await asyncio.wait_for(mailbox.get(), 20)
    assert not setup.stream.is_open
    with pytest.raises(WorkerLost):
        await setup.stream.opened()


async def test_a_stream_that_ended_does_not_count_as_opened(setup: Setup) -> None:
    setup.end()
    await until(lambda: not setup.stream.is_open)
    with pytest.raises(WorkerLost, match="the decode worker ended its token stream"):
        await setup.stream.opened()


async def test_a_worker_that_does_not_listen_is_unavailable(tmp_path: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/none.sock") as channel:
        stream = TokenStream(decode_pb2_grpc.DecodeServiceStub(channel), "r-1")
        with stream.mailbox(1) as mailbox:
            with pytest.raises(Unavailable):
                await stream.opened()
            with pytest.raises(Unavailable):
                await mailbox.get()
        await until(lambda: not stream.is_open)


async def test_a_mailbox_wakes_its_reader_for_each_message() -> None:
    mailbox = TokenMailbox()
    for message in (new(1, 0), new(1, 1), END):
        reading = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        assert not reading.done()
        mailbox.put(message)
        assert await reading == message


async def test_a_reader_that_is_cancelled_loses_no_message() -> None:
    mailbox = TokenMailbox()
    reading = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    reading.cancel()
    mailbox.put(new(1, 0))
    mailbox.put(END)
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert [await mailbox.get(), await mailbox.get()] == [new(1, 0), END]


async def test_a_mailbox_is_lost_by_its_first_error_before_that_is_read() -> None:
    mailbox, first, second = TokenMailbox(), WorkerLost("first"), EngineFailed("second")
    mailbox.put(new(1, 0))
    assert not mailbox.lost.done()
    mailbox.put(first)
    mailbox.put(second)
    assert mailbox.lost.result() is first
    assert await mailbox.get() == new(1, 0)
    for error in (first, second):
        with pytest.raises(MeshError) as caught:
            await mailbox.get()
        assert caught.value is error
