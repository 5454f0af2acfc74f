"""Which tenant a call belongs to, by its API key. A copy of the directory, so no call waits for Redis. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from muxmesh.clock import Clock
from muxmesh.errors import Unauthenticated, Unavailable
from muxmesh.tenants.api_key import hash_of_api_key
from muxmesh.tenants.tenant import Tenant
from muxmesh.tenants.tenant_record import ApiKeyRecord, DirectoryCopy

_log = logging.getLogger(__name__)

Metadata = Iterable[tuple[str, str | bytes]]

_SCHEME = "bearer"
_NEEDED = "send the metadata `authorization: Bearer API-KEY`"


class TenantAccess:
    """Owns the router's copy of the directory. It refuses every key until there is one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.copy: DirectoryCopy | None = None
        """None: the directory was not read yet."""
        self._by_hash: dict[str, tuple[ApiKeyRecord, Tenant]] = {}

    def use(self, copy: DirectoryCopy) -> None:
        """Replaces the copy. Keys that are no longer in it are refused from now on."""
        if self.copy is None or self.copy.unreadable != copy.unreadable:
            for name in copy.unreadable:
                _log.error("the record of tenant %s is of another version of MuxMesh or damaged: it is refused", name)
        self.copy = copy
        self._by_hash = {key.hash: (key, tenant) for key, tenant in _keys_of(copy)}

    def identify(self, metadata: Metadata) -> Tenant:
        """The tenant of a call with this metadata. Raises Unauthenticated, or Unavailable before the first copy.

        Keys that are unknown, expired or removed are refused with the same words.
        """
        key = _api_key(metadata)
        if self.copy is None:
            raise Unavailable("API keys cannot be checked yet: Redis does not respond")
        found = self._by_hash.get(hash_of_api_key(key))
        if found is None or not found[0].is_valid(self._clock.unix_s()):
            raise Unauthenticated("the API key is not valid")
        return found[1]

    def name_of(self, tenant_id: str) -> str:
        """The name of a tenant; its id if it is not in the copy."""
        records = self.copy.records.values() if self.copy else ()
        return next((record.name for record in records if record.tenant_id == tenant_id), tenant_id)

    @property
    def tenant_ids(self) -> set[str]:
        """Of all tenants."""
        return {record.tenant_id for record in self.copy.records.values()} if self.copy else set()


def _keys_of(copy: DirectoryCopy) -> Iterator[tuple[ApiKeyRecord, Tenant]]:
    for record in copy.records.values():
        for key in record.keys:
            yield key, record.tenant


def _api_key(metadata: Metadata) -> str:
    for name, value in metadata:
        if name == "authorization":
            text = value if isinstance(value, str) else value.decode("utf-8", "replace")
            scheme, _, key = text.strip().partition(" ")
            if scheme.lower() == _SCHEME and key.strip():
                return key.strip()
            raise Unauthenticated(f"authorization: is no bearer token; {_NEEDED}")
    raise Unauthenticated(f"an API key is needed: {_NEEDED}")
