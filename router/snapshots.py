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


async def known_before(url: str) -> tuple[LengthPredictor, Guard]:
    """A predictor that goes on from the last snapshot, if there is one."""
    async with _connected(url) as client:
        try:
            found = await client.get(_KEY)
            if isinstance(found, bytes):
                predictor, guard = await asyncio.to_thread(snapshot.read, found)
                _log.info("the predictor goes on from %d answers", predictor.history.num_observed)
                return predictor, guard
        except (RedisError, OSError) as error:
            _log.warning("no predictor snapshot, Redis is away: %s", error)
        except ConfigError as error:
            _log.warning("the predictor begins anew: %s", error)
    predictor = LengthPredictor()
    return predictor, Guard(predictor)


@contextlib.asynccontextmanager
async def kept(url: str, forecaster: Forecaster, predictor: LengthPredictor, guard: Guard) -> AsyncIterator[None]:
    """Keeps a snapshot while the block runs and at its end."""
    async with _connected(url) as client:
        saving = asyncio.create_task(_save_repeatedly(client, forecaster, predictor, guard), name="predictor snapshots")
        try:
            yield
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(2.0):  # a predictor that hangs does not hold up the end
                    await _save(client, forecaster, predictor, guard)


@contextlib.asynccontextmanager
async def _connected(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    try:
        yield client
    finally:
        with contextlib.suppress(RedisError, OSError):
            await client.aclose()


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
    """The copy is made in the predictor's thread, between guesses, and written in another."""
    if predictor.history.num_observed:
        taken = await forecaster.call(functools.partial(snapshot.take, predictor, guard))
        await client.set(_KEY, await asyncio.to_thread(snapshot.write, taken))
