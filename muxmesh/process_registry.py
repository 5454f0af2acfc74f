"""The process registry in Redis: name, pid and address of each process of a mesh, kept alive by heartbeats.

It counts restarts too. A process that stops as asked removes its record. One that crashed leaves it, so the next
instance that registers under the name finds it and counts a restart, whatever has started it. A supervisor also sees
processes that end before they register, so it counts those that it started instead. Counts are as old as the data of
Redis; a Redis that lost them gets them back from the processes that live.

It is not on the path of a request. Redis may be unreachable at any time: heartbeats are retried, and readers get None.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, replace

from muxmesh.background_task import background
from muxmesh.clock import Clock
from muxmesh.redis_connection import REDIS_ERRORS, open_redis

_log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""Interval between heartbeats of a process."""
LIFETIME_S = 15.0
"""Age of the last heartbeat up to which a process counts as alive."""

_HEARTBEAT = """
local known = redis.call('HGET', KEYS[2], ARGV[1])
local stored = redis.call('HGET', KEYS[3], ARGV[1]) or ''
local before = #stored <= 9 and tonumber(string.match(stored, '^%d+$') or '')
local count = before or tonumber(ARGV[5])
if known and known ~= ARGV[3] then
    if ARGV[4] == 'again' then
        return -1
    end
    if ARGV[4] == 'counted' then
        count = count + 1
    end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
if count ~= (before or 0) then
    redis.call('HSET', KEYS[3], ARGV[1], string.format('%d', count))
end
return count
"""
"""Writes a record, unless another instance has registered after this one. Returns the number of restarts, or -1.

Arguments: name, record, instance, `counted` or `first` or `again`, the number of restarts known to the process.
"""
_REMOVE = """
if redis.call('HGET', KEYS[2], ARGV[1]) == ARGV[2] then
    redis.call('HDEL', KEYS[1], ARGV[1])
    redis.call('HDEL', KEYS[2], ARGV[1])
end
"""
"""Removes the record of an instance, unless it is another's by now. Arguments: name, instance."""

_MAX_UNIX_S = 1e12
_MAX_PID = (1 << 31) - 1
_MAX_DIGITS = 9
"""Of a number of restarts; `_HEARTBEAT` has the same limit."""


def redis_key(mesh_id: str, name: str) -> str:
    """The Redis key ``name`` of one mesh. The hash tag puts all keys of a mesh into one slot of a Redis Cluster."""
    return f"muxmesh:{{{mesh_id}}}:{name}"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """The last heartbeat of one process."""

    name: str
    pid: int
    address: str
    started_at_unix_s: float
    seen_at_unix_s: float

    @property
    def instance(self) -> str:
        """Differs between the processes that have had this name. In containers all of them may have the same pid."""
        return f"{self.pid} {self.started_at_unix_s!r}"


