"""Background tasks: their failures are noticed, and their end is certain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

_log = logging.getLogger(__name__)

OnFailure = Callable[[str], None]
"""Called with the reason when a task has raised an exception."""
_CANCEL_AGAIN_S = 0.2


def _ignore(reason: str) -> None:
    pass


async def end(task: asyncio.Future[Any]) -> None:
    """Cancels ``task`` and waits until it has ended. Raises none of its errors.

    A single cancellation can be lost: `asyncio.wait_for` of Python 3.11 loses it if the result arrives in the same turn
    of the event loop, and redis waits with it in each command. So the task is cancelled again until it has ended. For
    that reason this code base uses `asyncio.timeout` instead.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_AGAIN_S)


def start_watched(work: Coroutine[Any, Any, None], name: str, on_failure: OnFailure = _ignore) -> asyncio.Task[None]:
    """Starts ``work`` as a task for which nothing waits. If it fails, which is a bug, the error is logged at once."""

    def on_done(done: asyncio.Task[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.error("the task %s failed", name, exc_info=error)
            on_failure(f"the task {name} failed: {type(error).__name__}: {error}")

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(on_done)
    return task


@contextlib.asynccontextmanager
async def background(
    work: Coroutine[Any, Any, None], name: str, on_failure: OnFailure = _ignore
) -> AsyncIterator[None]:
    """Runs ``work`` as a task while the block runs. See `start_watched` and `end`."""
    task = start_watched(work, name, on_failure)
    try:
        yield
    finally:
        await end(task)
