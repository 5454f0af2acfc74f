"""The predictor's snapshot in Redis: read at the start, written now and then. Redis may be away at any time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator

import redis.asyncio
from redis.exceptions import RedisError

from muxmesh.errors import ConfigError
from muxmesh.predictor import snapshot
from muxmesh.predictor.guard import Guard
from muxmesh.predictor.predictor import LengthPredictor
from router.forecast import Forecaster

_log = logging.getLogger(__name__)

_KEY = "muxmesh:{predictor}:snapshot"
SAVE_EVERY_S = 60.0


@contextlib.asynccontextmanager
async def kept(url: str, forecaster: Forecaster, predictor: LengthPredictor, guard: Guard) -> AsyncIterator[None]:
    """Goes on from the last snapshot, and keeps one while the block runs and at its end."""
    client = redis.asyncio.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    try:
        await _restore(client, forecaster, predictor, guard)
        saving = asyncio.create_task(_save_repeatedly(client, forecaster, predictor, guard), name="predictor snapshots")
        try:
            yield
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(2.0):  # a predictor that hangs does not hold up the end
                    await _save(client, forecaster, predictor, guard)
    finally:
        with contextlib.suppress(RedisError, OSError):
            await client.aclose()


async def _restore(
    client: redis.asyncio.Redis, forecaster: Forecaster, predictor: LengthPredictor, guard: Guard
) -> None:
    try:
        found = await client.get(_KEY)
        if isinstance(found, bytes):
            await forecaster.call(functools.partial(snapshot.restore, found, predictor, guard))
            _log.info("the predictor goes on from %d answers", predictor.history.num_observed)
    except (RedisError, OSError) as error:
        _log.warning("no predictor snapshot, Redis is away: %s", error)
    except ConfigError as error:
        _log.warning("the predictor begins anew: %s", error)


async def _save_repeatedly(
    client: redis.asyncio.Redis, forecaster: Forecaster, predictor: LengthPredictor, guard: Guard
) -> None:
    num_saved = predictor.history.num_observed
    while True:
        await asyncio.sleep(SAVE_EVERY_S)
        if predictor.history.num_observed != num_saved:
            num_saved = predictor.history.num_observed
            with contextlib.suppress(RedisError, OSError):
                await _save(client, forecaster, predictor, guard)


async def _save(client: redis.asyncio.Redis, forecaster: Forecaster, predictor: LengthPredictor, guard: Guard) -> None:
    """The snapshot is made in the predictor's thread, between guesses."""
    if predictor.history.num_observed:
        await client.set(_KEY, await forecaster.call(functools.partial(snapshot.save, predictor, guard)))
