"""A tenant: whose request it is, and what it may use. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from muxmesh.errors import QuotaExceeded

MAX_LIMIT = 2**31 - 1
"""Upper bound of every limit, and of the absolute value of a priority."""
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may use, over all routers. None: no limit."""

    requests_per_minute: int | None = None
    """A token bucket: after a minute without requests this many may come at once."""
    tokens_per_minute: int | None = None
    """Prompt and output tokens, cached ones too, as a token bucket that holds those of a minute."""
    max_concurrent_requests: int | None = None
    """From their admission by a router to their end."""
    max_request_tokens: int | None = None
    """Prompt and longest output of one request, with all its sequences."""
    best_priority: int | None = None
    """The lowest value of `priority` that its requests may have. Lower is sooner."""

    def given(self) -> dict[str, int]:
        """The limits that are set, by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


NO_LIMITS = TenantLimits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """``tenant_id`` is random, so a tenant that is added again under an earlier one's name inherits nothing of it.

    ``weight``: its share of a busy unit, relative to other tenants. ``is_operator``: it may see the state of the mesh.
    """

    name: str
    tenant_id: str
    weight: float = 1.0
    limits: TenantLimits = NO_LIMITS
    is_operator: bool = False


OPEN_TENANT = Tenant("", "", is_operator=True)
"""Every caller of a mesh without API keys."""


def quota_exceeded(tenant: Tenant, quota: str, left: int, needed: int, wait_s: float) -> QuotaExceeded:
    """The error for a request that exceeds one of the limits of its tenant."""
    limit = tenant.limits.given()[quota]
    if quota == "max_concurrent_requests":
        problem = f"{limit} requests of tenant {tenant.name} are in progress, as many as may be"
    else:
        noun = quota.partition("_")[0].removesuffix("s") + ("s" if needed != 1 else "")
        problem = f"the request needs {needed} {noun}, and {max(0, left)} of {limit} per minute are left"
    return QuotaExceeded(quota, f"{problem}; try again in {wait_s:.3g} s", wait_s)
