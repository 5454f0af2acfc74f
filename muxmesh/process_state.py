"""Whether a process of this user runs, is stopped by a signal, is traced by a debugger, or has ended. Reads /proc."""

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
    fields = _status(pid)
    if fields.get("TracerPid", "0").strip() != "0":
        return ProcessState.TRACED
    return ProcessState.STOPPED if fields.get("State", "").strip().startswith("T") else ProcessState.RUNNING


def has_ended(pid: int) -> bool:
    """Whether the process ``pid`` has exited, reaped or not."""
    return _status(pid).get("State", "Z").strip().startswith(("Z", "X"))


def own_memory_bytes(pid: int) -> int:
    """Memory of a process that is in no file and shared with no other process; 0 if there is no such process."""
    kib = _status(pid).get("RssAnon", "").split()
    return int(kib[0]) * 1024 if kib else 0


def _status(pid: int) -> dict[str, str]:
    """The fields of a process; none if there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return dict(line.split(":", 1) for line in lines if ":" in line)
