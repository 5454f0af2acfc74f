"""`python -m muxmesh.supervisor.mps_daemon`: the MPS daemon of a unit's GPU, after leftovers have been removed.

    --runtime FILE --unit NAME [--parent PID]     as every service; any unit on the GPU will do

With `--parent` this process becomes the daemon, and dies with its parent, which stops and checks it. Without, it keeps
the daemon (`mps_keeper`). What prevents its start, or ends it, is one line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from muxmesh.config.runtime import MeshRuntime
from muxmesh.cuda.mps import CONTROL_PROGRAM, SHARE, MpsControl
from muxmesh.errors import MeshError
from muxmesh.lifecycle import configure_logging, service_arguments
from muxmesh.supervisor.mps_keeper import keep_until_signal
from muxmesh.supervisor.mps_leftovers import end_leftovers

_log = logging.getLogger("mps")


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


if __name__ == "__main__":
    main()
