"""A unit that publishes its prefix cache in a real Redis, and a router that follows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import redis

import kvstore.residency_publisher
import router.residency_reader
from muxmesh.background_task import background
from muxmesh.clock import ManualClock
from muxmesh.process_registry import LIFETIME_S
from muxmesh.residency_format import (
    FIELD,
    ResidencyBatch,
    ResidencySnapshot,
    block_keys,
    encode_batch,
    encode_snapshot,
)
from router.residency import ResidencyIndex
from router.residency_reader import CHECK_EVERY_S, ResidencyReader
from tests.support.published_unit import CHANGES, HASHES, SNAPSHOT, PublishedUnit
from tests.support.redis_process import running_redis_process


class Router:
    def __init__(self, url: str) -> None:
        self.index = ResidencyIndex()
        self.clock = ManualClock(0.0)
        self.reader = ResidencyReader(url, "mesh", ["u", "other"], self.index, self.clock)

    def held(self, *values: int) -> int:
        """Blocks of a prompt that unit u is known to hold."""
        return self.index.match(block_keys("m", [HASHES[value] for value in values])).get("u", 0)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.residency_publisher, "_RETRY_S", 0.05)
    monkeypatch.setattr(router.residency_reader, "_RETRY_S", 0.05)
    monkeypatch.setattr(router.residency_reader, "_BLOCK_MS", 50)


@asynccontextmanager
async def following(url: str) -> AsyncIterator[Router]:
    router = Router(url)
    async with background(router.reader.run(), "residency"):
        yield router


async def test_a_router_follows_what_a_unit_caches_and_evicts(redis_url: str) -> None:
    unit = PublishedUnit(redis_url)
    async with unit.publisher.published(), following(redis_url) as router:
        unit.compute(0, 1, 2)
        await router.until(lambda: router.held(0, 1, 2) == 3)
        unit.compute(3, 4, 5, 6, 7, 8)
        await router.until(lambda: router.held(3, 4, 5, 6, 7, 8) == 6)
        assert router.index.num_blocks("u") == 8, "eight blocks fit"
        assert router.held(0, 1, 2) == 2, "the last block of the oldest sequence was evicted"
        unit.blocks.drop_prefixes()
        await router.until(lambda: router.index.num_blocks("u") == 0)


async def test_a_fresh_router_begins_with_the_snapshot_and_the_changes_after_it(redis_url: str) -> None:
    unit = PublishedUnit(redis_url)
    unit.compute(0, 1)
    async with unit.publisher.published(), following(redis_url) as first:
        await first.until(lambda: first.held(0, 1) == 2)
        unit.compute(2, 3)
        await first.until(lambda: first.held(2, 3) == 2)
        async with following(redis_url) as second:
            await second.until(lambda: second.held(0, 1) == second.held(2, 3) == 2)


async def test_a_router_forgets_a_unit_whose_snapshot_has_expired(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set(SNAPSHOT, encode_snapshot(ResidencySnapshot(1, 0, block_keys("m", HASHES[:1]))))
        async with following(redis_url) as router:
            await router.until(lambda: router.held(0) == 1)
            client.delete(SNAPSHOT)
            router.clock.advance(CHECK_EVERY_S)
            await router.until(lambda: router.held(0) == 0)


async def test_what_an_earlier_incarnation_cached_is_not_believed(redis_url: str) -> None:
    first, second = PublishedUnit(redis_url, 1), PublishedUnit(redis_url, 2)
    first.compute(0, 1)
    async with following(redis_url) as router, AsyncExitStack() as killed:
        await killed.enter_async_context(first.publisher.published())
        await router.until(lambda: router.held(0, 1) == 2)
        second.compute(2)
        async with second.publisher.published():
            await router.until(lambda: router.held(2) == 1)
            assert router.held(0, 1) == 0


async def test_a_gap_makes_the_router_read_the_snapshot_again(redis_url: str) -> None:
    keys = block_keys("m", HASHES)
    with redis.Redis.from_url(redis_url) as client:
        client.set(SNAPSHOT, encode_snapshot(ResidencySnapshot(1, 0, keys[:1])))
        async with following(redis_url) as router:
            await router.until(lambda: router.held(0) == 1)
            client.set(SNAPSHOT, encode_snapshot(ResidencySnapshot(1, 5, keys[1:3])))
            client.xadd(CHANGES, {FIELD: encode_batch(ResidencyBatch(1, 5, keys[4:5]))})
            await router.until(lambda: router.held(4) == 1)
            assert (router.held(0), router.held(1, 2)) == (0, 2)
            client.xadd(CHANGES, {FIELD: encode_batch(ResidencyBatch(1, 9, keys[5:6]))})
            await router.until(lambda: not router.index.is_known("u"))
            client.xadd(CHANGES, {FIELD: b"of another version"})
            await asyncio.sleep(0)
            client.set(SNAPSHOT, encode_snapshot(ResidencySnapshot(1, 10, keys[7:8])))
            client.xadd(CHANGES, {FIELD: encode_batch(ResidencyBatch(1, 10))})
            await router.until(lambda: router.held(7) == 1)


async def test_the_stream_is_bounded_and_the_snapshot_is_rewritten(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.residency_publisher, "MAX_BATCHES", 4)
    monkeypatch.setattr(kvstore.residency_publisher, "SNAPSHOT_EVERY", 2)
    monkeypatch.setattr(kvstore.residency_publisher, "BATCH_EVERY_S", 0.0)
    unit = PublishedUnit(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        async with unit.publisher.published(), following(redis_url) as router:
            for value in range(8):
                unit.compute(value)
                await router.until(lambda value=value: router.held(value) == 1)  # type: ignore[misc]
            assert client.xlen(CHANGES) <= 4
            async with following(redis_url) as fresh:
                await fresh.until(lambda: all(fresh.held(value) == 1 for value in range(8)))


async def test_without_redis_the_unit_goes_on_and_its_state_is_rebuilt_when_redis_returns(tmp_path: Path) -> None:
    with running_redis_process(tmp_path) as server:
        await server.start()
        unit = PublishedUnit(server.url)
        unit.compute(0, 1)
        async with unit.publisher.published(), following(server.url) as router:
            await router.until(lambda: router.held(0, 1) == 2)
            server.kill()
            unit.compute(2)
            await asyncio.sleep(0)
            assert router.held(0, 1) == 2, "what is known stays for a while"
            router.clock.advance(LIFETIME_S)
            await router.until(lambda: not router.index.is_known("u"))
            await server.start()
            await router.until(lambda: router.held(0, 1) == 2 and router.held(2) == 1)


async def test_a_redis_that_has_lost_its_data_gets_a_snapshot(redis_url: str) -> None:
    unit = PublishedUnit(redis_url)
    unit.compute(0)
    async with unit.publisher.published(), following(redis_url) as router:
        await router.until(lambda: router.held(0) == 1)
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
            unit.compute(1)
            async with asyncio.timeout(20):
                while not client.exists(SNAPSHOT):
                    await asyncio.sleep(0.01)
        async with following(redis_url) as fresh:
            await fresh.until(lambda: fresh.held(0) == fresh.held(1) == 1)
