"""Keeps an MPS daemon without a supervisor: stops it in order, bounds its logs, and ends it when it hangs.

The daemon itself does not handle SIGTERM, and leaves its server running when it is killed. It dies with its keeper.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping

from muxmesh.cuda.mps import MpsControl
from muxmesh.errors import Unavailable
from muxmesh.supervisor.mps_checks import check_mps
from muxmesh.supervisor.mps_leftovers import end_leftovers

CHECK_EVERY_S = 5.0
MAX_SILENT_CHECKS = 3
"""A daemon that does not answer in this many checks in a row is killed."""


async def keep_daemon(
    control: MpsControl, environment: Mapping[str, str], stop: asyncio.Event, check_every_s: float = CHECK_EVERY_S
) -> None:
    """Runs the daemon until ``stop`` is set, then asks it and its servers to exit.

    Leaves neither daemon nor server. Raises Unavailable if the daemon exits by itself or hangs.
    """
    launcher = (sys.executable, "-m", "muxmesh.supervisor.exec_with_parent", str(os.getpid()))
    process = await asyncio.create_subprocess_exec(*launcher, control.program, "-f", env=dict(environment))
    exited, stopped = asyncio.create_task(process.wait()), asyncio.create_task(stop.wait())
    num_silent = 0
    try:
        while num_silent < MAX_SILENT_CHECKS:
            done, _ = await asyncio.wait({exited, stopped}, timeout=check_every_s, return_when=asyncio.FIRST_COMPLETED)
            if stopped in done:
                return
            if exited in done:
                raise Unavailable(f"the MPS daemon in {control.pipe_dir} exited with code {exited.result()}")
            num_silent = 0 if await check_mps(control) else num_silent + 1
        raise Unavailable(f"the MPS daemon in {control.pipe_dir} did not answer {num_silent} times in a row")
    finally:
        stopped.cancel()
        await end_leftovers(control)
        if not exited.done():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await exited


async def keep_until_signal(control: MpsControl, environment: Mapping[str, str]) -> None:
    """See `keep_daemon`; SIGTERM and SIGINT stop it."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await keep_daemon(control, environment, stop)
