"""Runs one process: restarts it with back-off when it exits or hangs, and collects its output in a log file.

Knows no service. The caller passes the command and the checks that the process is ready and responds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muxmesh.background_task import end, start_watched
from muxmesh.clock import Clock
from muxmesh.errors import Unavailable
from muxmesh.log_format import LogFormat, output_as_json
from muxmesh.process_files import process_file
from muxmesh.process_state import process_state
from muxmesh.supervisor.liveness import CHECK_EVERY_S, Liveness
from muxmesh.supervisor.log_file import AS_IT_IS, WITH_TIME, LogFile

_log = logging.getLogger("supervisor")

FIRST_BACKOFF_S = 0.2
"""Delay before the first restart. It doubles with each further restart."""
LONGEST_BACKOFF_S = 5.0
"""Upper bound of the delay before a restart."""
HEALTHY_AFTER_S = 15.0
"""Uptime that resets the delay to `FIRST_BACKOFF_S`."""
_MAX_EARLY_EXITS = 3
"""Exits before the process was ever ready, after which it is not restarted."""
_KEPT_LINES = 20
_LINE_BYTES = 64 * 1024
"""A line of output is divided after at least this many bytes."""
_LAST_OUTPUT_S = 1.0
"""Time limit for reading the output after an exit. A child that inherited the pipe may keep it open."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """The command of a process. ``environment`` extends and overrides the environment of the supervisor.

    ``extra_checks``: see `Liveness`. ``hint``: what to do if it does not serve at the start. ``quit`` asks the process
    to exit, for one that does not handle SIGTERM; it raises Unavailable if that fails. ``wait_ready`` returns when the
    process serves. ``ask`` returns True when it has responded in any way, and False if it cannot respond. Both may wait
    forever. ``faces_clients``: it needs the other processes until its last client is served, so it is stopped before
    them.
    """

    name: str
    command: tuple[str, ...]
    wait_ready: Callable[[], Awaitable[None]]
    ask: Callable[[], Coroutine[Any, Any, bool]]
    environment: Mapping[str, str] = field(default_factory=dict)
    faces_clients: bool = False
    extra_checks: int = 0
    hint: str = ""
    quit: Callable[[], Awaitable[None]] | None = None


class SupervisedProcess:
    """Owns one process and its restarts. Invariant: at most one instance runs at a time, and none after `stop`.

    ``show_line`` is called with the name and each line of output, ``on_restart`` before each restart. With
    ``log_format`` json each line of output is an object: the process's own, or one made of the line.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        logs: Path,
        clock: Clock,
        show_line: Callable[[str, str], None],
        on_restart: Callable[[], None],
        log_format: LogFormat,
    ) -> None:
        self.spec = spec
        self.num_restarts = 0
        self._clock = clock
        self._show_line = show_line
        self._on_restart = on_restart
        self._process: asyncio.subprocess.Process | None = None
        self._restart_loop: asyncio.Task[None] | None = None
        self._was_ready = False
        self._stopping = False
        self._gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._log_format = log_format
        file = logs / process_file(spec.name, ".log")
        self._file = LogFile(file, AS_IT_IS if log_format == "json" else WITH_TIME)

    @property
    def pid(self) -> int | None:
        """Process id, or None while no instance runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> None:
        """Starts the process. It is restarted when it exits or hangs, until `stop`."""
        self._restart_loop = start_watched(self._run_until_stopped(), f"supervise {self.spec.name}", self._give_up)

    async def wait_ready(self, timeout_s: float) -> None:
        """Waits until the process serves.

        Raises Unavailable with its last output after ``timeout_s``, or if it exits repeatedly before it serves.
        """
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
            await end(ready)
        self._was_ready = True

    async def stop(self, grace_s: float) -> None:
        """Asks the process to exit; SIGKILL after ``grace_s``. Waits for the exit and collects the output up to it."""
        self._stopping = True
        if self._restart_loop is not None:
            if self.pid is None:
                self._restart_loop.cancel()
            await self._ask_to_exit()
            await asyncio.wait({self._restart_loop}, timeout=grace_s)
            if self.pid is not None:
                _log.warning("%s did not stop within %.0f s and is killed", self.spec.name, grace_s)
                self.signal(signal.SIGKILL)
            await asyncio.gather(self._restart_loop, return_exceptions=True)
        self._file.close()

    async def _ask_to_exit(self) -> None:
        self.signal(signal.SIGCONT)  # a process that is stopped by a signal handles nothing before
        if self.spec.quit is not None and self.pid is not None:
            with contextlib.suppress(Unavailable):
                await self.spec.quit()
                return
        self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process. No effect while no instance runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _run_until_stopped(self) -> None:
        backoff_s, num_exits = FIRST_BACKOFF_S, 0
        while True:
            started_at_s = self._clock.monotonic_s()
            cause = await self._run_once()
            if self._stopping:
                return
            num_exits += 1
            if not self._was_ready and num_exits >= _MAX_EARLY_EXITS:
                self._give_up(f"exited {num_exits} times before it was ready, last: {cause}")
                return
            if self._clock.monotonic_s() - started_at_s >= HEALTHY_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            _log.warning("%s: %s; restart in %.1f s", self.spec.name, cause, backoff_s)
            self.num_restarts += 1
            self._on_restart()
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)

    def _give_up(self, reason: str) -> None:
        if not self._gave_up.done():
            self._gave_up.set_result(reason)

    async def _run_once(self) -> str:
        """Runs the process until it exits, or hangs and is killed. Returns the cause of its end."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                env={**os.environ, **self.spec.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches the supervisor only
            )
        except OSError as error:  # possibly temporary: out of memory or process table entries
            return f"cannot be started: {error}"
        output = asyncio.create_task(self._collect_output(self._process))
        killing = asyncio.create_task(self._kill_if_it_hangs(self._process.pid))
        try:
            code = await self._process.wait()
            cause = f"{killing.result()} and was killed" if killing.done() else f"exit code {code}"
            await asyncio.wait({output}, timeout=_LAST_OUTPUT_S)
        finally:
            output.cancel()
            killing.cancel()
        return cause

    async def _kill_if_it_hangs(self, pid: int) -> str:
        """Checks the process until it hangs, and kills it. Returns what the checks have found."""
        liveness, asked = Liveness(self.spec.extra_checks), None
        try:
            while True:
                if asked is None and liveness.is_to_be_asked:
                    asked = asyncio.create_task(self.spec.ask())
                await asyncio.sleep(CHECK_EVERY_S)
                responded = None
                if asked is not None:
                    responded = asked.done() and self._has_responded(asked)
                    asked = None if asked.done() else asked
                if reason := liveness.check(process_state(pid), responded=responded):
                    self.signal(signal.SIGKILL)
                    return reason
        finally:
            if asked is not None:
                asked.cancel()

    def _has_responded(self, asked: asyncio.Task[bool]) -> bool:
        """The result of an ended ``ask``. An error of it is logged and counts as no response."""
        if asked.cancelled():
            return False
        if (error := asked.exception()) is not None:
            _log.error("%s cannot be asked", self.spec.name, exc_info=error)
            return False
        return asked.result()

    async def _collect_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= _LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._keep_line(line)
        if rest:
            self._keep_line(rest)

    def _keep_line(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        self._last_lines.append(line)
        if self._log_format == "json":
            line = output_as_json(self.spec.name, line, self._clock.unix_s())
        self._file.write_line(self.spec.name, line)
        self._show_line(self.spec.name, line)

    def _failure(self, problem: str) -> str:
        output = "\n".join(f"  {line}" for line in self._last_lines)
        what = "; ".join(part for part in (f"{self.spec.name} {problem}", self.spec.hint) if part)
        return what + (f"; its last output:\n{output}" if output else "")
