"""How kvstore makes certain that a process stores nothing more into the pool.

No software stops a store that has begun, so memory is reclaimed only after the process has exited. `Fence` is the seam
between kvstore and the kind of device: a client of a GPU under MPS has to be terminated by the MPS daemon before it is
killed, a process on a CPU is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Protocol


class Fence(Protocol):
    """Watches and ends the processes that write into one kind of device memory."""

    def watch(self, pid: int) -> int:
        """A file descriptor, to be closed by the caller, that is readable once the process has exited and can store
        nothing more. Raises OSError if there is no such process.
        """

    def kill(self, watch_fd: int) -> None:
        """Ends the process; its exit is reported by ``watch_fd``."""


class HostFence:
    """`Fence` of host memory: SIGKILL and pidfds."""

    def watch(self, pid: int) -> int:
        """See `Fence`."""
        return os.pidfd_open(pid)

    def kill(self, watch_fd: int) -> None:
        """See `Fence`."""
        with contextlib.suppress(ProcessLookupError):  # it has just exited
            signal.pidfd_send_signal(watch_fd, signal.SIGKILL)
