"""The directory of tenants in a real Redis."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from muxmesh.errors import InvalidRequest, Unavailable
from muxmesh.redis_connection import open_redis
from muxmesh.tenants.tenant_directory import TenantDirectory
from muxmesh.tenants.tenant_record import TenantRecord
from tests.support.tenants import record

RECORDS, VERSION = "muxmesh:{mesh}:tenants", "muxmesh:{mesh}:tenants-version"


@pytest.fixture
def directory(client: Any) -> TenantDirectory:
    return TenantDirectory(client, "mesh", random.Random(3))


async def test_tenants_are_added_changed_and_removed(directory: TenantDirectory) -> None:
    assert await directory.version() == ""
    await directory.add(record("acme", "k", tokens_per_minute=5))
    await directory.add(record("other", number=2))
    versions = [await directory.version()]
    changed = await directory.change("acme", lambda found: found.model_copy(update={"weight": 2.0}))
    versions.append(await directory.version())
    copy = await directory.read()
    assert copy.version == versions[-1]
    assert copy.records == {"acme": changed, "other": record("other", number=2)}
    assert changed == record("acme", "k", tokens_per_minute=5, weight=2.0)
    assert await directory.remove("other") == record("other", number=2)
    versions.append(await directory.version())
    assert len(set(versions)) == 3
    assert list((await directory.read()).records) == ["acme"]


async def test_a_name_is_given_once_and_unknown_ones_are_named(directory: TenantDirectory) -> None:
    await directory.add(record("acme"))
    with pytest.raises(InvalidRequest, match="a tenant 'acme' exists"):
        await directory.add(record("acme", number=2))
    for call in (directory.change("none", lambda found: found), directory.remove("none")):
        with pytest.raises(InvalidRequest, match="there is no tenant 'none'"):
            await call


async def test_changes_at_the_same_time_are_all_kept(directory: TenantDirectory) -> None:
    await directory.add(record("acme", weight=1.0))

    def heavier(found: TenantRecord) -> TenantRecord:
        return found.model_copy(update={"weight": found.weight + 1})

    await asyncio.gather(*(directory.change("acme", heavier) for _ in range(4)))
    assert (await directory.read()).records["acme"].weight == 5.0


async def test_a_record_that_cannot_be_read_is_reported_and_can_be_removed(
    directory: TenantDirectory, client: Any
) -> None:
    await directory.add(record("acme"))
    await client.hset(RECORDS, "broken", b"\xff{")
    await client.hset(RECORDS, "renamed", record("acme").to_text())
    copy = await directory.read()
    assert (list(copy.records), copy.unreadable) == (["acme"], ("broken", "renamed"))
    with pytest.raises(InvalidRequest, match="'broken' is of another version of MuxMesh, or damaged"):
        await directory.change("broken", lambda found: found)
    assert await directory.remove("broken") is None
    assert (await directory.read()).unreadable == ("renamed",)


async def test_a_copy_is_restored_only_where_there_is_no_directory(directory: TenantDirectory, client: Any) -> None:
    await directory.add(record("acme", "k"))
    copy = await directory.read()
    assert not await directory.restore(copy)
    await client.flushall()
    assert await directory.restore(copy)
    assert await directory.read() == copy
    await directory.remove("acme")
    assert not await directory.restore(copy), "all tenants were removed on purpose"


async def test_two_meshes_have_tenants_of_their_own(client: Any, directory: TenantDirectory) -> None:
    await directory.add(record("acme"))
    assert (await TenantDirectory(client, "other", random.Random(1)).read()).records == {}


async def test_without_redis_every_call_is_unavailable(tmp_path: Path) -> None:
    nowhere = open_redis(f"unix://{tmp_path}/none.sock")
    directory = TenantDirectory(nowhere, "mesh", random.Random(1))
    for call in (
        directory.version(), directory.read(), directory.add(record()), directory.remove("acme"),
        directory.change("acme", lambda found: found),
    ):  # fmt: skip
        with pytest.raises(Unavailable, match="Redis does not respond"):
            await call
    await nowhere.aclose()
