"""The quotas of all tenants in Redis: reservations of open requests, token buckets, and totals of what was used.

`muxmesh.tenants.quota_scripts` has the rules. This module sends the scripts; it keeps no state.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muxmesh.process_registry import redis_key
from muxmesh.redis_connection import RedisClient, redis_required
from muxmesh.tenants import quota_scripts
from muxmesh.tenants.tenant import Tenant, quota_exceeded

OWNER_TTL_S = 30.0
"""A router whose last renewal is older counts as dead: its reservations are given back."""
_MAX_CALLS = 48
"""Calls in progress; fewer than the connections of a client."""
_KEYS = ("quota", "open", "owners", "settled", "usage")


@dataclass(frozen=True, slots=True)
class Used:
    """What one request used. ``seconds``: from its admission to its end."""

    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    """What a tenant has left of its buckets; of a limit that is none, nothing that counts."""

    requests: float
    tokens: float
    num_owners: int = 1
    """Routers with reservations of the tenant."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """``num_added``: open reservations that Redis had lost. ``num_owners``: routers with reservations of the tenant."""

    num_added: int
    num_owners: int


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """What a tenant has used since it was added, and what of its limits is left now. None: no limit."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    refused: int
    last_used_unix_s: float | None
    open_requests: int
    reserved_tokens: int
    requests_left: int | None
    tokens_left: int | None
    """Negative after a request that used more than was predicted."""


class QuotaBook:
    """The quotas of one mesh. Every method raises Unavailable if Redis does not respond."""

    def __init__(self, client: RedisClient, mesh_id: str, owner_ttl_s: float = OWNER_TTL_S) -> None:
        self._client, self._mesh_id, self._owner_ttl_s = client, mesh_id, owner_ttl_s
        self._free = asyncio.Semaphore(_MAX_CALLS)
        self._reserve = client.register_script(quota_scripts.RESERVE)
        self._release = client.register_script(quota_scripts.RELEASE)
        self._settle = client.register_script(quota_scripts.SETTLE)
        self._renew = client.register_script(quota_scripts.RENEW)
        self._read = client.register_script(quota_scripts.READ)

    async def reserve(self, tenant: Tenant, owner: str, reservation_id: str, num_tokens: int) -> Left:
        """Reserves a request and its tokens; returns what is left. A second call with the same id changes nothing.

        Raises QuotaExceeded with the seconds until it would be granted, if no other request comes before.
        """
        granted, *details = await self._run_reserve(tenant, owner, [reservation_id], num_tokens, is_ahead=False)
        if granted:
            return _left_of(*details)
        quota, wait_s, left, needed = details
        raise quota_exceeded(tenant, quota.decode(), int(left), int(needed), float(wait_s))

    async def reserve_ahead(self, tenant: Tenant, owner: str, ids: Sequence[str], num_tokens: int) -> Left | None:
        """Reserves each of ``ids`` with ``num_tokens``, for requests that may come; none if not all are granted.

        Returns what is left, or None.
        """
        granted, *details = await self._run_reserve(tenant, owner, ids, num_tokens, is_ahead=True)
        return _left_of(*details) if granted else None

    async def release(self, tenant: Tenant, kept_of: Mapping[str, int]) -> None:
        """Gives back what reservations have beyond the tokens that each keeps; with 0 all of it, as no request used it.

        Again it changes nothing, nor after their settlement.
        """
        await self._run(self._release, tenant, [*_bucket_limits(tenant), *itertools.chain(*kept_of.items())])

    async def settle(self, tenant: Tenant, used_of: Mapping[str, Used]) -> None:
        """Charges what was used and gives the reservations back, by their ids; again it changes nothing."""
        parts = ((key, used.prompt_tokens, used.output_tokens, used.seconds) for key, used in used_of.items())
        await self._run(self._settle, tenant, [*_bucket_limits(tenant), *itertools.chain.from_iterable(parts)])

    async def renew(self, tenant: Tenant, owner: str, next_number: int, tokens_of: Mapping[str, int]) -> Renewal:
        """Keeps the open reservations of ``owner``: ``tokens_of`` has all whose number is below ``next_number``.

        An id ends with its number. Those that Redis has lost are charged again.
        """
        pairs = [part for pair in tokens_of.items() for part in pair]
        arguments = [owner, self._owner_ttl_s, *_bucket_limits(tenant), next_number, *pairs]
        return Renewal(*await self._run(self._renew, tenant, arguments))

    async def usage(self, tenant: Tenant) -> TenantUsage:
        """What a tenant has used."""
        found = await self._run(self._read, tenant, _bucket_limits(tenant))
        requests_left, tokens_left, num_open, reserved, pairs = found
        totals = dict(zip(pairs[::2], pairs[1::2], strict=True))
        last = totals.get(b"last_used_unix_s")
        last_used_unix_s = None if last is None else float(last)
        return TenantUsage(
            requests=int(totals.get(b"requests", 0)),
            prompt_tokens=int(totals.get(b"prompt_tokens", 0)),
            output_tokens=int(totals.get(b"output_tokens", 0)),
            refused=int(totals.get(b"refused", 0)),
            last_used_unix_s=last_used_unix_s,
            open_requests=num_open,
            reserved_tokens=reserved,
            requests_left=_left(requests_left),
            tokens_left=_left(tokens_left),
        )

    async def remove(self, tenant_id: str) -> None:
        """Removes all that is known of a tenant that is no more."""
        with redis_required():
            await self._client.delete(*self._keys(tenant_id))

    async def _run_reserve(
        self, tenant: Tenant, owner: str, ids: Sequence[str], num_tokens: int, is_ahead: bool
    ) -> Any:
        limits = [*_bucket_limits(tenant), _limit(tenant.limits.max_concurrent_requests)]
        arguments = [owner, self._owner_ttl_s, num_tokens, *limits, int(is_ahead), *ids]
        return await self._run(self._reserve, tenant, arguments)

    async def _run(self, script: Any, tenant: Tenant, arguments: Sequence[Any]) -> Any:
        """Clients of Sentinel and Cluster raise an error when they have no free connection; here calls wait for one."""
        async with self._free:
            with redis_required():
                return await script(keys=self._keys(tenant.tenant_id), args=arguments)

    def _keys(self, tenant_id: str) -> list[str]:
        """One slot of a Redis Cluster for each tenant."""
        return [redis_key(f"{self._mesh_id}/{tenant_id}", name) for name in _KEYS]


def _left_of(requests: bytes, tokens: bytes, num_owners: int) -> Left:
    return Left(float(requests), float(tokens), num_owners)


def _left(level: bytes) -> int | None:
    return math.floor(float(level)) if level else None


def _bucket_limits(tenant: Tenant) -> list[int | str]:
    return [_limit(tenant.limits.requests_per_minute), _limit(tenant.limits.tokens_per_minute)]


def _limit(value: int | None) -> int | str:
    return "" if value is None else value
