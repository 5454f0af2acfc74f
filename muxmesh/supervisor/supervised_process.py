"""One supervised process: started, watched, restarted with back-off, its output collected under its name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from muxmesh.clock import Clock
from muxmesh.errors import Unavailable

_log = logging.getLogger("supervisor")

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0
HEALTHY_AFTER_S = 30.0
"""A process that lived for this long is restarted after the first back-off."""
_MAX_EARLY_DEATHS = 3
_LOG_BYTES = 10 * 1024 * 1024
_KEPT_LINES = 20
_LAST_OUTPUT_S = 1.0


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run. ``wait_ready`` returns when it serves for the first time. ``environment`` is added to ours."""

    name: str
    command: tuple[str, ...]
    wait_ready: Callable[[], Awaitable[None]]
    environment: Mapping[str, str] = field(default_factory=dict)


def log_file(path: Path) -> RotatingFileHandler:
    """A log file that keeps the last 10 to 20 MB, with the time before each line."""
    handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler


class SupervisedProcess:
    """Owns one process. Invariant: at most one is alive at a time, and none after `stop`."""

    def __init__(
        self,
        spec: ProcessSpec,
        logs: Path,
        clock: Clock,
        show_line: Callable[[str, str], None],
        on_restart: Callable[[str], Awaitable[None]],
    ) -> None:
        self.spec = spec
        self.num_restarts = 0
        self._clock = clock
        self._show_line = show_line
        self._on_restart = on_restart
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._was_ready = False
        self._gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._file = log_file(logs / f"{spec.name.replace('/', '-')}.log")

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> None:
        """Starts it, and keeps it running from now on."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self.spec.name}")

    async def wait_ready(self, timeout_s: float) -> None:
        """Waits until it serves. Raises Unavailable, with its last output, if it keeps dying or takes too long."""
        ready = asyncio.ensure_future(self.spec.wait_ready())
        ended: set[asyncio.Future[Any]] = {ready, self._gave_up}
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise Unavailable(self._failure(self._gave_up.result()))
            await ready
        except TimeoutError:
            raise Unavailable(self._failure(f"not ready after {timeout_s:.0f} s")) from None
        finally:
            ready.cancel()
        self._was_ready = True

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after ``grace_s``."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
            except TimeoutError:
                _log.warning("%s did not stop in %.0f s: killed", self.spec.name, grace_s)
                self.signal(signal.SIGKILL)
                await self._process.wait()
        self._file.close()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal if it is alive."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep(self) -> None:
        backoff_s, deaths = FIRST_BACKOFF_S, 0
        while True:
            started_at_s = self._clock.monotonic_s()
            how = await self._one_life()
            deaths += 1
            if not self._was_ready and deaths >= _MAX_EARLY_DEATHS:
                self._gave_up.set_result(f"ended {deaths} times before it was ready, last {how}")
                return
            if self._clock.monotonic_s() - started_at_s >= HEALTHY_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            _log.warning("%s ended %s; restarting in %.1f s", self.spec.name, how, backoff_s)
            self.num_restarts += 1
            await self._on_restart(self.spec.name)
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)

    async def _one_life(self) -> str:
        """Runs the process to its end; returns how it ended."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                env={**os.environ, **self.spec.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # the supervisor handles Ctrl-C
            )
        except OSError as error:  # no memory, no process table entry: may be temporary
            return f"before it started: {error}"
        output = asyncio.create_task(self._collect_output(self._process))
        try:
            code = await self._process.wait()
            await asyncio.wait({output}, timeout=_LAST_OUTPUT_S)
        finally:
            output.cancel()
        return f"with code {code}"

    async def _collect_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line longer than the reader's limit is dropped
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            self._last_lines.append(line)
            self._file.handle(logging.LogRecord(self.spec.name, logging.INFO, "", 0, line, None, None))
            self._show_line(self.spec.name, line)

    def _failure(self, what: str) -> str:
        output = "\n".join(f"  {line}" for line in self._last_lines)
        return f"{self.spec.name} {what}" + (f"; its last output:\n{output}" if output else "")
