"""Keeps a router's copy of the tenant directory up to date, and gives it back to a Redis that has lost it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Set

from muxmesh.errors import Unavailable
from muxmesh.tenants.tenant_directory import TenantDirectory
from router.tenant_access import TenantAccess

_log = logging.getLogger(__name__)

REFRESH_S = 1.0
"""How long a new, changed or removed tenant takes to have effect on every router."""


async def refresh(directory: TenantDirectory, access: TenantAccess) -> None:
    """Reads the directory if its version has changed. Raises Unavailable if Redis does not respond.

    A Redis with neither tenants nor a version has lost them, if this router has a copy with a version: it gets the
    copy back. Of several routers the first one writes it.
    """
    version = await directory.version()
    copy = access.copy
    if copy is not None and copy.version == version:
        return
    if not version and copy is not None and await directory.restore(copy):
        _log.warning("Redis had lost the tenants; they are restored from this router's copy")
        return
    access.use(await directory.read())


async def refresh_repeatedly(
    directory: TenantDirectory, access: TenantAccess, on_change: Callable[[Set[str]], None]
) -> None:
    """Calls `refresh` every `REFRESH_S` until cancelled. An unreachable Redis is logged once.

    ``on_change`` is called with the ids of all tenants when they were read again.
    """
    is_reachable = True
    while True:
        try:
            before = access.copy
            await refresh(directory, access)
            if access.copy is not before:
                on_change(access.tenant_ids)
            is_reachable = True
        except Unavailable as error:
            if is_reachable:
                _log.warning("the tenants stay as they were read last: %s", error)
            is_reachable = False
        await asyncio.sleep(REFRESH_S)
