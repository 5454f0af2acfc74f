"""The GPUs of this machine. ``python -m muxmesh.cuda.device_list`` prints them as JSON, and `DeviceList` runs that.

The driver is asked in a process of its own, so that the process that wants to know has not initialized CUDA: its
children could not use a GPU then. It is outside MPS, so it sees whole devices.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict

from muxmesh.cuda.driver import CudaDriver, DeviceInfo
from muxmesh.cuda.mps import PIPE_DIRECTORY
from muxmesh.errors import DeviceError
from muxmesh.quoting import one_line

_TIMEOUT_S = 60.0
"""A driver that initializes many GPUs without a persistence daemon takes seconds."""
NO_DAEMON = "/nonexistent/outside-mps"
"""A pipe directory in which no daemon listens: a process with it is outside MPS, even if the machine has a daemon."""


class DeviceList:
    """The GPUs that this process may use. Asked for once, when they are needed first."""

    @functools.cached_property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """The devices by their index N of `cuda:N`. Blocks. Raises DeviceError if the driver cannot be used."""
        command = (sys.executable, "-m", "muxmesh.cuda.device_list")
        environment = {**os.environ, PIPE_DIRECTORY: NO_DAEMON}
        try:
            result = subprocess.run(command, env=environment, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise DeviceError(f"the CUDA driver did not list its devices in {_TIMEOUT_S:g} s") from None
        if result.returncode:
            said = result.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {result.returncode}"]
            raise DeviceError(one_line(said[-1]))
        return tuple(
            DeviceInfo(**{**device, "compute_capability": tuple(device["compute_capability"])})
            for device in json.loads(result.stdout)
        )


def main() -> None:
    """Prints the devices of the driver. Ends with its error in one line and code 1 if there is none."""
    try:
        driver = CudaDriver()
        devices = [driver.device(index) for index in range(driver.num_devices())]
    except DeviceError as error:
        sys.exit(str(error))
    print(json.dumps([asdict(device) for device in devices]))


if __name__ == "__main__":
    main()
