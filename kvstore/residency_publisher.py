"""Publishes in Redis which blocks a unit's prefix cache holds; `muxmesh.residency_format` has keys and bytes.

The unit never waits for Redis. While Redis is unreachable nothing is kept for it: a new snapshot follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from kvstore.residency_journal import Contents, ResidencyJournal
from muxmesh.background_task import background
from muxmesh.process_registry import HEARTBEAT_S, LIFETIME_S, redis_key
from muxmesh.redis_connection import REDIS_ERRORS, RedisClient, open_redis
from muxmesh.residency_format import (
    FIELD,
    ResidencyBatch,
    changes_name,
    encode_batch,
    encode_snapshot,
    snapshot_name,
)

_log = logging.getLogger(__name__)

BATCH_EVERY_S = 0.1
"""Shortest interval between two batches."""
MAX_BATCHES = 256
"""Length of the stream."""
SNAPSHOT_EVERY = MAX_BATCHES // 2
"""Batches between two snapshots: the stream always has all batches since the last one."""
SNAPSHOT_EVERY_S = 60.0
"""A reader that has lost a batch knows nothing of a unit until its next snapshot."""
_RETRY_S = 1.0
_TIMEOUT_S = 2.0
_LIFETIME_MS = int(LIFETIME_S * 1000)

_EXTEND = """
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 0 then
    return 0
end
if ARGV[2] ~= '' then
    redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[3], '*', ARGV[4], ARGV[2])
end
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return 1
"""
"""Appends a batch, unless it is empty, and prolongs the life of both keys. Returns 0 if Redis has no snapshot.

Keys: snapshot, stream. Arguments: lifetime in ms, batch, length of the stream, name of the field.
"""
_REPLACE = """
if ARGV[5] == 'first' then
    redis.call('DEL', KEYS[2])
end
redis.call('SET', KEYS[1], ARGV[6], 'PX', ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[3], '*', ARGV[4], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
"""
"""Writes a snapshot, and a batch without changes that lets readers notice it. `first`: what an earlier incarnation
wrote goes. Keys and arguments as above, then `first` or `next`, and the snapshot.
"""


class ResidencyPublisher:
    """Publishes the changes that a journal has. There is one publisher for a unit."""

    def __init__(
        self, url: str, mesh_id: str, unit: str, journal: ResidencyJournal, contents: Callable[[], Contents]
    ) -> None:
        """``contents``: what the prefix cache holds now."""
        self._url = url
        self._keys = [redis_key(mesh_id, name) for name in (snapshot_name(unit), changes_name(unit))]
        self._journal = journal
        self._contents = contents
        self._num_batches = 0
        """Since the last snapshot."""
        self._snapshot_at_s = 0.0
        self._needs_snapshot = True
        self._is_first = True
        self._has_changed = asyncio.Event()
        journal.on_change = self._has_changed.set

    @contextlib.asynccontextmanager
    async def published(self) -> AsyncIterator[None]:
        """Publishes while the block runs, and removes what was published at its end."""
        client = open_redis(self._url, timeout_s=_TIMEOUT_S)
        try:
            async with background(self._publish_repeatedly(client), "residency"):
                yield
        finally:
            with contextlib.suppress(*REDIS_ERRORS, TimeoutError):
                async with asyncio.timeout(_TIMEOUT_S):
                    await client.delete(*self._keys)
            with contextlib.suppress(*REDIS_ERRORS):
                await client.aclose()

    async def _publish_repeatedly(self, client: RedisClient) -> None:
        is_connected = True
        while True:
            try:
                await self._publish(client)
                is_connected = True
            except REDIS_ERRORS as error:
                if is_connected:
                    _log.warning("Redis is unreachable: %s; residency is published again when it returns", error)
                is_connected, self._needs_snapshot = False, True
                await asyncio.sleep(_RETRY_S)
                continue
            await asyncio.sleep(BATCH_EVERY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._has_changed.wait()

    async def _publish(self, client: RedisClient) -> None:
        """Writes what has changed, and prolongs the life of what was written. Raises RedisError or OSError."""
        self._has_changed.clear()
        if self._needs_snapshot or self._journal.has_lost_changes:
            await self._write_snapshot(client)
            return
        batch = self._journal.take_batch()
        if not await self._write_batch(client, batch):
            await self._write_snapshot(client)
            return
        self._num_batches += batch is not None
        now_s = asyncio.get_running_loop().time()
        is_old = self._num_batches > 0 and now_s - self._snapshot_at_s >= SNAPSHOT_EVERY_S
        if is_old or self._num_batches >= SNAPSHOT_EVERY:
            await self._write_snapshot(client)

    async def _write_batch(self, client: RedisClient, batch: ResidencyBatch | None) -> bool:
        """False if Redis has lost the snapshot."""
        data = b"" if batch is None else encode_batch(batch)
        return bool(await client.eval(_EXTEND, 2, *self._keys, _LIFETIME_MS, data, MAX_BATCHES, FIELD))

    async def _write_snapshot(self, client: RedisClient) -> None:
        snapshot = self._journal.take_snapshot(self._contents())
        sign = encode_batch(ResidencyBatch(snapshot.incarnation, snapshot.number))
        order = "first" if self._is_first else "next"
        arguments = (_LIFETIME_MS, sign, MAX_BATCHES, FIELD, order, encode_snapshot(snapshot))
        await client.eval(_REPLACE, 2, *self._keys, *arguments)
        self._needs_snapshot, self._is_first, self._num_batches = False, False, 0
        self._snapshot_at_s = asyncio.get_running_loop().time()
