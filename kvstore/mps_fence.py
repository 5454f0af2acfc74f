"""`Fence` of processes that are clients of an MPS daemon: it asks the daemon before it signals, and after an exit.

A signal to a client with work in flight faults all clients of the GPU, so the daemon terminates a client's work before
SIGKILL. The exit of a process does not end its work on the device: only the daemon's list of clients does. What answers
mean is decided in `mps_clients`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvstore.mps_clients import RELEASE_WITHIN_S, MpsClients, WatchedClient
from muxmesh.background_task import start_watched
from muxmesh.clock import Clock
from muxmesh.cuda.mps import MpsControl, MpsServer
from muxmesh.errors import Unavailable
from muxmesh.process_state import has_ended

_log = logging.getLogger(__name__)

POLL_EVERY_S = 5.0
"""Interval of the questions whether the server is in FAULT, besides those at exits. The daemon logs each question."""
POLL_EXITED_EVERY_S = 0.05
"""The same while a process has exited that the daemon may still list."""
TERMINATE_WITHIN_S = 5.0
"""A client that the daemon does not terminate within this time is killed without."""

EndGroup = Callable[[str, bool], None]
"""Called with a reason when all workers of the unit have to end; True: the device has failed, so KV is not valid."""


@dataclass(slots=True, eq=False)
class _Watch:
    """A process. ``pid_fd`` reports its exit to the fence, the end of ``write_fd`` its release at ``read_fd``."""

    client: WatchedClient
    pid_fd: int
    read_fd: int
    write_fd: int
    is_ending: bool = False


class MpsFence:
    """`Fence` under MPS. Needs a running event loop, and `run` as a background task."""

    def __init__(
        self,
        control: MpsControl,
        clock: Clock,
        end_group: EndGroup,
        give_up: Callable[[str], None],
        release_within_s: float = RELEASE_WITHIN_S,
        poll_every_s: float = POLL_EVERY_S,
        terminate_within_s: float = TERMINATE_WITHIN_S,
    ) -> None:
        """``give_up``: called with a reason when the unit itself has to end."""
        self._control = control
        self._clock = clock
        self._end_group = end_group
        self._give_up = give_up
        self._poll_every_s = poll_every_s
        self._terminate_within_s = terminate_within_s
        self._clients = MpsClients(release_within_s)
        self._watches: set[_Watch] = set()
        self._by_fd: dict[int, _Watch] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._wakes = asyncio.Event()

    @property
    def pipe_dir(self) -> Path:
        """Where the daemon listens."""
        return self._control.pipe_dir

    def watch(self, pid: int) -> int:
        pid_fd = os.pidfd_open(pid)
        try:
            read_fd, write_fd = os.pipe()
        except OSError:
            os.close(pid_fd)
            raise
        watch = _Watch(self._clients.add(pid), pid_fd, read_fd, write_fd)
        self._watches.add(watch)
        self._by_fd[watch.read_fd] = watch
        asyncio.get_running_loop().add_reader(pid_fd, self._on_exit, watch)
        return watch.read_fd

    def kill(self, watch_fd: int) -> None:
        watch = self._by_fd.get(watch_fd)
        if watch is None or watch.is_ending:
            return
        watch.is_ending = True
        task = start_watched(self._end(watch), f"end of process {watch.client.pid}")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    def expect_exit(self) -> None:
        """After a fault of the device the server may be in FAULT only until its clients have exited."""
        self._wakes.set()

    async def is_client(self, pid: int) -> bool:
        """Whether the daemon lists the process. Raises Unavailable."""
        asked_at_s = self._clock.monotonic_s()
        servers = await self._control.servers()
        self._apply(servers, asked_at_s)
        return any(pid in server.clients for server in servers)

    async def run(self) -> None:
        """Asks the daemon as long as the unit runs: slowly, and often while a process has exited or is to exit."""
        while True:
            self._wakes.clear()
            asked_at_s = self._clock.monotonic_s()
            try:
                self._apply(await self._control.servers(), asked_at_s)
            except Unavailable as error:
                self._apply(str(error), asked_at_s)
            if self._clients.some_have_exited:
                await asyncio.sleep(POLL_EXITED_EVERY_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_every_s):
                    await self._wakes.wait()

    def close(self) -> None:
        """Stops watching. Kills the processes that the daemon was just asked to terminate, and no others."""
        for watch in list(self._watches):
            if watch.is_ending:
                self._send_sigkill(watch)
            self._remove(watch)
        for task in self._endings:
            task.cancel()

    def _on_exit(self, watch: _Watch) -> None:
        asyncio.get_running_loop().remove_reader(watch.pid_fd)
        watch.client.exited_at_s = self._clock.monotonic_s()
        self._wakes.set()

    async def _end(self, watch: _Watch) -> None:
        """Lets the daemon terminate the client's work, then kills the process, whatever the daemon answers."""
        pid = watch.client.pid
        try:
            async with asyncio.timeout(self._terminate_within_s):
                server = await self._server_of(watch.client)
                is_terminated = server is None or await self._control.terminate_client(server, pid)
                if not is_terminated and watch.client.exited_at_s is None:
                    _log.warning("MPS server %d did not terminate process %d", server, pid)
        except (Unavailable, TimeoutError) as error:
            _log.warning("process %d is killed without the MPS daemon: %s", pid, str(error) or "it does not answer")
        self._send_sigkill(watch)

    async def _server_of(self, client: WatchedClient) -> int | None:
        """The server that lists a client; None if no server does. Raises Unavailable."""
        if client.server is None and client.exited_at_s is None:
            await self.is_client(client.pid)
        return client.server

    @staticmethod
    def _send_sigkill(watch: _Watch) -> None:
        if watch.client.exited_at_s is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watch.pid_fd, signal.SIGKILL)

    def _apply(self, servers: tuple[MpsServer, ...] | str, asked_at_s: float) -> None:
        alive = {pid for pid in self._clients.servers if not has_ended(pid)}
        found = self._clients.apply(servers, alive, asked_at_s, self._clock.monotonic_s())
        for watch in [watch for watch in self._watches if watch.client in found.released]:
            self._remove(watch)
        if found.fault or found.overdue:
            self._end_group(found.fault or found.overdue, bool(found.fault))
        if found.hopeless:
            self._give_up(found.hopeless)

    def _remove(self, watch: _Watch) -> None:
        """Closes the write end of the pipe, which reports the release, and the pidfd."""
        self._clients.discard(watch.client)
        self._watches.discard(watch)
        if self._by_fd.get(watch.read_fd) is watch:
            del self._by_fd[watch.read_fd]
        asyncio.get_running_loop().remove_reader(watch.pid_fd)
        os.close(watch.pid_fd)
        os.close(watch.write_fd)
