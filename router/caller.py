"""Whose call it is that the present task serves."""

from __future__ import annotations

from contextvars import ContextVar

from muxmesh.tenants.tenant import OPEN_TENANT, Tenant

_CALLER: ContextVar[Tenant] = ContextVar("caller", default=OPEN_TENANT)


def caller() -> Tenant:
    """The tenant of the call; `OPEN_TENANT` on private sockets, and on the public one without API keys."""
    return _CALLER.get()


def set_caller(tenant: Tenant) -> None:
    """Sets the tenant of the call that this task serves."""
    _CALLER.set(tenant)
