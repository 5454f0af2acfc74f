"""Tenants for tests."""

from __future__ import annotations

from typing import Any

from muxmesh.tenants.api_key import hash_of_api_key
from muxmesh.tenants.tenant import Tenant, TenantLimits
from muxmesh.tenants.tenant_record import ApiKeyRecord, LimitsRecord, TenantRecord

_LIMITS = frozenset(LimitsRecord.model_fields)


def tenant(name: str = "acme", **settings: Any) -> Tenant:
    """A tenant whose id has its name; ``settings`` are its limits, `weight` and `is_operator`."""
    limits = TenantLimits(**{key: value for key, value in settings.items() if key in _LIMITS})
    others = {key: value for key, value in settings.items() if key not in _LIMITS}
    return Tenant(name, f"id-{name}", limits=limits, **others)


def record(name: str = "acme", *keys: str, number: int = 1, **settings: Any) -> TenantRecord:
    """A record with these API keys, which never expire; ``number`` makes its id."""
    limits = LimitsRecord(**{key: value for key, value in settings.items() if key in _LIMITS})
    others = {key: value for key, value in settings.items() if key not in _LIMITS}
    hashes = tuple(ApiKeyRecord(hash=hash_of_api_key(key), created_at_unix_s=1.0) for key in keys)
    return TenantRecord(
        name=name, tenant_id=f"{number:016x}", created_at_unix_s=1.0, keys=hashes, limits=limits, **others
    )
