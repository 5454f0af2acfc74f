"""Whether a process of this user runs, is stopped by a signal, or is in the hands of a debugger. Reads /proc."""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path


class ProcessState(Enum):
    """What prevents a process from responding."""

    RUNNING = auto()
    """Nothing. A process that has exited counts as running: its exit is noticed elsewhere."""
    STOPPED = auto()
    """A signal (SIGSTOP, SIGTSTP, SIGTTIN or SIGTTOU) has stopped it."""
    TRACED = auto()
    """A debugger or another tracer is attached, and may stop it at any time."""


def process_state(pid: int) -> ProcessState:
    """The state of the process ``pid`` now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:  # it has exited
        return ProcessState.RUNNING
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if fields.get("TracerPid", "0").strip() != "0":
        return ProcessState.TRACED
    return ProcessState.STOPPED if fields.get("State", "").strip().startswith("T") else ProcessState.RUNNING
