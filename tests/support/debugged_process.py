"""A process that a debugger has stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.processes import ended_popen

DEBUGGED = """
import ctypes, os, signal, time

PR_SET_PDEATHSIG, PR_SET_PTRACER, PTRACE_SEIZE, PTRACE_INTERRUPT = 1, 0x59616D61, 0x4206, 0x4207
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
debugged = os.getpid()
read_end, write_end = os.pipe()
if os.fork() == 0:
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    os.read(read_end, 1)
    is_attached = libc.ptrace(PTRACE_SEIZE, debugged, None, None) == 0
    if is_attached:
        libc.ptrace(PTRACE_INTERRUPT, debugged, None, None)
        os.waitpid(debugged, 0)
    print("debugged" if is_attached else "no permission", flush=True)
else:
    libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    os.write(write_end, b"x")
time.sleep(600)
"""
"""A program that starts its own debugger. Prints "debugged" when that has stopped it, or "no permission"."""


def skip_without_permission(line: str) -> None:
    """Skips the test if ``line``, the output of `DEBUGGED`, reports that this machine allows no debugger."""
    if line == "no permission":
        pytest.skip("no permission to debug a process")


@contextmanager
def debugged_process() -> Iterator[int]:
    """Yields the pid of a process that a debugger has stopped. Both are killed afterwards."""
    debugged = subprocess.Popen([sys.executable, "-c", DEBUGGED], stdout=subprocess.PIPE, text=True)
    with ended_popen(debugged) as process:
        assert process.stdout is not None
        skip_without_permission(process.stdout.readline().strip())
        yield process.pid
