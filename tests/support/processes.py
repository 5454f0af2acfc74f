"""Processes of a test, which end with it whatever happens."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator


def without_privileges(*arguments: str) -> list[str]:
    """Command line of Python as root without the privileges of root, so that files of others are closed to it."""
    program = shutil.which("setpriv")
    assert program is not None, "setpriv is part of util-linux"
    return [program, "--bounding-set=-all", "--inh-caps=-all", sys.executable, *arguments]


@contextlib.asynccontextmanager
async def ended(process: Process) -> AsyncIterator[Process]:
    """Kills the process at the end of the block, even a stopped one, and waits for it."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.communicate()


@contextlib.contextmanager
def ended_popen(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """As `ended`, without an event loop. Closes the pipes too."""
    with process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
