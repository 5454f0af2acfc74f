"""`python -m muxmesh.supervisor.mps_daemon`: the MPS daemon of a unit's GPU, after leftovers have been removed.

    --runtime FILE --unit NAME [--parent PID]     as every service; any unit on the GPU will do

Leftovers are an earlier daemon of the same pipe directory, the server of a daemon that was killed, and the files of
both. With `--parent` this process becomes the daemon, and dies with its parent, which stops and checks it. Without, it
keeps the daemon (`mps_keeper`). What prevents its start, or ends it, is one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from muxmesh.config.runtime import MeshRuntime
from muxmesh.cuda.mps import CONTROL_PROGRAM, LOG_DIRECTORY, PIPE_DIRECTORY, SHARE, MpsControl
from muxmesh.errors import MeshError, Unavailable
from muxmesh.lifecycle import configure_logging, service_arguments
from muxmesh.process_state import has_ended
from muxmesh.supervisor.log_file import bound_log

_log = logging.getLogger("mps")

SERVER_PROGRAM = "nvidia-cuda-mps-server"
_PID_FILE = "nvidia-cuda-mps-control.pid"
_FILES = ("control", "control_lock", "control_privileged", "log", _PID_FILE)
"""What a daemon creates in its pipe directory."""
_END_WITHIN_S = 5.0
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


def main() -> None:
    """Becomes or keeps the daemon. Ends with code 0 after a signal, else with one line and code 1."""
    arguments = service_arguments(__doc__, "unit")
    process = f"mps/{arguments.unit}"
    try:
        configure_logging(logging.INFO, None, process)
        runtime = MeshRuntime.read(arguments.runtime)
        configure_logging(logging.INFO, runtime.config.log_format, process)
        if arguments.parent is not None:
            become_daemon(runtime, arguments.unit)
        from muxmesh.supervisor.mps_keeper import keep_until_signal  # noqa: PLC0415 - it imports this module

        asyncio.run(keep_until_signal(*_prepare(runtime, arguments.unit)))
    except (MeshError, OSError) as error:
        _log.error("the MPS daemon of unit %s cannot run: %s", arguments.unit, error)
        sys.exit(1)


def become_daemon(runtime: MeshRuntime, unit: str) -> NoReturn:
    """Replaces this process by the daemon. Raises MeshError or OSError."""
    control, environment = _prepare(runtime, unit)
    os.execve(control.program, (CONTROL_PROGRAM, "-f"), environment)  # noqa: S606


def _prepare(runtime: MeshRuntime, unit: str) -> tuple[MpsControl, dict[str, str]]:
    """Ends leftovers and creates the directories; returns the daemon's control program and environment."""
    control = runtime.mps_control(unit)
    asyncio.run(end_leftovers(control))
    for directory in control.environment.values():
        Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    return control, daemon_environment(control, runtime.device_uuids[unit], os.environ)


def daemon_environment(control: MpsControl, device_uuid: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a daemon: without an inherited share, which would limit all of its clients."""
    kept = {name: value for name, value in inherited.items() if name != SHARE}
    return {**kept, **control.environment, "CUDA_VISIBLE_DEVICES": device_uuid}


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


if __name__ == "__main__":
    main()
