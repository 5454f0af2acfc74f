"""The other end of a `timer_process`: starts it, asks it, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from muxmesh.errors import EngineFailed
from muxmesh.types import Role

_MAX_REPLY_BYTES = 16 << 20
_END_WITHIN_S = 5.0
"""A process ends by itself when its stdin is closed, after the step that it computes."""


class TimerClient:
    """One running timer process. It takes one request at a time."""

    def __init__(self, process: asyncio.subprocess.Process, what: str) -> None:
        """``what``: the process in messages."""
        self._process = process
        self._what = what
        self.facts: Mapping[str, Any] = {}
        """What the process reported when it was ready."""

    @property
    def pid(self) -> int:
        return self._process.pid

    async def times(self, role: Role, batch: int, length: int, repeats: int, longest_s: float) -> list[float]:
        """See `StepTimer.samples`. Raises EngineFailed with what the process reports, or if it has ended."""
        request = {"cell": [role, batch, length], "repeats": repeats, "longest_s": longest_s}
        return [float(seconds) for seconds in (await self._ask(request))["seconds"]]

    async def intervals(
        self, role: Role, batch: int, length: int, from_s: float, until_s: float
    ) -> list[tuple[float, float]]:
        """See `StepTimer.intervals`. Raises EngineFailed, see `times`."""
        request = {"cell": [role, batch, length], "from_s": from_s, "until_s": until_s}
        return [(float(start), float(end)) for start, end in (await self._ask(request))["intervals"]]

    async def wait_ready(self) -> None:
        """Waits until the model is loaded. Raises EngineFailed, see `times`."""
        self.facts = await self._reply()

    async def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # `_reply` knows that it has ended
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
        return await self._reply()

    async def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"{self._what}: its process ended with code {await self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineFailed(f"{self._what}: {reply['error']}")
        return reply

    def kill(self) -> None:
        """Ends the process at once, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> None:
        """Ends the process: it is killed if it does not end in time."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_WITHIN_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()


@asynccontextmanager
async def timer_process(
    runtime_file: Path, unit: str, model: str, share: int, beside: Sequence[int] = ()
) -> AsyncIterator[TimerClient]:
    """Starts the process of ``model``, which has ``share`` in the runtime file, and ends it with the block.

    ``beside``: shares of the processes that compute at the same time and were started before.

    It does not get Ctrl-C from the terminal, since this process decides what happens then. Raises EngineFailed if it
    cannot load the model.
    """
    command = (
        sys.executable, "-m", "muxmesh.profiler.timer_process", "--runtime", str(runtime_file), "--unit", unit,
        "--model", model, "--parent", str(os.getpid()), "--beside", json.dumps(list(beside)),
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_MAX_REPLY_BYTES,
        start_new_session=True,
    )
    client = TimerClient(process, f"{model} on a share of {share}")
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.end()
