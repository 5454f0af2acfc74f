"""The process registry in Redis: which processes run where, kept alive by heartbeats. Never on a request's path.

Redis may be unreachable at any time: heartbeats keep trying, and nothing else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

import redis.asyncio
from redis.exceptions import RedisError

from muxmesh.clock import Clock

_log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
LIFETIME_S = 15.0


def redis_key(mesh_id: str, name: str) -> str:
    """The Redis key ``name`` of one mesh. Several meshes may share a Redis; all keys of one are in one hash slot."""
    return f"muxmesh:{{{mesh_id}}}:{name}"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process of the mesh, as it described itself."""

    name: str
    pid: int
    address: str
    started_at_unix_s: float
    seen_at_unix_s: float


class ProcessRegistry:
    """A connection to the registry of one mesh. Methods that only read never raise: without Redis they return None."""

    def __init__(self, url: str, mesh_id: str, clock: Clock) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url, decode_responses=True, socket_timeout=2.0, socket_connect_timeout=2.0
        )
        self._processes = redis_key(mesh_id, "processes")
        self._restarts = redis_key(mesh_id, "restarts")
        self._clock = clock

    @contextlib.asynccontextmanager
    async def registered(self, name: str, address: str) -> AsyncIterator[None]:
        """Keeps this process registered while the block runs; closes the connection at its end."""
        started_at_s = self._clock.unix_s()
        heartbeats = asyncio.create_task(self._send_heartbeats(name, address, started_at_s), name="registry heartbeat")
        try:
            yield
        finally:
            heartbeats.cancel()
            with contextlib.suppress(RedisError, OSError, asyncio.CancelledError):
                await heartbeats
            with contextlib.suppress(RedisError, OSError):
                await self._redis.hdel(self._processes, name)
            await self.close()

    async def count_restart(self, name: str) -> None:
        """Counts a restart of a process by the supervisor."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.hincrby(self._restarts, name, 1)

    async def processes(self) -> list[tuple[ProcessRecord, int]] | None:
        """Processes with a recent heartbeat, each with its number of restarts; None if Redis does not answer."""
        try:
            records = await self._redis.hgetall(self._processes)
            restarts = await self._redis.hgetall(self._restarts)
        except (RedisError, OSError):
            return None
        oldest_s = self._clock.unix_s() - LIFETIME_S
        alive = [record for text in records.values() if (record := _parse(text)) and record.seen_at_unix_s >= oldest_s]
        return [(record, int(restarts.get(record.name, 0))) for record in sorted(alive, key=lambda r: r.name)]

    async def address_of(self, name: str) -> str | None:
        """Address of a process with a recent heartbeat; None if there is none, or Redis does not answer."""
        found = await self.processes()
        return next((record.address for record, _ in found or () if record.name == name), None)

    async def close(self) -> None:
        """Closes the connection."""
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
                    _log.warning("Redis is unreachable: %s; trying again every %.0f s", error, HEARTBEAT_S)
                connected = False
            await asyncio.sleep(HEARTBEAT_S)


def _parse(text: str | bytes) -> ProcessRecord | None:
    try:
        return ProcessRecord(**json.loads(text))
    except (ValueError, TypeError):  # written by another version
        return None
