"""Decides whether a process hangs, from regular checks. Does no I/O and reads no clock.

Checks are counted, not seconds: after the supervisor or the whole machine was suspended, no process is killed for it.
A process with a debugger never hangs.
"""

from __future__ import annotations

from muxmesh.process_state import ProcessState

CHECK_EVERY_S = 1.0
"""Interval between two checks of a process."""
ASK_EVERY_CHECKS = 5
"""A process that responded is asked again after this many checks; one that did not, at each check."""
MAX_STOPPED_CHECKS = 5
"""Checks in a row that find the process stopped by a signal, after which it hangs."""
MAX_SILENT_CHECKS = 8
"""Checks in a row without a response, after which a process that once responded hangs."""
FENCED_EXTRA_CHECKS = 10
"""For a client of MPS: kvstore ends it first, after 10 s without a heartbeat and without harm to its neighbours."""
MAX_STARTING_CHECKS = 180
"""Checks without a first response, after which the start hangs. Loading a model and compiling kernels take long."""


class Liveness:
    """What the checks of one instance of a process have found so far."""

    def __init__(self, extra_checks: int = 0) -> None:
        """``extra_checks``: checks in a row that a process may be stopped or silent for beyond the limits above."""
        self._extra_checks = extra_checks
        self._has_responded = False
        self._num_stopped = 0
        self._num_silent = 0
        self._checks_until_asked = 0

    @property
    def is_to_be_asked(self) -> bool:
        """True if the process is to be asked for a response before the next check."""
        return self._checks_until_asked <= 0

    def check(self, state: ProcessState, *, responded: bool | None) -> str | None:
        """Adds one check; returns why the process has to be killed, or None.

        ``responded``: None if the process was not asked.
        """
        self._num_stopped = self._num_stopped + 1 if state is ProcessState.STOPPED else 0
        self._checks_until_asked -= 1
        if responded:
            self._has_responded, self._num_silent, self._checks_until_asked = True, 0, ASK_EVERY_CHECKS - 1
        elif responded is not None:
            self._num_silent += 1
        if state is ProcessState.TRACED:
            self._num_silent = 0
        if self._num_stopped >= MAX_STOPPED_CHECKS + self._extra_checks:
            return f"was stopped by a signal for {self._num_stopped * CHECK_EVERY_S:.0f} s"
        if self._has_responded and self._num_silent >= MAX_SILENT_CHECKS + self._extra_checks:
            return f"did not respond for {self._num_silent * CHECK_EVERY_S:.0f} s"
        if not self._has_responded and self._num_silent >= MAX_STARTING_CHECKS:
            return f"did not respond within {self._num_silent * CHECK_EVERY_S:.0f} s of its start"
        return None
