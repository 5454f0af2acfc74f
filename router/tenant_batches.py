"""Calls of Redis for several tenants at once: what belongs to one tenant is sent together."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

from muxmesh.tenants.tenant import Tenant


class _OfTenant(Protocol):
    @property
    def tenant(self) -> Tenant: ...


T = TypeVar("T", bound=_OfTenant)


async def send_by_tenant(
    batch: Iterable[T], send: Callable[[Tenant, list[T]], Awaitable[None]]
) -> tuple[list[T], BaseException | None]:
    """Calls ``send`` for each tenant of ``batch`` with its items, all at the same time.

    Returns the items of the calls that failed, in their order by tenant, and the first error. Raises none of them.
    """
    by_tenant = defaultdict[str, list[T]](list)
    for one in batch:
        by_tenant[one.tenant.tenant_id].append(one)
    results = await asyncio.gather(
        *(send(of_tenant[-1].tenant, of_tenant) for of_tenant in by_tenant.values()), return_exceptions=True
    )
    pairs = [(of_tenant, error) for of_tenant, error in zip(by_tenant.values(), results, strict=True) if error]
    return [one for of_tenant, _ in pairs for one in of_tenant], pairs[0][1] if pairs else None
