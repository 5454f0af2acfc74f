"""Whether an MPS daemon answers. Its logs are bounded beside, since it logs each question."""

from __future__ import annotations

import asyncio
from pathlib import Path

from muxmesh.cuda.mps import LOG_DIRECTORY, MpsControl
from muxmesh.errors import Unavailable
from muxmesh.supervisor.log_file import bound_log

_CHECK_EVERY_S = 0.02


async def mps_answers(control: MpsControl) -> bool:
    """Whether the daemon answers."""
    try:
        await control.server_pids()
    except Unavailable:
        return False
    return True


async def check_mps(control: MpsControl) -> bool:
    """Like `mps_answers`. The daemon logs each question, so its logs are bounded beside."""
    for log in Path(control.environment[LOG_DIRECTORY]).glob("*.log"):
        bound_log(log)
    return await mps_answers(control)


async def wait_for_mps(control: MpsControl) -> None:
    """Waits, without a time limit, until the daemon answers."""
    while True:
        if await mps_answers(control):
            return
        await asyncio.sleep(_CHECK_EVERY_S)
