"""A worker's side of the attach socket, with kvstore's own server at the other end."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.attach_protocol import num_pool_fds, pool_description
from kvstore.device_memory import HostMemory, new_memfd
from kvstore.grant_page import Word
from muxmesh.device.device_pool import HostPool
from muxmesh.errors import Unavailable
from muxmesh.types import Role
from tests.support.worker_unit import SHAPE, SLAB_BYTES, RunningUnit, running_unit
from worker.attachment import attach, attach_writer, map_pool


@pytest.fixture
async def unit(tmp_path: Path) -> AsyncIterator[RunningUnit]:
    async with running_unit(tmp_path, num_slabs=2) as running:
        yield running


def elements(pool: Any) -> np.ndarray:
    """The whole mapped pool."""
    memory: np.ndarray = pool.view(SHAPE).pool
    return memory


async def test_workers_of_a_unit_map_the_same_pool(unit: RunningUnit) -> None:
    prefill, decode = await unit.attach(Role.PREFILL), await unit.attach(Role.DECODE)
    assert elements(prefill.pool).nbytes == 2 * SLAB_BYTES
    elements(prefill.pool)[5] = 42.0
    assert elements(decode.pool)[5] == 42.0


async def test_each_worker_has_its_own_name_slot_and_progress_page(unit: RunningUnit) -> None:
    first, second = await unit.attach(Role.DECODE), await unit.attach(Role.DECODE)
    assert first.worker != second.worker and first.slot != second.slot
    first.progress.begin(7)
    assert (first.progress.read(), second.progress.read()) == ({7: ()}, {})


async def test_a_worker_is_ready_when_it_reports_so(unit: RunningUnit) -> None:
    attachment = await unit.attach(Role.PREFILL)
    assert unit.state.ready_workers(Role.PREFILL, "m")
    attachment.set_ready(False)
    await unit.until(lambda: not unit.state.ready_workers(Role.PREFILL, "m"))
    attachment.set_ready(True)
    await unit.until(lambda: bool(unit.state.ready_workers(Role.PREFILL, "m")))


async def test_beats_are_counted_in_the_grant_page(unit: RunningUnit) -> None:
    attachment = await unit.attach(Role.DECODE)
    for _ in range(3):
        attachment.beat()
    assert attachment.page.read(attachment.slot, Word.HEARTBEATS) == 3


@pytest.mark.parametrize("num_swap_pages", [0, 2])
async def test_a_pool_has_swap_if_its_unit_has_a_swap_region(tmp_path: Path, num_swap_pages: int) -> None:
    async with running_unit(tmp_path, num_swap_pages=num_swap_pages) as unit:
        assert (await unit.attach(Role.DECODE)).pool.has_swap is (num_swap_pages > 0)


async def test_a_detached_worker_gets_no_new_request(unit: RunningUnit) -> None:
    attachment = await unit.attach(Role.DECODE)
    attachment.close()
    await unit.until(lambda: not unit.state.workers[attachment.worker].ready)
    unit.attachments.remove(attachment)


async def test_a_worker_whose_unit_ends_is_called_back_once_and_may_still_report(tmp_path: Path) -> None:
    lost: list[str] = []
    async with running_unit(tmp_path) as unit:
        attachment = await unit.attach(Role.DECODE)
        attachment.on_unit_lost(lambda: lost.append("lost"))
        unit.attachments.clear()
        assert lost == []
    await unit.until(lambda: bool(lost))
    for _ in range(3):
        await asyncio.sleep(0)
    assert lost == ["lost"]
    attachment.set_ready(False)
    attachment.close()


async def test_the_unit_refuses_a_model_that_it_does_not_serve(unit: RunningUnit) -> None:
    with pytest.raises(Unavailable, match=r"a\.sock refused decode of other"):
        await attach(unit.attach_path, Role.DECODE, "other", "unix:x")


async def test_a_worker_waits_until_its_unit_listens_and_reports_once_for_what(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worker.attachment")
    path = tmp_path / "a.sock"
    attaching = asyncio.create_task(attach(path, Role.DECODE, "m", "unix:x"))
    async with asyncio.timeout(20):
        while not caplog.messages:
            await asyncio.sleep(0)
    async with running_unit(tmp_path) as unit:
        async with asyncio.timeout(20):
            attachment = await attaching
        assert attachment.worker in unit.state.workers
        unit.attachments.append(attachment)
    reported = [message for message in caplog.messages if "waits" in message]
    assert reported == [f"decode of m waits for the kvstore of its unit at {path}: No such file or directory"]


async def test_a_writer_maps_the_pool_of_its_worker(unit: RunningUnit) -> None:
    attachment = await unit.attach(Role.DECODE)
    connection, pool = await attach_writer(unit.attach_path, attachment.worker)
    elements(pool)[9] = 7.0
    assert elements(attachment.pool)[9] == 7.0
    assert len(unit.state.workers) == 1, "a writer is no worker"
    connection.close()


async def test_the_unit_refuses_a_writer_for_a_worker_that_is_not_attached(unit: RunningUnit) -> None:
    with pytest.raises(Unavailable, match="refused a writer for decode-m#99"):
        await attach_writer(unit.attach_path, "decode-m#99")


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


@pytest.mark.parametrize("has_swap", [False, True])
def test_a_pool_is_mapped_as_its_description_says(has_swap: bool) -> None:
    memory = HostMemory(2 * SLAB_BYTES)
    description = pool_description(memory, SLAB_BYTES, has_swap)
    fds = [*memory.shards[0].segments[0].fds, *([new_memfd("swap", 16384)] if has_swap else [])]
    assert num_pool_fds(description) == len(fds)
    pool = map_pool(description, fds)
    assert isinstance(pool, HostPool) and pool.has_swap is has_swap
    assert all(is_closed(fd) for fd in fds)


@pytest.mark.parametrize(
    "description",
    [
        {"device": "cuda", "slab_bytes": 1, "shards": [[[1, "GPU-0", ""]]], "swap": False},
        {"device": "host", "slab_bytes": 1, "shards": [[[1, "", ""], [1, "", ""]]], "swap": False},
        {"device": "host", "slab_bytes": 1, "shards": [[[1, "", ""]], [[1, "", ""]]], "swap": False},
    ],
    ids=["of a GPU", "in two segments", "in two shards"],
)
def test_a_pool_that_a_worker_cannot_map_is_refused_and_its_descriptors_are_closed(description: Any) -> None:
    fds = [new_memfd("test", 4096) for _ in range(num_pool_fds(description))]
    with pytest.raises(
        Unavailable, match=f"pool is {description['device']} memory .*; this worker maps one segment of host memory"
    ):
        map_pool(description, fds)
    assert all(is_closed(fd) for fd in fds)
