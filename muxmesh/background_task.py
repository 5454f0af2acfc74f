"""Background tasks, and their certain end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

_CANCEL_AGAIN_S = 0.2


async def end(task: asyncio.Future[Any]) -> None:
    """Cancels ``task`` and waits until it has ended. Raises none of its errors; asyncio logs them.

    A single cancellation can be lost: `asyncio.wait_for` of Python 3.11 loses it if the result arrives in the same turn
    of the event loop, and redis waits with it in each command. So the task is cancelled again until it has ended. For
    that reason this code base uses `asyncio.timeout` instead.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_AGAIN_S)


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Runs ``work`` as a task while the block runs. See `end`."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        await end(task)
