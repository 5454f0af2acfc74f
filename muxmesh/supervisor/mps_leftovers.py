"""What an earlier MPS daemon has left: itself, its servers, which survive a daemon that is killed, and their files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

from muxmesh.cuda.mps import CONTROL_PROGRAM, PIPE_DIRECTORY, MpsControl
from muxmesh.errors import Unavailable
from muxmesh.process_state import has_ended

SERVER_PROGRAM = "nvidia-cuda-mps-server"
_PID_FILE = "nvidia-cuda-mps-control.pid"
_FILES = ("control", "control_lock", "control_privileged", "log", _PID_FILE)
"""What a daemon creates in its pipe directory."""
_END_WITHIN_S = 5.0
_CHECK_EVERY_S = 0.02


async def end_leftovers(control: MpsControl) -> None:
    """Ends what an earlier daemon of the pipe directory has left: itself, its servers and its files.

    Raises Unavailable if one of the processes is another user's.
    """
    processes = {*_earlier_daemons(control.pipe_dir), *_servers_of(control.pipe_dir)}
    with contextlib.suppress(Unavailable):
        await control.quit()
        await _wait_until_ended(processes)
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise Unavailable(f"process {pid} of another user is the MPS daemon of {control.pipe_dir}") from None
    await _wait_until_ended(processes)
    for name in _FILES:
        with contextlib.suppress(OSError):  # there is none, or it is no file
            (control.pipe_dir / name).unlink()


async def _wait_until_ended(pids: Collection[int]) -> None:
    """Waits until processes have exited, but not longer than `_END_WITHIN_S`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_WITHIN_S):
            while True:
                if all(map(has_ended, pids)):
                    return
                await asyncio.sleep(_CHECK_EVERY_S)


def _earlier_daemons(pipe_dir: Path) -> Iterator[int]:
    """The daemon that has written its pid into the pipe directory, if it runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((pipe_dir / _PID_FILE).read_text())
        if any(CONTROL_PROGRAM in part for part in _words(pid, "cmdline")):
            yield pid


def _servers_of(pipe_dir: Path) -> Iterator[int]:
    """Servers of this user that a daemon of the pipe directory has started, or one of a supervisor that was killed.

    The run folder of that one lies beside the present one, and was deleted with its pipe directories.
    """
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        if SERVER_PROGRAM not in _words(pid, "cmdline")[0]:
            continue
        for word in _words(pid, "environ"):
            name, _, value = word.partition("=")
            other = Path(value)
            is_beside = other.name == pipe_dir.name and other.parent.parent == pipe_dir.parent.parent
            if name == PIPE_DIRECTORY and (other == pipe_dir or (is_beside and not other.exists())):
                yield pid


def _words(pid: int, file: str) -> list[str]:
    """The words of a process's command line or environment; none if it is another user's or has exited."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]
