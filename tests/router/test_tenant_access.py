"""Which tenant a call belongs to, and how the copy of the directory is kept up to date."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from muxmesh.clock import ManualClock
from muxmesh.errors import Unauthenticated, Unavailable
from muxmesh.tenants.tenant_record import DirectoryCopy
from router.tenant_access import TenantAccess
from router.tenant_refresh import refresh, refresh_repeatedly
from tests.support.tenants import record


def bearer(key: str, scheme: str = "Bearer") -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"{scheme} {key}")]


def access_to(*records: Any, clock: ManualClock | None = None) -> TenantAccess:
    access = TenantAccess(clock or ManualClock(100.0))
    access.use(DirectoryCopy("v", {one.name: one for one in records}))
    return access


def test_a_key_is_that_of_its_tenant_in_every_spelling_of_the_scheme() -> None:
    access = access_to(record("acme", "k1", "k2"), record("other", "k3", number=2))
    assert access.identify(bearer("k1")).name == access.identify(bearer("k2", "bearer")).name == "acme"
    assert access.identify(bearer("k3 ")).name == "other"
    assert access.identify([("authorization", b"Bearer k3")]).name == "other"


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ([], "an API key is needed: send the metadata `authorization: Bearer API-KEY`"),
        ([("authorization", "k1")], "authorization: is no bearer token"),
        ([("authorization", "Basic k1")], "authorization: is no bearer token"),
        ([("authorization", "Bearer ")], "authorization: is no bearer token"),
        ([("authorization", b"\xff\xfe")], "authorization: is no bearer token"),
        (bearer("wrong"), "the API key is not valid"),
    ],
)
def test_a_call_without_a_valid_key_is_refused(metadata: list[tuple[str, str | bytes]], problem: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        access_to(record("acme", "k1")).identify(metadata)
    assert str(caught.value).startswith(problem)
    assert "k1" not in str(caught.value).replace("`authorization", "")


def test_a_key_that_expired_is_refused_in_the_words_for_an_unknown_one() -> None:
    clock = ManualClock(100.0)
    one = record("acme", "k1")
    expiring = one.model_copy(update={"keys": (one.keys[0].model_copy(update={"expires_at_unix_s": 150.0}),)})
    access = access_to(expiring, clock=clock)
    access.identify(bearer("k1"))
    clock.advance(50)
    with pytest.raises(Unauthenticated, match=r"^the API key is not valid$"):
        access.identify(bearer("k1"))


def test_before_the_first_copy_no_key_is_called_invalid() -> None:
    access = TenantAccess(ManualClock())
    with pytest.raises(Unavailable, match="cannot be checked yet"):
        access.identify(bearer("k1"))
    with pytest.raises(Unauthenticated):
        access.identify([])


def test_a_removed_tenant_is_refused_and_a_changed_one_has_its_new_limits() -> None:
    access = access_to(record("acme", "k1"), record("gone", "k2", number=2))
    access.use(DirectoryCopy("w", {"acme": record("acme", "k1", tokens_per_minute=5)}))
    assert access.identify(bearer("k1")).limits.tokens_per_minute == 5
    with pytest.raises(Unauthenticated):
        access.identify(bearer("k2"))


def test_a_record_that_cannot_be_read_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    access = TenantAccess(ManualClock())
    for _ in range(2):
        access.use(DirectoryCopy("v", {}, ("broken",)))
    assert [one.levelno for one in caplog.records] == [logging.ERROR]


@dataclass
class FakeDirectory:
    """A directory in memory. ``error`` is raised by every call."""

    copy: DirectoryCopy = field(default_factory=lambda: DirectoryCopy("", {}))
    error: Exception | None = None
    num_reads: int = 0
    num_versions: int = 0

    async def version(self) -> str:
        self.num_versions += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.copy.version

    async def read(self) -> DirectoryCopy:
        self.num_reads += 1
        return self.copy

    async def restore(self, copy: DirectoryCopy) -> bool:
        if self.copy.version:
            return False
        self.copy = copy
        return True


async def test_the_directory_is_read_when_its_version_has_changed() -> None:
    directory, access = FakeDirectory(DirectoryCopy("1", {"acme": record("acme", "k1")})), TenantAccess(ManualClock())
    for _ in range(3):
        await refresh(cast(Any, directory), access)
    assert directory.num_reads == 1
    directory.copy = replace(directory.copy, version="2", records={})
    await refresh(cast(Any, directory), access)
    with pytest.raises(Unauthenticated):
        access.identify(bearer("k1"))


async def test_a_redis_that_lost_the_tenants_gets_them_back(caplog: pytest.LogCaptureFixture) -> None:
    before = DirectoryCopy("1", {"acme": record("acme", "k1")})
    directory, access = FakeDirectory(before), TenantAccess(ManualClock())
    await refresh(cast(Any, directory), access)
    directory.copy = DirectoryCopy("", {})
    await refresh(cast(Any, directory), access)
    assert directory.copy == before
    assert access.identify(bearer("k1")).name == "acme"
    assert "Redis had lost the tenants" in caplog.text


async def test_a_mesh_without_tenants_restores_nothing() -> None:
    directory, access = FakeDirectory(), TenantAccess(ManualClock())
    for _ in range(2):
        await refresh(cast(Any, directory), access)
    assert directory.copy.version == ""


async def test_while_redis_is_away_the_copy_stays_and_one_warning_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("router.tenant_refresh.REFRESH_S", 0.0)
    directory = FakeDirectory(DirectoryCopy("1", {"acme": record("acme", "k1")}))
    access = TenantAccess(ManualClock())
    ids: list[Any] = []
    task = asyncio.ensure_future(refresh_repeatedly(cast(Any, directory), access, ids.append))
    while directory.num_reads == 0:
        await asyncio.sleep(0)
    directory.error = Unavailable("Redis does not respond: gone")
    seen = directory.num_versions
    while directory.num_versions < seen + 5:
        await asyncio.sleep(0)
    assert access.identify(bearer("k1")).name == "acme"
    assert caplog.text.count("the tenants stay as they were read last") == 1
    directory.error, directory.copy = None, DirectoryCopy("2", {})
    while len(ids) < 2:
        await asyncio.sleep(0)
    assert ids == [{"0000000000000001"}, set()]
    task.cancel()
