"""What a unit writes to a real Redis. `tests/router/test_residency_reader.py` has what a router reads of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

import kvstore.residency_publisher
from muxmesh.process_registry import LIFETIME_S
from muxmesh.residency_format import FIELD, block_keys, decode_batch, decode_snapshot
from tests.support.published_unit import CHANGES, HASHES, SNAPSHOT, PublishedUnit


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_it_begins_with_a_snapshot_and_continues_with_batches_of_what_changes(redis_url: str) -> None:
    unit = PublishedUnit(redis_url, incarnation=7)
    unit.compute(0, 1)
    with redis.Redis.from_url(redis_url) as client:
        async with unit.publisher.published():
            await until(lambda: client.exists(SNAPSHOT))
            snapshot = decode_snapshot(client.get(SNAPSHOT))
            assert (snapshot.incarnation, set(snapshot.keys)) == (7, set(block_keys("m", HASHES[:2])))
            unit.compute(2)
            await until(lambda: client.xlen(CHANGES) == 2)
            entries = client.xrange(CHANGES)
            batches = [decode_batch(fields[FIELD]) for _, fields in entries]
            assert [(one.first, one.added, one.removed) for one in batches] == [
                (snapshot.number, (), ()),
                (snapshot.number, block_keys("m", HASHES[2:3]), ()),
            ]


async def test_keys_expire_unless_they_are_prolonged_and_are_removed_at_the_end(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.residency_publisher, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(kvstore.residency_publisher, "BATCH_EVERY_S", 0.0)
    unit = PublishedUnit(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        async with unit.publisher.published():
            await until(lambda: client.exists(SNAPSHOT, CHANGES) == 2)
            for key in (SNAPSHOT, CHANGES):
                assert 0 < client.pttl(key) <= LIFETIME_S * 1000
                client.pexpire(key, 5000)
            await until(lambda: client.pttl(SNAPSHOT) > 5000 and client.pttl(CHANGES) > 5000)
        assert client.exists(SNAPSHOT, CHANGES) == 0


async def test_a_later_incarnation_removes_what_the_earlier_one_has_left(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set(SNAPSHOT, b"old")
        client.xadd(CHANGES, {FIELD: b"old"})
        async with PublishedUnit(redis_url).publisher.published():
            await until(lambda: client.get(SNAPSHOT) != b"old")
            assert client.xlen(CHANGES) == 1


async def test_a_publisher_that_never_reaches_redis_ends_in_order(tmp_path: Path) -> None:
    unit = PublishedUnit(f"unix://{tmp_path}/nowhere.sock")
    async with unit.publisher.published():
        unit.compute(0)
        await asyncio.sleep(0)
