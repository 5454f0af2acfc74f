"""Background tasks end, whatever they catch, on both event loops."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from muxmesh.background_task import background, end

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
NewLoop = Callable[[], asyncio.AbstractEventLoop]


def run(new_loop: NewLoop, work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asyncio.wait_for(work, 20))


@LOOPS
def test_a_task_that_loses_its_first_cancellations_ends(new_loop: NewLoop) -> None:
    num_lost = 0

    async def loses_two() -> None:
        nonlocal num_lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if num_lost == 2:
                    raise
                num_lost += 1

    async def ends() -> None:
        async with background(loses_two(), "loses two"):
            await asyncio.sleep(0)

    run(new_loop, ends())
    assert num_lost == 2


@LOOPS
def test_an_error_of_a_task_is_not_raised_at_its_end(new_loop: NewLoop) -> None:
    async def fails() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise LookupError

    async def ends() -> None:
        task = asyncio.create_task(fails())
        await asyncio.sleep(0)
        await end(task)
        assert isinstance(task.exception(), LookupError)

    run(new_loop, ends())


@LOOPS
def test_a_task_ends_if_the_block_raises(new_loop: NewLoop) -> None:
    ended = False

    async def waits() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(60)
        finally:
            ended = True

    async def raises() -> None:
        with contextlib.suppress(LookupError):
            async with background(waits(), "waits"):
                await asyncio.sleep(0)
                raise LookupError

    run(new_loop, raises())
    assert ended


@LOOPS
def test_the_end_of_a_task_can_itself_be_cancelled(new_loop: NewLoop) -> None:
    async def never_ends(may_end: asyncio.Event) -> None:
        while not may_end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await may_end.wait()

    async def cancels() -> None:
        may_end = asyncio.Event()
        task = asyncio.create_task(never_ends(may_end))
        await asyncio.sleep(0)
        ending = asyncio.create_task(end(task))
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.wait({ending})
        assert ending.cancelled()
        may_end.set()
        await asyncio.wait({task})

    run(new_loop, cancels())


@LOOPS
def test_a_task_that_fails_is_reported_and_logged_at_once(new_loop: NewLoop, caplog: pytest.LogCaptureFixture) -> None:
    reasons: asyncio.Queue[str] = asyncio.Queue()

    async def fails() -> None:
        raise LookupError("a bug")

    async def waits() -> None:
        async with background(fails(), "watch", reasons.put_nowait):
            assert await reasons.get() == "the task watch failed: LookupError: a bug"

    run(new_loop, waits())
    (record,) = caplog.records
    assert record.getMessage() == "the task watch failed" and record.exc_info is not None


@LOOPS
def test_a_task_that_is_cancelled_or_returns_has_not_failed(new_loop: NewLoop) -> None:
    reasons: list[str] = []

    async def works(forever: bool) -> None:
        while forever:
            await asyncio.sleep(60)

    async def ends() -> None:
        for forever in (False, True):
            async with background(works(forever), "works", reasons.append):
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    run(new_loop, ends())
    assert reasons == []
