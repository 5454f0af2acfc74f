"""The limits of tenants as one router keeps them by itself while Redis is away. Pure.

Each router grants its part: the limit, and what was left of it at the last response of Redis, divided by the number of
routers that had reservations of the tenant. When Redis returns it is charged for all that was granted, and reports what
is left.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

from muxmesh.tenants.tenant import Tenant, quota_exceeded
from router.reservation_stock import NOTHING_TO_SPARE, Spare

_MINUTE_S = 60.0
_UNKNOWN_DURATION_S = 1.0
_FRESH_S, _PLENTY, _SPARE_PART = 5.0, 1 / 4, 1 / 64
"""See `LocalQuotas.spare`."""


@dataclass(slots=True)
class _Bucket:
    """``level`` of ``limit`` units at ``at_s``; it refills in a minute."""

    limit: float
    level: float
    at_s: float

    def refill(self, limit: float, now_s: float) -> None:
        self.limit = limit
        self.level = min(limit, self.level + max(0.0, now_s - self.at_s) * limit / _MINUTE_S)
        self.at_s = now_s

    def wait_s(self, needed: float) -> float:
        """Seconds until ``needed``, at most a full bucket, is there; 0: now."""
        return max(0.0, needed - self.level) * _MINUTE_S / self.limit


class LocalQuotas:
    """Owns the buckets of all tenants, by tenant id and limit.

    A bucket is created for the first request of a tenant while Redis is unavailable, and dropped when Redis responds.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._left: dict[tuple[str, str], tuple[float, float]] = {}
        """What was left at the last response of Redis, and its time."""
        self._told_at_s: dict[str, float] = {}
        """Tenant id → the time of that response, if Redis has not refused a request since."""

    def note(self, tenant: Tenant, requests_left: float, tokens_left: float, now_s: float) -> None:
        """Redis has reported what is left of the tenant's limits."""
        self._told_at_s[tenant.tenant_id] = now_s
        for name, left in (("requests_per_minute", requests_left), ("tokens_per_minute", tokens_left)):
            self._left[tenant.tenant_id, name] = left, now_s
            self._buckets.pop((tenant.tenant_id, name), None)

    def forget(self, tenant: Tenant) -> None:
        """Redis has refused a request of the tenant: `spare` is nothing until it says again what is left."""
        self._told_at_s.pop(tenant.tenant_id, None)

    def spare(self, tenant: Tenant, num_routers: int, now_s: float) -> Spare:
        """What this router may reserve ahead of requests, which takes it from other routers for that time.

        A `_SPARE_PART` of each limit, divided by the routers; nothing unless Redis has said within `_FRESH_S` that
        `_PLENTY` of each limit per minute is left.
        """
        limits, key = tenant.limits, tenant.tenant_id
        by_minute = {
            "requests_per_minute": limits.requests_per_minute, "tokens_per_minute": limits.tokens_per_minute,
        }  # fmt: skip
        if now_s - self._told_at_s.get(key, -math.inf) > _FRESH_S:
            return NOTHING_TO_SPARE
        for name, limit in by_minute.items():
            if limit is not None and self._left[key, name][0] < _PLENTY * limit:
                return NOTHING_TO_SPARE
        requests, tokens, at_once = (
            math.inf if limit is None else limit * _SPARE_PART / num_routers
            for limit in (*by_minute.values(), limits.max_concurrent_requests)
        )
        return Spare(min(requests, at_once), tokens)

    def grant(self, tenant: Tenant, num_tokens: int, num_open: int, num_routers: int, now_s: float) -> None:
        """Grants a request of ``num_tokens`` beside ``num_open`` ones of this router. Raises QuotaExceeded.

        ``num_routers``: at least 1.
        """
        limits = tenant.limits
        max_open = limits.max_concurrent_requests
        if max_open is not None and num_open >= max(1, max_open // num_routers):
            raise quota_exceeded(tenant, "max_concurrent_requests", 0, 1, _UNKNOWN_DURATION_S)
        asked = (("requests_per_minute", limits.requests_per_minute, 1), (
            "tokens_per_minute", limits.tokens_per_minute, num_tokens))  # fmt: skip
        buckets = []
        for name, limit, amount in asked:
            if limit is None:
                continue
            bucket = self._bucket(tenant.tenant_id, name, num_routers, limit, now_s)
            needed = min(amount, bucket.limit)
            wait_s = bucket.wait_s(needed)
            if wait_s > 0:
                raise quota_exceeded(tenant, name, int(bucket.level), int(needed), wait_s)
            buckets.append((bucket, amount))
        for bucket, amount in buckets:
            bucket.level -= amount

    def settle(self, tenant: Tenant, num_reserved: int, num_used: int, now_s: float) -> None:
        """Gives back what a local grant reserved and did not use; takes what it used beyond it."""
        bucket = self._buckets.get((tenant.tenant_id, "tokens_per_minute"))
        if bucket is not None:
            bucket.refill(bucket.limit, now_s)
            bucket.level = min(bucket.limit, bucket.level + num_reserved - num_used)

    def keep_only(self, tenant_ids: Set[str]) -> None:
        """Removes what is known of all other tenants: they were removed."""
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if key[0] in tenant_ids}
        self._left = {key: left for key, left in self._left.items() if key[0] in tenant_ids}
        self._told_at_s = {key: at_s for key, at_s in self._told_at_s.items() if key in tenant_ids}

    def _bucket(self, tenant_id: str, name: str, num_routers: int, whole: int, now_s: float) -> _Bucket:
        limit, key = whole / num_routers, (tenant_id, name)
        if key not in self._buckets:
            left, at_s = self._left.get(key, (whole, now_s))
            self._buckets[key] = _Bucket(limit, left / num_routers, at_s)
        bucket = self._buckets[key]
        bucket.refill(limit, now_s)
        return bucket