class ProcessRegistry:
    """A connection to the registry of one mesh. Without Redis, writes have no effect and reads return None.

    Others may write to the same Redis: what is no record is skipped.
    """

    def __init__(self, url: str, mesh_id: str, clock: Clock) -> None:
        self._redis = open_redis(url, decode_responses=True, encoding_errors="replace")
        self._processes = redis_key(mesh_id, "processes")
        self._instances = redis_key(mesh_id, "instances")
        self._restarts = redis_key(mesh_id, "restarts")
        self._heartbeat = self._redis.register_script(_HEARTBEAT)
        self._remove = self._redis.register_script(_REMOVE)
        self._clock = clock

    @contextlib.asynccontextmanager
    async def registered(
        self, name: str, address: str, counts_restarts: bool = False, has_failed: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[None]:
        """Sends heartbeats of this process while the block runs, then removes it and closes the connection.

        ``counts_restarts``: no supervisor counts the restarts of this process. If ``has_failed()`` at the end of the
        block, or the block raises an error, the record stays, as after a crash.
        """
        record = ProcessRecord(name, os.getpid(), address, self._clock.unix_s(), 0.0)
        try:
            async with background(self._send_heartbeats(record, counts_restarts), "registry heartbeat"):
                yield
            if not has_failed():
                with contextlib.suppress(*REDIS_ERRORS):
                    await self._remove(keys=[self._processes, self._instances], args=[name, record.instance])
        finally:
            await self.close()

    async def set_restarts(self, counts: Mapping[str, int]) -> bool:
        """Sets the numbers of restarts of processes by name; there is at least one. False if Redis is unreachable."""
        try:
            await self._redis.hset(self._restarts, items=[part for pair in counts.items() for part in pair])
        except REDIS_ERRORS:
            return False
        return True

    async def processes(self) -> list[tuple[ProcessRecord, int]] | None:
        """Live processes, sorted by name, each with its number of restarts. None if Redis is unreachable."""
        try:
            records = await self._redis.hgetall(self._processes)
            restarts = await self._redis.hgetall(self._restarts)
        except REDIS_ERRORS:
            return None
        alive = [record for text in records.values() if (record := _parse(text)) and self._is_alive(record)]
        return [(record, _count(restarts.get(record.name, "0"))) for record in sorted(alive, key=lambda r: r.name)]

    async def address_of(self, name: str) -> str | None:
        """Address of a live process. None if no live process has this name, or if Redis is unreachable."""
        found = await self.processes()
        return next((record.address for record, _ in found or () if record.name == name), None)

    async def close(self) -> None:
        with contextlib.suppress(*REDIS_ERRORS):
            await self._redis.aclose()

    async def _send_heartbeats(self, record: ProcessRecord, counts_restarts: bool) -> None:
        first = "counted" if counts_restarts else "first"
        order, num_restarts, connected, alone = first, 0, True, True
        while True:
            try:
                found = await self._send_heartbeat(record, order, num_restarts)
                connected = True
                if found >= 0:
                    order, num_restarts, alone = "again", found, True
                elif (other := await self._record_of(record.name)) is None:
                    order = first  # the other instance has ended: this one takes its place in the next heartbeat
                elif alone:
                    alone = False
                    _log.error("%s", _same_name(other))
            except REDIS_ERRORS as error:
                if connected:
                    _log.warning("Redis is unreachable: %s; heartbeats are retried every %.0f s", error, HEARTBEAT_S)
                connected = False
            await asyncio.sleep(HEARTBEAT_S)

    async def _send_heartbeat(self, record: ProcessRecord, order: str, num_restarts: int) -> int:
        """See `_HEARTBEAT`. Raises RedisError or OSError."""
        text = json.dumps(asdict(replace(record, seen_at_unix_s=self._clock.unix_s())))
        keys = [self._processes, self._instances, self._restarts]
        return int(await self._heartbeat(keys=keys, args=[record.name, text, record.instance, order, num_restarts]))

    async def _record_of(self, name: str) -> ProcessRecord | None:
        """The record of a live process; None if there is none. Raises RedisError or OSError."""
        record = _parse(await self._redis.hget(self._processes, name) or "")
        return record if record is not None and self._is_alive(record) else None

    def _is_alive(self, record: ProcessRecord) -> bool:
        return record.seen_at_unix_s >= self._clock.unix_s() - LIFETIME_S


def _same_name(other: ProcessRecord) -> str:
    return (
        f"another process has registered as {other.name} while this one runs: pid {other.pid} at {other.address}; "
        "stop one of the two, or give each router a name of its own (--name)"
    )


def _parse(text: str | bytes) -> ProcessRecord | None:
    """The record in ``text``; None for anything else, such as one of another version of the mesh."""
    try:
        record = ProcessRecord(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    texts, times = (record.name, record.address), (record.started_at_unix_s, record.seen_at_unix_s)
    is_sound = (
        all(isinstance(one, str) and one.isprintable() for one in texts)
        and all(isinstance(one, int | float) and 0 <= one <= _MAX_UNIX_S for one in times)
        and isinstance(record.pid, int)
        and 0 < record.pid <= _MAX_PID
    )
    return record if is_sound else None


def _count(text: str | bytes) -> int:
    """The number of restarts in ``text``; 0 for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else 0
