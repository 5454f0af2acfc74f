"""The end of a process when its parent dies. Imports little, so that a process can ask for it before anything else."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Makes the kernel kill this process when its parent dies; ends it at once if the parent is dead already.

    SIGKILL, because a process that is stopped by a signal ignores SIGTERM. Nothing is left to be done in order: all
    processes of the mesh end at the same time, and shared memory is freed with the last process that maps it. The
    setting survives an exec, and counts for the thread of the parent that started this process. It is specific to
    Linux, like the rest of the serving side.

    Raises SystemExit with one line and code 1 if ``parent_pid`` is not that of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if (found := os.getppid()) != parent_pid:
        sys.exit(f"process {parent_pid} is not the parent of this one, or has exited; the parent is process {found}")
