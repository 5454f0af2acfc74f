"""How a process of the mesh starts, runs and ends. Knows signals and the event loop, no service."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_SLOW_END_S = 3.0
"""Less than the grace that the supervisor gives before SIGKILL."""
_MAX_PLACES = 20
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"


def die_with_parent(parent_pid: int) -> None:
    """Asks the kernel to send SIGTERM to this process when its parent dies; exits at once if it already has.

    Survives an exec. Linux only, like the rest of the serving side.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(0)


def service_arguments(description: str | None, *own: str) -> argparse.Namespace:
    """Parses a service's command line: ``runtime``, ``parent`` and its ``own``. Ties the process to its parent."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runtime", type=Path, required=True)
    for name in own:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    return arguments


class Stop:
    """A request that a service stops. A service that is still starting is cancelled."""

    def __init__(self, slow_end_s: float = _SLOW_END_S) -> None:
        """``slow_end_s``: a shutdown that takes longer logs what it waits for."""
        self._slow_end_s = slow_end_s
        self._requested = asyncio.Event()
        self._serving = False
        self._starting: asyncio.Task[None] | None = None

    def set(self) -> None:
        """Requests the stop. If it takes long, the log says what the service waits for."""
        if not self._requested.is_set():
            asyncio.get_running_loop().call_later(self._slow_end_s, _log_pending_tasks)
        self._requested.set()
        if self._starting is not None and not self._serving:
            self._starting.cancel()

    async def wait(self) -> None:
        """Called by the service once it serves: waits for the request to stop."""
        self._serving = True
        await self._requested.wait()

    async def run(self, main: Callable[[Stop], Coroutine[Any, Any, None]]) -> bool:
        """Runs ``main(self)``; False if it was cancelled while starting."""
        self._starting = asyncio.create_task(main(self), name="service")
        await asyncio.wait({self._starting})
        if self._starting.cancelled():
            return False
        self._starting.result()
        return True


def _log_pending_tasks() -> None:
    places = Counter(map(_place_of, asyncio.all_tasks()))
    listed = "\n".join(f"  {count} x {place}" for place, count in places.most_common(_MAX_PLACES))
    _log.warning("shutdown takes long; its tasks wait at\n%s", listed)


def _place_of(task: asyncio.Task[Any]) -> str:
    """Files and lines, from the task's own function to the innermost await."""
    lines: list[str] = []
    waiting: object = task.get_coro()
    while (frame := getattr(waiting, "cr_frame", None)) is not None:
        lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        waiting = getattr(waiting, "cr_await", None)
    return " > ".join(lines)


def run_service(main: Callable[[Stop], Coroutine[Any, Any, None]]) -> None:
    """Runs ``main(stop)`` on uvloop; SIGTERM and SIGINT set ``stop``. The body of every ``__main__``."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)

    async def supervised() -> bool:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        return await stop.run(main)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if not runner.run(supervised()):
            os._exit(0)  # a thread may be loading a model or compiling: its result is not needed
