"""The length predictor's snapshot in Redis, read at the start and written every minute.

An unreachable Redis is logged and never stops the router.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from muxmesh.background_task import background
from muxmesh.errors import ConfigError
from muxmesh.predictor import snapshot
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from muxmesh.process_registry import redis_key
from muxmesh.redis_connection import REDIS_ERRORS, RedisClient, open_redis
from router.length_forecast import LengthForecaster

_log = logging.getLogger(__name__)

SAVE_EVERY_S = 60.0
_LAST_SAVE_TIMEOUT_S = 2.0
"""Maximum time of the last save: a predictor that hangs does not delay the shutdown."""


class PredictorSnapshots:
    """The snapshot of one mesh's predictor, under one Redis key."""

    def __init__(self, url: str, mesh_id: str) -> None:
        self._url = url
        self._key = redis_key(mesh_id, "predictor")

    async def load(self) -> tuple[LengthPredictor, CheckedPredictor]:
        """Returns the predictor of the last snapshot, or an empty one if there is none that this version can read."""
        async with self._connected() as client:
            try:
                found = await client.get(self._key)
                if isinstance(found, bytes):
                    predictor, checked = await asyncio.to_thread(snapshot.read, found)
                    _log.info("the length predictor continues from %d outputs", predictor.history.num_observed)
                    return predictor, checked
            except REDIS_ERRORS as error:
                _log.warning("the length predictor starts empty, Redis is unreachable: %s", error)
            except ConfigError as error:
                _log.warning("the length predictor starts empty: %s", error)
                with contextlib.suppress(*REDIS_ERRORS):
                    await client.delete(self._key)  # earlier versions wrote tenants as they are
        predictor = LengthPredictor()
        return predictor, CheckedPredictor(predictor)

    @contextlib.asynccontextmanager
    async def saved(
        self, forecaster: LengthForecaster, predictor: LengthPredictor, checked: CheckedPredictor
    ) -> AsyncIterator[None]:
        """Saves a snapshot every `SAVE_EVERY_S` while the block runs, if it has changed, and one at its end."""
        async with self._connected() as client:
            save = functools.partial(self._save, client, forecaster, predictor, checked)
            try:
                async with background(self._save_repeatedly(save, predictor), "predictor snapshots"):
                    yield
            finally:
                with contextlib.suppress(*REDIS_ERRORS, TimeoutError):
                    async with asyncio.timeout(_LAST_SAVE_TIMEOUT_S):
                        await save()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[RedisClient]:
        client = open_redis(self._url)
        try:
            yield client
        finally:
            with contextlib.suppress(*REDIS_ERRORS):
                await client.aclose()

    @staticmethod
    async def _save_repeatedly(save: Callable[[], Awaitable[None]], predictor: LengthPredictor) -> None:
        num_saved = predictor.history.num_observed
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            num_observed = predictor.history.num_observed
            if num_observed != num_saved:
                with contextlib.suppress(*REDIS_ERRORS):
                    await save()
                    num_saved = num_observed

    async def _save(
        self,
        client: RedisClient,
        forecaster: LengthForecaster,
        predictor: LengthPredictor,
        checked: CheckedPredictor,
    ) -> None:
        """Copies the state in the predictor's thread, between predictions, and serializes it in another thread."""
        if predictor.history.num_observed:
            taken = await forecaster.call(functools.partial(snapshot.take, predictor, checked))
            await client.set(self._key, await asyncio.to_thread(snapshot.write, taken))
