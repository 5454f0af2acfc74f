"""Follows what units publish of their prefix caches in Redis, and keeps the `ResidencyIndex` of a router up to date.

Redis is never on the path of a request. While it is unreachable the index stays as it is for `LIFETIME_S`, and is empty
afterwards: what it has would be too old.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, cast

from muxmesh.clock import Clock
from muxmesh.process_registry import LIFETIME_S, redis_key
from muxmesh.redis_connection import REDIS_ERRORS, RedisClient, open_redis
from muxmesh.residency_format import (
    FIELD,
    ResidencyBatch,
    changes_name,
    decode_batch,
    decode_snapshot,
    snapshot_name,
)
from router.residency import ResidencyIndex

_log = logging.getLogger(__name__)

CHECK_EVERY_S = 5.0
"""Interval at which units are looked for whose snapshot has expired."""
_BLOCK_MS = 1000
"""Longest wait of one command for changes."""
_RETRY_S = 0.2
_TIMEOUT_S = 2.0
"""More than `_BLOCK_MS`."""
_Streams = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]
"""What XREAD returns: streams with their entries, each an id and fields."""


class ResidencyReader:
    """Reads the snapshot of each unit, then its changes."""

    def __init__(self, url: str, mesh_id: str, units: Sequence[str], index: ResidencyIndex, clock: Clock) -> None:
        self._url = url
        self._index = index
        self._clock = clock
        self._snapshots = {unit: redis_key(mesh_id, snapshot_name(unit)) for unit in units}
        self._units = {redis_key(mesh_id, changes_name(unit)).encode(): unit for unit in units}
        """Stream → unit."""
        self._read_at_s = clock.monotonic_s()
        self.has_read = asyncio.Event()
        """Set once the snapshots of all units have been looked for."""

    async def run(self) -> None:
        """Follows all units until cancelled."""
        is_connected = True
        while True:
            client = open_redis(self._url, timeout_s=_TIMEOUT_S)
            try:
                await self._follow(client)
            except REDIS_ERRORS as error:
                if is_connected and self._clock.monotonic_s() - self._read_at_s > _TIMEOUT_S:
                    _log.warning("Redis is unreachable: %s; units are chosen without new residency", error)
                    is_connected = False
            finally:
                with contextlib.suppress(*REDIS_ERRORS):
                    await client.aclose()
            if self._clock.monotonic_s() - self._read_at_s >= LIFETIME_S:
                self._index.drop_all()
            await asyncio.sleep(_RETRY_S)

    async def _follow(self, client: RedisClient) -> None:
        """Follows all units until Redis is lost. Raises RedisError or OSError."""
        positions = dict.fromkeys(self._units, b"0-0")
        for unit in self._units.values():
            await self._load(client, unit)
        self.has_read.set()
        checked_at_s = self._clock.monotonic_s()
        while True:
            found = cast(_Streams, await client.xread(cast(Any, dict(positions)), block=_BLOCK_MS))
            self._read_at_s = self._clock.monotonic_s()
            for stream, entries in found:
                unit = self._units[stream]
                for entry_id, fields in entries:
                    positions[stream] = entry_id
                    await self._apply(client, unit, fields.get(FIELD, b""))
            if self._read_at_s - checked_at_s >= CHECK_EVERY_S:
                checked_at_s = self._read_at_s
                await self._drop_expired(client)

    async def _apply(self, client: RedisClient, unit: str, data: bytes) -> None:
        """Applies a batch. After a gap it reads the snapshot, and drops the unit if that is older than the batch."""
        batch = _batch(data)
        if batch is not None and self._index.apply(unit, batch):
            return
        await self._load(client, unit)
        if batch is None or not self._index.apply(unit, batch):
            self._index.drop(unit)

    async def _load(self, client: RedisClient, unit: str) -> None:
        """Reads the snapshot of a unit. Without one that this version can read, nothing is known of the unit."""
        data = await client.get(self._snapshots[unit])
        try:
            snapshot = decode_snapshot(data if isinstance(data, bytes) else b"")
        except ValueError:
            self._index.drop(unit)
        else:
            self._index.load(unit, snapshot)

    async def _drop_expired(self, client: RedisClient) -> None:
        """Forgets units that are gone."""
        for unit, key in self._snapshots.items():
            if self._index.is_known(unit) and not await client.exists(key):
                self._index.drop(unit)


def _batch(data: bytes) -> ResidencyBatch | None:
    """None for anything but a batch of this version."""
    try:
        return decode_batch(data)
    except ValueError:
        return None
