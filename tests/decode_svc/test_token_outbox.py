"""Tokens that wait for their router."""

import asyncio

import pytest

from decode_svc.token_outbox import TokenOutbox, TokenOutboxes
from muxmesh.errors import Unavailable
from muxmesh.internal.v1 import decode_pb2


def new(lease_id: int, start_index: int) -> decode_pb2.NewTokens:
    return decode_pb2.NewTokens(lease_id=lease_id, start_index=start_index, token_ids=[7])


async def test_all_pending_tokens_are_taken_together_and_in_order() -> None:
    outbox = TokenOutbox()
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    for lease_id, start_index in ((1, 0), (2, 0), (1, 1)):
        outbox.put(new(lease_id, start_index))
    assert [(one.lease_id, one.start_index) for one in await taking] == [(1, 0), (2, 0), (1, 1)]
    outbox.put(new(3, 0))
    assert [one.lease_id for one in await outbox.take()] == [3]


async def test_an_empty_outbox_waits_for_the_next_token() -> None:
    outbox = TokenOutbox()
    outbox.put(new(1, 0))
    await outbox.take()
    taking = asyncio.create_task(outbox.take())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not taking.done()
    outbox.put(new(1, 1))
    assert [one.start_index for one in await taking] == [1]


async def test_a_cancelled_take_loses_no_token() -> None:
    outbox = TokenOutbox()
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.put(new(1, 0))
    taking.cancel()
    await asyncio.wait([taking])
    assert [one.start_index for one in await outbox.take()] == [0]


async def test_each_watcher_has_its_own_tokens() -> None:
    outboxes = TokenOutboxes()
    with outboxes.watching("a") as first, outboxes.watching("b") as second:
        outboxes.outbox("a").put(new(1, 0))
        outboxes.outbox("b").put(new(2, 0))
        assert [one.lease_id for one in await first.take()] == [1]
        assert [one.lease_id for one in await second.take()] == [2]


def test_a_watcher_that_has_disconnected_is_named_in_the_error() -> None:
    outboxes = TokenOutboxes()
    with outboxes.watching("a"):
        assert outboxes.outbox("a") is outboxes.outbox("a")
    with pytest.raises(Unavailable, match="no watcher 'a' is connected"):
        outboxes.outbox("a")


def test_a_watcher_whose_call_failed_is_disconnected() -> None:
    outboxes = TokenOutboxes()
    with pytest.raises(KeyError), outboxes.watching("a"):
        raise KeyError
    with pytest.raises(Unavailable):
        outboxes.outbox("a")
