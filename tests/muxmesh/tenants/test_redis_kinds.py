"""Tenants and quotas in a Redis Cluster, and through the failover of a primary behind Sentinels."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from muxmesh.clock import ManualClock
from muxmesh.errors import QuotaExceeded, Unavailable
from muxmesh.process_registry import ProcessRegistry
from muxmesh.redis_connection import open_redis
from muxmesh.tenants.quota_book import QuotaBook
from muxmesh.tenants.tenant_directory import TenantDirectory
from router.quota_keeper import QuotaKeeper
from tests.support.redis_servers import running_cluster, running_sentinels
from tests.support.tenants import record, tenant

ONE = tenant(tokens_per_minute=6000, max_concurrent_requests=3)


async def use(client: Any, url: str) -> None:
    """Every script once."""
    directory, book = TenantDirectory(client, "mesh", random.Random(1)), QuotaBook(client, "mesh")
    await directory.add(record("acme", "k"))
    await directory.change("acme", lambda found: found.model_copy(update={"weight": 2.0}))
    assert (await directory.read()).records["acme"].weight == 2.0
    keeper = QuotaKeeper(book, "r", "closed", ManualClock())
    opened = [await keeper.reserve(ONE, 1000) for _ in range(3)]
    with pytest.raises(QuotaExceeded):
        await keeper.reserve(ONE, 1000)
    await keeper.renew()
    for one in opened:
        one.settle(10, 20)
    await keeper.settle_all(20)
    usage = await book.usage(ONE)
    assert (usage.requests, usage.prompt_tokens, usage.output_tokens, usage.open_requests) == (3, 30, 60, 0)
    registry = ProcessRegistry(url, "mesh", ManualClock(100.0))
    assert await registry.set_restarts({"router": 2})
    assert await registry.processes() == []
    await registry.close()


async def test_a_cluster_of_three_nodes_serves_as_one(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as url:
        client = open_redis(url)
        await use(client, url)
        book = QuotaBook(client, "mesh")
        for number in range(12):  # tenants are spread over the nodes
            await book.reserve(tenant(f"t{number}"), "r", "r-1", 5)
            assert (await book.usage(tenant(f"t{number}"))).reserved_tokens == 5
        await client.aclose()


async def test_after_a_failover_reservations_are_made_again_and_nothing_is_charged_twice(tmp_path: Path) -> None:
    async with running_sentinels(tmp_path) as watched:
        client = open_redis(watched.url)
        await use(client, watched.url)
        book = QuotaBook(client, "mesh")
        keeper = QuotaKeeper(book, "s", "open", ManualClock())
        one, other = await keeper.reserve(ONE, 1000), await keeper.reserve(ONE, 2000)
        await watched.fail_over()
        one.settle(100, 100)
        await until_it_responds(keeper)
        await keeper.settle_all(30)
        usage = await book.usage(ONE)
        assert (usage.open_requests, usage.reserved_tokens) == (1, 2000)
        assert usage.prompt_tokens + usage.output_tokens == 90 + 200
        other.settle(1, 1)
        await keeper.settle_all(30)
        assert (await book.usage(ONE)).open_requests == 0
        await client.aclose()


async def until_it_responds(keeper: QuotaKeeper) -> None:
    for _ in range(100):
        try:
            await keeper.renew()
        except Unavailable:
            continue
        return
    raise AssertionError("Redis does not respond after its failover")
