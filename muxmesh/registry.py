"""The process registry in Redis: who runs where, kept alive by heartbeats. Truth for status, never on a request's path.

Redis may be away at any time: heartbeats go on trying, and nothing else notices.
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

_PROCESSES = "muxmesh:{registry}:processes"
_RESTARTS = "muxmesh:{registry}:restarts"
HEARTBEAT_S = 5.0
LIFETIME_S = 15.0


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process of the mesh, as it described itself."""

    name: str
    pid: int
    address: str
    started_at_unix_s: float
    seen_at_unix_s: float


class Registry:
    """A connection to the registry. Methods that only look raise nothing: no answer is None."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url, decode_responses=True, socket_timeout=2.0, socket_connect_timeout=2.0
        )
        self._clock = clock

    @contextlib.asynccontextmanager
    async def registered(self, name: str, address: str) -> AsyncIterator[None]:
        """Keeps this process registered while the block runs."""
        started_at_s = self._clock.unix_s()
        beat = asyncio.create_task(self._beat(name, address, started_at_s), name="registry heartbeat")
        try:
            yield
        finally:
            beat.cancel()
            with contextlib.suppress(RedisError, OSError, asyncio.CancelledError):
                await beat
            with contextlib.suppress(RedisError, OSError):
                await self._redis.hdel(_PROCESSES, name)
            await self.close()

    async def count_restart(self, name: str) -> None:
        """Notes that the supervisor restarted a process."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.hincrby(_RESTARTS, name, 1)

    async def processes(self) -> list[tuple[ProcessRecord, int]] | None:
        """Processes that were seen lately, with their restarts; None if Redis does not answer."""
        try:
            records = await self._redis.hgetall(_PROCESSES)
            restarts = await self._redis.hgetall(_RESTARTS)
        except (RedisError, OSError):
            return None
        oldest_s = self._clock.unix_s() - LIFETIME_S
        alive = [record for text in records.values() if (record := _parse(text)) and record.seen_at_unix_s >= oldest_s]
        return [(record, int(restarts.get(record.name, 0))) for record in sorted(alive, key=lambda r: r.name)]

    async def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    async def _beat(self, name: str, address: str, started_at_s: float) -> None:
        connected = True
        while True:
            record = ProcessRecord(name, os.getpid(), address, started_at_s, self._clock.unix_s())
            try:
                await self._redis.hset(_PROCESSES, name, json.dumps(asdict(record)))
                connected = True
            except (RedisError, OSError) as error:
                if connected:
                    _log.warning("Redis is away: %s; trying again every %.0f s", error, HEARTBEAT_S)
                connected = False
            await asyncio.sleep(HEARTBEAT_S)


def _parse(text: str | bytes) -> ProcessRecord | None:
    try:
        return ProcessRecord(**json.loads(text))
    except (ValueError, TypeError):  # written by another version
        return None
