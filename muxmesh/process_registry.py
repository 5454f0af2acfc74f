"""The process registry in Redis: name, pid and address of each process of a mesh, kept alive by heartbeats.

It is not on the path of a request. Redis may be unreachable at any time: heartbeats are retried, and readers get None.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass

import redis.asyncio
from redis.exceptions import RedisError

from muxmesh.background_task import background
from muxmesh.clock import Clock

_log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""Interval between heartbeats of a process."""
LIFETIME_S = 15.0
"""Age of the last heartbeat up to which a process counts as alive."""

_MAX_UNIX_S = 1e12
_MAX_PID = (1 << 31) - 1
_MAX_DIGITS = 9


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


class ProcessRegistry:
    """A connection to the registry of one mesh. Without Redis, writes have no effect and reads return None.

    Others may write to the same Redis: what is no record is skipped.
    """

    def __init__(self, url: str, mesh_id: str, clock: Clock) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url, decode_responses=True, encoding_errors="replace", socket_timeout=2.0, socket_connect_timeout=2.0
        )
        self._processes = redis_key(mesh_id, "processes")
        self._restarts = redis_key(mesh_id, "restarts")
        self._clock = clock

    @contextlib.asynccontextmanager
    async def registered(self, name: str, address: str) -> AsyncIterator[None]:
        """Sends heartbeats of this process while the block runs, then removes it and closes the connection."""
        started_at_s = self._clock.unix_s()
        try:
            async with background(self._send_heartbeats(name, address, started_at_s), "registry heartbeat"):
                yield
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self._redis.hdel(self._processes, name)
            await self.close()

    async def set_restarts(self, counts: Mapping[str, int]) -> bool:
        """Replaces the numbers of restarts of all processes. Returns False if Redis is unreachable."""
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.delete(self._restarts)
                if counts:
                    pipeline.hset(self._restarts, items=[part for pair in counts.items() for part in pair])
                await pipeline.execute()
        except (RedisError, OSError):
            return False
        return True

    async def processes(self) -> list[tuple[ProcessRecord, int]] | None:
        """Live processes, sorted by name, each with its number of restarts. None if Redis is unreachable."""
        try:
            records = await self._redis.hgetall(self._processes)
            restarts = await self._redis.hgetall(self._restarts)
        except (RedisError, OSError):
            return None
        oldest_s = self._clock.unix_s() - LIFETIME_S
        alive = [record for text in records.values() if (record := _parse(text)) and record.seen_at_unix_s >= oldest_s]
        return [(record, _count(restarts.get(record.name, "0"))) for record in sorted(alive, key=lambda r: r.name)]

    async def address_of(self, name: str) -> str | None:
        """Address of a live process. None if no live process has this name, or if Redis is unreachable."""
        found = await self.processes()
        return next((record.address for record, _ in found or () if record.name == name), None)

    async def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    async def _send_heartbeats(self, name: str, address: str, started_at_s: float) -> None:
        connected = True
        while True:
            record = ProcessRecord(name, os.getpid(), address, started_at_s, self._clock.unix_s())
            try:
                await self._redis.hset(self._processes, name, json.dumps(asdict(record)))
                connected = True
            except (RedisError, OSError) as error:
                if connected:
                    _log.warning("Redis is unreachable: %s; heartbeats are retried every %.0f s", error, HEARTBEAT_S)
                connected = False
            await asyncio.sleep(HEARTBEAT_S)


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
