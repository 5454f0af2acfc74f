"""The directory of tenants in Redis: one hash, name → record, and a version that changes with each write."""

from __future__ import annotations

import random
from collections.abc import Callable

from muxmesh.errors import InvalidRequest, Unavailable
from muxmesh.process_registry import redis_key
from muxmesh.quoting import quoted
from muxmesh.redis_connection import RedisClient, redis_required
from muxmesh.tenants.tenant_record import DirectoryCopy, TenantRecord, record_of

_VERSION_BITS = 64
_MAX_TRIES = 10

_REPLACE = """
local found = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if found ~= ARGV[2] then
    return 0
end
if ARGV[3] == '' then
    redis.call('HDEL', KEYS[1], ARGV[1])
else
    redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
redis.call('SET', KEYS[2], ARGV[4])
return 1
"""
"""Replaces a record if it is still the expected one. Arguments: name, expected text, new text, new version.

An empty text is no record.
"""
_RESTORE = """
if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 then
    return 0
end
for index = 2, #ARGV, 2 do
    redis.call('HSET', KEYS[1], ARGV[index], ARGV[index + 1])
end
redis.call('SET', KEYS[2], ARGV[1])
return 1
"""
"""Writes a copy into a Redis that has lost the directory. Arguments: version, then name and text of each record."""
_READ = """
return {redis.call('GET', KEYS[2]) or '', redis.call('HGETALL', KEYS[1])}
"""


class TenantDirectory:
    """Reads and writes the tenants of one mesh. Every method raises Unavailable if Redis does not respond."""

    def __init__(self, client: RedisClient, mesh_id: str, rng: random.Random) -> None:
        """``client`` returns bytes. ``rng`` makes versions, which have to differ between writers."""
        self._client = client
        self._rng = rng
        self._keys = [redis_key(mesh_id, "tenants"), redis_key(mesh_id, "tenants-version")]
        self._replace = client.register_script(_REPLACE)
        self._restore = client.register_script(_RESTORE)
        self._read = client.register_script(_READ)

    async def version(self) -> str:
        """The version of the directory; empty if Redis has none."""
        with redis_required():
            return _text(await self._client.get(self._keys[1]) or b"")

    async def read(self) -> DirectoryCopy:
        """All tenants."""
        with redis_required():
            version, pairs = await self._read(keys=self._keys)
        texts: dict[str, bytes] = {_text(name): text for name, text in zip(pairs[::2], pairs[1::2], strict=True)}
        records = {name: record for name, text in texts.items() if (record := record_of(text)) and record.name == name}
        return DirectoryCopy(_text(version), records, tuple(sorted(texts.keys() - records.keys())))

    async def restore(self, copy: DirectoryCopy) -> bool:
        """Writes ``copy`` with its version if Redis has no directory at all; returns whether it had none."""
        parts = [part for record in copy.records.values() for part in (record.name, record.to_text())]
        with redis_required():
            return bool(await self._restore(keys=self._keys, args=[copy.version, *parts]))

    async def add(self, record: TenantRecord) -> None:
        """Adds a tenant. Raises InvalidRequest if one has its name."""
        if not await self._write(record.name, b"", record.to_text().encode()):
            raise InvalidRequest("name", f"a tenant {quoted(record.name)} exists; `muxmesh tenant set` changes it")

    async def change(self, name: str, changed: Callable[[TenantRecord], TenantRecord]) -> TenantRecord:
        """Replaces a record by ``changed`` of it; returns the new one.

        Raises InvalidRequest if there is no such tenant, or its record cannot be read. ``changed`` is called again if
        another one has written in between.
        """
        for _ in range(_MAX_TRIES):
            text, record = await self._find(name)
            if record is None:
                raise InvalidRequest(
                    "name", f"the record of tenant {quoted(name)} is of another version of MuxMesh, or damaged"
                )
            new = changed(record)
            if await self._write(name, text, new.to_text().encode()):
                return new
        raise Unavailable(f"tenant {quoted(name)} is changed by others all the time; try again")

    async def remove(self, name: str) -> TenantRecord | None:
        """Removes a tenant; returns its record, None if that could not be read. Raises InvalidRequest without one."""
        for _ in range(_MAX_TRIES):
            text, record = await self._find(name)
            if await self._write(name, text, b""):
                return record
        raise Unavailable(f"tenant {quoted(name)} is changed by others all the time; try again")

    async def _find(self, name: str) -> tuple[bytes, TenantRecord | None]:
        with redis_required():
            found = await self._client.hget(self._keys[0], name)
        if found is None:
            raise InvalidRequest("name", f"there is no tenant {quoted(name)}; `muxmesh tenant list` shows them")
        return found, record_of(found)

    async def _write(self, name: str, expected: bytes, text: bytes) -> bool:
        version = f"{self._rng.getrandbits(_VERSION_BITS):016x}"
        with redis_required():
            return bool(await self._replace(keys=self._keys, args=[name, expected, text, version]))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
