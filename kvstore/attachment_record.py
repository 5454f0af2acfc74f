"""One attachment: a worker, which owns leases, together with every process that writes into the pool for it."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field

from kvstore.progress_page import ProgressPage
from kvstore.worker_slots import WorkerRecord
from muxmesh.process_state import ProcessState, process_state


@dataclass(slots=True)
class AttachmentRecord:
    """What the attach server has of a worker.

    ``processes`` maps the watch fd of each process that has not exited to its connection; the worker's own process is
    the first. ``is_owner_alive``: the worker's own process has not exited. ``is_ending``: it has been killed, which may
    take a while. ``is_limited``: it has proved its share of the GPU; ``proof``: its report is being checked.
    """

    worker: WorkerRecord
    slot: int
    progress: ProgressPage
    processes: dict[int, socket.socket] = field(default_factory=dict)
    kill_timer: asyncio.TimerHandle | None = None
    is_owner_alive: bool = True
    is_ending: bool = False
    is_limited: bool = False
    proof: asyncio.Task[None] | None = None
    last_beat: int = -1
    num_silent_checks: int = 0
    last_command: int = 0
    num_unanswered_checks: int = 0

    @property
    def is_traced(self) -> bool:
        """A debugger is attached to the worker, and may stop it at any time."""
        return process_state(self.worker.pid) is ProcessState.TRACED

    def count_silent_checks(self, beat: int) -> int:
        """Adds a check, which found ``beat`` heartbeats; returns the checks in a row without a new one.

        Checks are counted, not seconds, so that no worker is killed because the machine was suspended. They do not
        count while the worker is not ready or a debugger is attached to it.
        """
        is_silent = beat == self.last_beat and self.worker.ready
        if is_silent and not self.is_traced:
            self.num_silent_checks += 1
        else:
            self.last_beat, self.num_silent_checks = beat, 0
        return self.num_silent_checks

    def count_unanswered_checks(self) -> int:
        """Adds a check; returns the checks in a row in which the worker has not followed its latest command.

        They do not count while a debugger is attached to it.
        """
        worker = self.worker
        if worker.engine is None and worker.num_told == self.last_command:
            self.num_unanswered_checks += not self.is_traced
        else:
            self.last_command, self.num_unanswered_checks = worker.num_told, 0
        return self.num_unanswered_checks

    def remove_process(self, watch_fd: int) -> None:
        """Stops watching a process, and closes its connection and ``watch_fd``."""
        loop = asyncio.get_running_loop()
        connection = self.processes.pop(watch_fd)
        loop.remove_reader(watch_fd)
        loop.remove_reader(connection.fileno())
        os.close(watch_fd)
        connection.close()

    def cancel_all(self) -> None:
        """Cancels what would happen to the worker later."""
        if self.kill_timer is not None:
            self.kill_timer.cancel()
        if self.proof is not None:
            self.proof.cancel()
