"""Tokens on their way out: together, in order, to who is there."""

import asyncio

import pytest

from decode_svc.token_outbox import TokenOutboxes
from muxmesh.errors import Unavailable
from muxmesh.internal.v1 import decode_pb2


def new(lease_id: int, start_index: int) -> decode_pb2.NewTokens:
    return decode_pb2.NewTokens(lease_id=lease_id, start_index=start_index, token_ids=[7])


async def test_what_waits_goes_out_together_and_in_order() -> None:
    watchers = TokenOutboxes()
    with watchers.watching("r-1") as outbox:
        taking = asyncio.create_task(outbox.take())
        await asyncio.sleep(0)
        for lease_id, place in ((1, 0), (2, 0), (1, 1)):
            watchers.outbox("r-1").put(new(lease_id, place))
        assert [(one.lease_id, one.start_index) for one in await taking] == [(1, 0), (2, 0), (1, 1)]
        watchers.outbox("r-1").put(new(3, 0))
        assert [one.lease_id for one in await outbox.take()] == [3]


async def test_watchers_do_not_see_each_others_tokens() -> None:
    watchers = TokenOutboxes()
    with watchers.watching("a") as first, watchers.watching("b") as second:
        watchers.outbox("a").put(new(1, 0))
        watchers.outbox("b").put(new(2, 0))
        assert [one.lease_id for one in await first.take()] == [1]
        assert [one.lease_id for one in await second.take()] == [2]


def test_who_is_not_there_is_named() -> None:
    watchers = TokenOutboxes()
    with watchers.watching("a"):
        pass
    with pytest.raises(Unavailable, match="no watcher 'a' is connected"):
        watchers.outbox("a")
