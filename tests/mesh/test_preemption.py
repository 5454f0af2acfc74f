"""Sequences that displace others from a full batch, in a real mesh of sim engines."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.mesh import RunningMesh, running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

NUM_SLOTS = 2
LONG: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True, "temperature": 1.0}
SHORT: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True, "temperature": 1.0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.02}, "max_num_seqs": NUM_SLOTS}
    folder: Path = tmp_path_factory.mktemp("preemption")
    units = [{"kv_pool": "16MiB", "models": [model]}]
    async with running_mesh(folder, units=units, metrics={"listen": "127.0.0.1:0"}) as running:
        yield running


async def full_batch(mesh: RunningMesh, seed: int) -> list[asyncio.Task[Any]]:
    """Long outputs that take all slots, and have begun."""
    begun = [asyncio.Event() for _ in range(NUM_SLOTS)]

    async def generate(number: int) -> list[int]:
        token_ids: list[int] = []
        async for event in mesh.client.stream("Hello", seed=seed + number, **LONG):
            token_ids += getattr(event, "token_ids", ())
            if len(token_ids) > 2:
                begun[number].set()
        return token_ids

    tasks = [asyncio.create_task(generate(number)) for number in range(NUM_SLOTS)]
    await asyncio.gather(*(one.wait() for one in begun))
    return tasks


async def num_displaced(mesh: RunningMesh) -> float:
    return (await mesh.metrics()).value("muxmesh_preemptions_total", reason="order")


@pytest.mark.parametrize("options", [SHORT | {"priority": -1}, SHORT], ids=["a better class", "less work"])
async def test_a_request_pre_empts_a_full_batch_and_the_victim_loses_no_token(
    mesh: RunningMesh, options: dict[str, Any]
) -> None:
    undisturbed = [(await mesh.client.generate("Hello", seed=7 + number, **LONG)).token_ids for number in range(2)]
    before = await num_displaced(mesh)
    long = await full_batch(mesh, seed=7)
    short = await mesh.client.generate("Hello", **options)
    assert len(short.token_ids) == 5
    assert not any(task.done() for task in long), "it did not wait for a slot"
    assert [tuple(await task) for task in long] == [tuple(one) for one in undisturbed]
    assert await num_displaced(mesh) > before
    await mesh.until_free()


async def test_a_stream_of_better_requests_does_not_starve_the_others(mesh: RunningMesh) -> None:
    long = await full_batch(mesh, seed=7)
    better = [asyncio.create_task(mesh.client.generate("Hello", priority=-1, **SHORT)) for _ in range(60)]
    done = await asyncio.gather(*better, *long)
    assert [len(one) for one in done[-NUM_SLOTS:]] == [200] * NUM_SLOTS
    await mesh.until_free()


async def test_requests_that_do_not_precede_wait_for_a_slot(mesh: RunningMesh) -> None:
    before = await num_displaced(mesh)
    long = await full_batch(mesh, seed=7)
    more = [asyncio.create_task(mesh.client.generate("Hello", priority=1, **SHORT)) for _ in range(3)]
    done = await asyncio.gather(*long, *more)
    assert len(done) == 5 and await num_displaced(mesh) == before
    await mesh.until_free()
