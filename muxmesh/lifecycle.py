"""How a process of the mesh starts, runs and ends. Knows signals and the event loop, no service."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

_PR_SET_PDEATHSIG = 1
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"


def die_with_parent(parent_pid: int, death_signal: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel to signal this process when its parent dies; exits at once if it already has.

    Survives an exec. Linux only, like the rest of the serving side.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(0)


def run_service(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs ``main(stop)`` on uvloop; SIGTERM and SIGINT set ``stop``. The body of every ``__main__``."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(supervised())
