"""The grant protocol: kvstore's memory and real worker grants, on one event loop."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from kvstore.arbiter import next_slot
from kvstore.client.grant import SharedGrant
from kvstore.grant import MAX_WORKERS, GrantPage, Word
from kvstore.memory import UnitMemory
from muxmesh.clock import ManualClock
from muxmesh.errors import Overloaded


class FakeAttachment:
    """What SharedGrant needs of an attachment, over the same memory."""

    def __init__(self, memory: UnitMemory) -> None:
        self.slot, self.bell_fd = memory.take_slot()
        self.page = GrantPage(memory.page_fd)
        self.doorbell_fd = memory.doorbell_fd


@pytest.fixture
async def memory() -> UnitMemory:
    unit_memory = UnitMemory(4096)
    asyncio.get_running_loop().add_reader(unit_memory.doorbell_fd, unit_memory.on_doorbell)
    return unit_memory


def grant_for(memory: UnitMemory) -> tuple[SharedGrant, FakeAttachment]:
    attachment = FakeAttachment(memory)
    return SharedGrant(attachment, ManualClock()), attachment  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("demanding", "last", "expected"), [(set(), 0, None), ({3}, 3, 3), ({1, 2, 5}, 2, 5), ({1, 2}, 5, 1)]
)
def test_slots_are_granted_in_turn(demanding: set[int], last: int, expected: int | None) -> None:
    assert next_slot(demanding, last) == expected


async def test_a_worker_alone_keeps_the_grant_without_ringing(memory: UnitMemory) -> None:
    grant, _ = grant_for(memory)
    await grant.acquire()
    asyncio.get_running_loop().remove_reader(memory.doorbell_fd)
    for _ in range(5):
        grant.release()
        await grant.acquire()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(memory.doorbell_fd)


async def test_two_workers_take_turns_and_never_hold_together(memory: UnitMemory) -> None:
    order: list[str] = []
    holding: set[str] = set()

    async def work(name: str, grant: SharedGrant) -> None:
        for _ in range(20):
            await grant.acquire()
            holding.add(name)
            assert holding == {name}
            order.append(name)
            await asyncio.sleep(0)
            holding.discard(name)
            grant.release()
        grant.drop()

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for name in ("prefill", "decode", "other"):
            tasks.create_task(work(name, grant_for(memory)[0]))
    assert order.count("prefill") == order.count("decode") == 20
    longest_run = max(len(run) for run in _runs(order[10:40]))
    assert longest_run <= 2


async def test_a_holder_is_not_asked_to_give_way_to_itself(memory: UnitMemory) -> None:
    grant, attachment = grant_for(memory)
    await grant.acquire()
    memory.page.write(attachment.slot, Word.DEMAND, 1)
    memory.arbitrate()
    assert not memory.page.wanted


async def test_an_idle_holder_gives_the_grant_back(memory: UnitMemory) -> None:
    first, _ = grant_for(memory)
    second, _ = grant_for(memory)
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0)
    first.release()
    first.drop()
    async with asyncio.timeout(5):
        await waiting


async def test_the_grant_of_a_dead_worker_goes_on(memory: UnitMemory) -> None:
    first, attachment = grant_for(memory)
    second, _ = grant_for(memory)
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0)
    memory.give_back_slot(attachment.slot)
    async with asyncio.timeout(5):
        await waiting


def test_counters_of_a_slot_start_at_zero_for_its_next_worker() -> None:
    memory = UnitMemory(4096)
    slot, _ = memory.take_slot()
    memory.page.add(slot, Word.NUM_STEPS, 7)
    memory.give_back_slot(slot)
    again, _ = memory.take_slot()
    assert again == slot
    assert memory.page.read(slot, Word.NUM_STEPS) == 0


def test_one_worker_too_many_is_refused() -> None:
    memory = UnitMemory(4096)
    for _ in range(MAX_WORKERS):
        memory.take_slot()
    with pytest.raises(Overloaded, match="at most"):
        memory.take_slot()


def _runs(names: list[str]) -> Iterator[list[str]]:
    run: list[str] = []
    for name in names:
        if run and run[-1] != name:
            yield run
            run = []
        run.append(name)
    yield run
