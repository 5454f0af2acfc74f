"""Snapshots in a real Redis, which one test takes away."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio
from redis.exceptions import RedisError

import router.predictor_snapshots
from muxmesh.clock import SystemClock
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from muxmesh.process_registry import redis_key
from router.length_forecast import LengthForecaster
from router.predictor_snapshots import SAVE_EVERY_S, PredictorSnapshots
from tests.support.virtual_time import run_virtually

SECRET = b"secret of a mesh"


@pytest_asyncio.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


@asynccontextmanager
async def forecaster_of(checked: CheckedPredictor) -> AsyncIterator[LengthForecaster]:
    forecaster = LengthForecaster(checked, 60.0, SystemClock(), SECRET)
    try:
        yield forecaster
    finally:
        forecaster.close()


async def observe(forecaster: LengthForecaster, text: str = "Hello", num_tokens: int = 40) -> None:
    forecaster.observe(await forecaster.predict(text, "m", "", None), num_tokens, False)
    await forecaster.call(lambda: None)


async def save(snapshots: PredictorSnapshots, *texts: str) -> None:
    """Runs a router's life: loads, observes an output for each text, saves at the end."""
    predictor, checked = await snapshots.load()
    async with forecaster_of(checked) as forecaster, snapshots.saved(forecaster, predictor, checked):
        for text in texts:
            await observe(forecaster, text)


async def test_no_tenant_is_written_to_redis_and_what_was_learned_of_it_is_restored(
    redis_url: str, client: Any
) -> None:
    snapshots = PredictorSnapshots(redis_url, "tenants")
    predictor, checked = await snapshots.load()
    async with forecaster_of(checked) as forecaster, snapshots.saved(forecaster, predictor, checked):
        for _ in range(5):
            forecast = await forecaster.predict("Hello", "m", "salt-of-acme", 50)
            forecaster.observe(forecast, 60, False)
            await forecaster.call(lambda: None)
    for key in await client.keys():
        assert b"acme" not in key and b"acme" not in await client.get(key)
    _, restored = await snapshots.load()
    async with forecaster_of(restored) as forecaster:
        own, other = [await forecaster.predict("Hello", "m", tenant, 50) for tenant in ("salt-of-acme", "another")]
    assert own.source == "hint" and other.source == "cold", "its hints are known"


async def test_a_snapshot_that_cannot_be_read_is_deleted(
    redis_url: str, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of earlier versions have the tenants in clear."""
    key = redis_key("old", "predictor")
    await client.set(key, b"salt-of-acme")
    predictor, _ = await PredictorSnapshots(redis_url, "old").load()
    assert predictor.history.num_observed == 0 and "starts empty: the snapshot is damaged" in caplog.text
    assert await client.get(key) is None


async def test_a_mesh_without_a_snapshot_begins_with_an_empty_predictor(redis_url: str, client: Any) -> None:
    predictor, checked = await PredictorSnapshots(redis_url, "a").load()
    assert predictor.history.num_observed == 0
    assert checked.predict("Hello", "m").source == "cold"


async def test_a_restarted_router_continues_from_the_last_snapshot(redis_url: str, client: Any) -> None:
    snapshots = PredictorSnapshots(redis_url, "a")
    await save(snapshots, "Hello", "Good day")
    await save(snapshots, "Good night")
    predictor, checked = await snapshots.load()
    assert predictor.history.num_observed == 3
    prediction = checked.predict("Hello", "m")
    assert prediction.source == "retrieved" and 30 < prediction.prediction.p50_tokens < 60


async def test_two_meshes_share_a_redis_and_no_snapshot(redis_url: str, client: Any) -> None:
    await save(PredictorSnapshots(redis_url, "a"), "Hello")
    assert (await PredictorSnapshots(redis_url, "b").load())[0].history.num_observed == 0


async def test_an_empty_predictor_is_not_saved(redis_url: str, client: redis.asyncio.Redis) -> None:
    await save(PredictorSnapshots(redis_url, "a"))
    assert await client.keys() == []


async def test_a_snapshot_is_saved_while_the_router_runs(
    redis_url: str, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.predictor_snapshots, "SAVE_EVERY_S", 0.001)
    snapshots, key = PredictorSnapshots(redis_url, "a"), redis_key("a", "predictor")
    predictor, checked = await snapshots.load()
    async with forecaster_of(checked) as forecaster, snapshots.saved(forecaster, predictor, checked):
        await observe(forecaster)
        async with asyncio.timeout(20):
            while await client.get(key) is None:
                pass
    assert (await snapshots.load())[0].history.num_observed == 1


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip file"])
async def test_a_damaged_snapshot_is_logged_and_replaced(
    redis_url: str, client: redis.asyncio.Redis, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await client.set(redis_key("a", "predictor"), content)
    snapshots = PredictorSnapshots(redis_url, "a")
    await save(snapshots, "Hello")
    assert "the length predictor starts empty: " in caplog.text
    assert (await snapshots.load())[0].history.num_observed == 1


async def test_an_unreachable_redis_costs_the_snapshot_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await save(PredictorSnapshots(f"unix://{tmp_path}/none.sock", "a"), "Hello")
    assert "the length predictor starts empty, Redis is unreachable" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


class BlockedPredictor(LengthPredictor):
    """Blocks in its first call until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def predict(self, text: str, model: str, tenant: str = "") -> Any:
        self.release.wait(30)
        return super().predict(text, model, tenant)


async def test_a_predictor_that_hangs_does_not_delay_the_shutdown(
    redis_url: str, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.predictor_snapshots, "_LAST_SAVE_TIMEOUT_S", 0.01)
    predictor = BlockedPredictor()
    checked = CheckedPredictor(predictor)
    predictor.release.set()
    checked.observe(checked.predict("Hello", "m"), 40, False)
    predictor.release.clear()
    forecaster = LengthForecaster(checked, 0.001, SystemClock(), SECRET)
    async with asyncio.timeout(20), PredictorSnapshots(redis_url, "a").saved(forecaster, predictor, checked):
        assert (await forecaster.predict("Hello", "m", "", None)).source == "late"
    assert await client.keys() == []
    predictor.release.set()
    forecaster.close()


def saves_in_virtual_time(num_observed: list[int], failing: set[int]) -> list[int]:
    """Indices of the periods whose end began a save. ``num_observed``: outputs at the end of each period."""
    predictor, began = LengthPredictor(), list[int]()

    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def save() -> None:
            began.append(round(loop.time() / SAVE_EVERY_S) - 1)
            if began[-1] in failing:
                raise RedisError("gone")

        saving = asyncio.create_task(PredictorSnapshots._save_repeatedly(save, predictor))
        for period, count in enumerate(num_observed):
            await asyncio.sleep((period + 0.5) * SAVE_EVERY_S - loop.time())
            predictor.history.num_observed = count
        await asyncio.sleep(SAVE_EVERY_S)
        saving.cancel()
        with suppress(asyncio.CancelledError):
            await saving

    run_virtually(run())
    return began


@pytest.mark.parametrize(
    ("num_observed", "failing", "began"),
    [
        ([0, 0, 0], set(), []),
        ([5, 5, 5], set(), [0]),
        ([5, 5, 6], set(), [0, 2]),
        ([5, 5, 5], {0, 1}, [0, 1, 2]),
    ],
)
def test_a_period_without_new_outputs_is_not_saved_and_a_failed_save_is_repeated(
    num_observed: list[int], failing: set[int], began: list[int]
) -> None:
    assert saves_in_virtual_time(num_observed, failing) == began
