"""The record of a tenant as JSON text, as Redis holds it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muxmesh.config.section import NAME_PATTERN, Name
from muxmesh.tenants.tenant import MAX_LIMIT, MAX_NAME, MAX_WEIGHT, MIN_WEIGHT, Tenant, TenantLimits

MAX_UNIX_S = 1e11
MAX_KEYS = 16

_Limit = Annotated[int | None, Field(ge=1, le=MAX_LIMIT)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ApiKeyRecord(_Part):
    """A key's hash, and when it was made and expires. Unix time."""

    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at_unix_s: float = Field(ge=0, le=MAX_UNIX_S)
    expires_at_unix_s: float | None = Field(default=None, ge=0, le=MAX_UNIX_S)

    def is_valid(self, unix_s: float) -> bool:
        return self.expires_at_unix_s is None or unix_s < self.expires_at_unix_s


class LimitsRecord(_Part):
    """See `TenantLimits`."""

    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    max_concurrent_requests: _Limit = None
    max_request_tokens: _Limit = None
    best_priority: int | None = Field(default=None, ge=-MAX_LIMIT, le=MAX_LIMIT)


class TenantRecord(_Part):
    """A tenant with its keys. At least one key is valid unless all have expired."""

    name: Name
    tenant_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    created_at_unix_s: float = Field(ge=0, le=MAX_UNIX_S)
    weight: float = Field(default=1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT)
    is_operator: bool = False
    limits: LimitsRecord = LimitsRecord()
    keys: tuple[ApiKeyRecord, ...] = Field(max_length=MAX_KEYS)

    @property
    def tenant(self) -> Tenant:
        limits = TenantLimits(**self.limits.model_dump())
        return Tenant(self.name, self.tenant_id, self.weight, limits, self.is_operator)

    def to_text(self) -> str:
        return self.model_dump_json(exclude_defaults=True)


@dataclass(frozen=True, slots=True)
class DirectoryCopy:
    """All tenants at one time. ``version`` changes with each write; empty: Redis has no directory."""

    version: str
    records: dict[str, TenantRecord]
    unreadable: tuple[str, ...] = ()
    """Names of records that this version of the mesh cannot read. Their keys are refused."""


def is_tenant_name(name: str) -> bool:
    """Whether a tenant may have this name."""
    return len(name) <= MAX_NAME and re.fullmatch(NAME_PATTERN, name) is not None


def record_of(text: bytes) -> TenantRecord | None:
    """The record in ``text``; None for anything else."""
    try:
        return TenantRecord.model_validate_json(text)
    except (ValidationError, ValueError, RecursionError):
        return None
