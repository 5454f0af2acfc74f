"""How kvstore makes certain that a process writes nothing more into the pool.

No software stops a store that has begun, so memory is reclaimed only after the process has exited. `Fence` is the seam
between kvstore and the kind of device, since ending a process differs: on a CPU it is killed; on a GPU under MPS the
MPS daemon has to terminate the client before it is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Protocol


class Fence(Protocol):
    """Watches and ends the processes that write into one kind of device memory."""

    def watch(self, pid: int) -> int:
        """Returns a file descriptor that becomes readable when the process has exited and can write nothing more.

        The caller closes it. Raises OSError if there is no such process.
        """

    def kill(self, watch_fd: int) -> None:
        """Ends the process, if it has not exited. Does not wait: ``watch_fd`` reports the exit."""

    def expect_exit(self) -> None:
        """A process has announced that it will exit: looks now for a fault that the device reports only until then."""


class HostFence:
    """`Fence` of host memory: SIGKILL and pidfds."""

    def watch(self, pid: int) -> int:
        return os.pidfd_open(pid)

    def kill(self, watch_fd: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has exited
            signal.pidfd_send_signal(watch_fd, signal.SIGKILL)

    def expect_exit(self) -> None:
        pass
