"""The tenants of a router: who calls, what each may use, and their metrics. Opens the connections to Redis."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from typing import Protocol

from muxmesh.clock import Clock
from muxmesh.config.runtime import MeshRuntime
from muxmesh.metrics.family import Family
from muxmesh.redis_connection import REDIS_ERRORS, RedisClient, open_redis
from muxmesh.tenants.quota_book import QuotaBook
from muxmesh.tenants.tenant_directory import TenantDirectory
from router.caller import set_caller
from router.quota_keeper import QuotaKeeper
from router.quota_metrics import quota_families
from router.quotas import NO_QUOTAS, Quotas
from router.tenant_access import Metadata, TenantAccess
from router.tenant_refresh import refresh, refresh_repeatedly

_LAST_SETTLEMENTS_S = 1.0


class Tenancy(Protocol):
    """Who calls, and what they may use."""

    @property
    def quotas(self) -> Quotas:
        """For the pipeline."""

    def identify(self, metadata: Metadata) -> None:
        """Sets the caller of this task (`router.caller`). Raises Unauthenticated or Unavailable."""

    def name_of(self, tenant_id: str) -> str:
        """The name of a tenant; its id if it is not known."""

    def families(self) -> Iterator[Family]:
        """The metrics."""


class _OpenTenancy:
    """Everybody may use everything."""

    quotas = NO_QUOTAS

    def identify(self, metadata: Metadata) -> None:
        pass

    def name_of(self, tenant_id: str) -> str:
        return tenant_id

    def families(self) -> Iterator[Family]:
        return quota_families(None)


OPEN_TENANCY: Tenancy = _OpenTenancy()


class KeyedTenancy:
    """Callers need an API key."""

    def __init__(
        self, client: RedisClient, directory: TenantDirectory, access: TenantAccess, keeper: QuotaKeeper
    ) -> None:
        self._client, self._directory, self._access, self._keeper = client, directory, access, keeper

    @property
    def quotas(self) -> Quotas:
        return self._keeper

    def identify(self, metadata: Metadata) -> None:
        set_caller(self._access.identify(metadata))

    def name_of(self, tenant_id: str) -> str:
        return self._access.name_of(tenant_id)

    async def refresh(self) -> None:
        """Reads the tenants. Raises Unavailable."""
        await refresh(self._directory, self._access)

    async def run(self) -> None:
        """Keeps all of it up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(refresh_repeatedly(self._directory, self._access, self._keeper.keep_only))
            group.create_task(self._keeper.run())

    async def close(self) -> None:
        """Settles what has ended, and disconnects."""
        await self._keeper.settle_all(_LAST_SETTLEMENTS_S)
        with contextlib.suppress(*REDIS_ERRORS):
            await self._client.aclose()

    def families(self) -> Iterator[Family]:
        return quota_families(self._keeper)


def open_tenancy(runtime: MeshRuntime, owner: str, clock: Clock, rng: random.Random) -> KeyedTenancy:
    """``owner``: this incarnation of the router, unique in the mesh."""
    mesh_id = runtime.config.mesh_id
    client = open_redis(runtime.redis_url)
    keeper = QuotaKeeper(QuotaBook(client, mesh_id), owner, runtime.config.access.on_redis_loss, clock)
    return KeyedTenancy(client, TenantDirectory(client, mesh_id, rng), TenantAccess(clock), keeper)
