"""The attach socket: how a worker gets the unit's memory, and how kvstore knows that it lives.

One SOCK_SEQPACKET connection for the life of a worker; messages are JSON. The kernel names the peer (SO_PEERCRED),
and a pidfd tells when the process has certainly exited: only then are its leases and its slot taken back, since no
software can stop a store that has already begun. A worker that closed its socket and lives on is killed, and so is a
ready one whose heartbeat stops: its leases expire, and may hold up others for no longer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvstore.attach_protocol import BEAT_EVERY_S, MAX_MESSAGE_BYTES, SILENT_LOOKS
from kvstore.grant import Word
from kvstore.memory import UnitMemory
from kvstore.progress import ProgressPage, new_progress_fd
from kvstore.unit import Unit, WorkerRecord
from muxmesh.config.runtime import Role
from muxmesh.cost import StepCost
from muxmesh.errors import MeshError

_log = logging.getLogger(__name__)
_LINGER_S = 5.0


@dataclass(slots=True)
class _Attached:
    connection: socket.socket
    pidfd: int
    worker: WorkerRecord
    slot: int
    progress: ProgressPage
    kill_timer: asyncio.TimerHandle | None = None
    last_beat: int = -1
    num_silent_looks: int = 0


class AttachServer:
    """Listens for workers. ``changed`` is called whenever one is ready or gone."""

    def __init__(
        self,
        path: Path,
        unit: Unit,
        memory: UnitMemory,
        changed: Callable[[], None],
        look_every_s: float = BEAT_EVERY_S,
    ) -> None:
        self._path = path
        self._unit = unit
        self._memory = memory
        self._changed = changed
        self._attached: dict[str, _Attached] = {}
        self._look_every_s = look_every_s
        self._look_timer: asyncio.TimerHandle | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    def start(self) -> None:
        """Binds and listens."""
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._listener.listen()
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)
        self._look()

    def close(self) -> None:
        """Closes every connection: workers take that as the end of the unit."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        self._listener.close()
        if self._look_timer is not None:
            self._look_timer.cancel()
        for attached in self._attached.values():
            loop.remove_reader(attached.pidfd)
            loop.remove_reader(attached.connection.fileno())
            attached.connection.close()
            os.close(attached.pidfd)
            if attached.kill_timer is not None:
                attached.kill_timer.cancel()

    def cost_of(self, worker: str) -> StepCost | None:
        """What the steps of a worker take; None before its first, or if it is not attached here."""
        attached = self._attached.get(worker)
        cost = self._memory.page.read_cost(attached.slot) if attached else None
        return cost if cost is not None and cost.step_s(1, 1) > 0 else None

    def slot_of(self, worker: str) -> int:
        """The worker's slot in the grant page."""
        return self._attached[worker].slot

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._hello, connection)

    def _hello(self, connection: socket.socket) -> None:
        """First message of a worker: {role, model, address}. Whatever fails, nothing of it stays."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(connection.fileno())
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        with ExitStack() as undo:
            undo.callback(connection.close)
            try:
                if uid != os.getuid():
                    raise ValueError(f"uid {uid} is not the mesh's")
                hello = json.loads(connection.recv(MAX_MESSAGE_BYTES))
                pidfd = os.pidfd_open(pid)
                undo.callback(os.close, pidfd)
                worker = self._unit.attach(Role(hello["role"]), hello["model"], hello["address"], pid)
                undo.callback(self._unit.worker_exited, worker.name)
                slot, bell = self._memory.take_slot()
                undo.callback(self._memory.give_back_slot, slot)
                share = self._unit.models[worker.model]
                size = (share.max_num_seqs, share.max_model_len // share.shape.block_size)
                progress_fd = new_progress_fd(*size)
                try:
                    progress = ProgressPage(progress_fd, *size)
                    reply = {"worker": worker.name, "slot": slot, "slab_bytes": self._unit.slab_bytes, "progress": size}
                    memory = self._memory
                    fds = [memory.pool_fd, memory.swap_fd, memory.page_fd, memory.doorbell_fd, bell, progress_fd]
                    socket.send_fds(connection, [json.dumps(reply).encode()], fds)
                finally:
                    os.close(progress_fd)
            except (OSError, ValueError, KeyError, TypeError, MeshError) as error:
                _log.warning("process %d may not attach: %s", pid, error)
                return
            undo.pop_all()
        attached = self._attached[worker.name] = _Attached(connection, pidfd, worker, slot, progress)
        loop.add_reader(connection.fileno(), self._message, attached)
        loop.add_reader(pidfd, self._exited, attached)
        _log.info("%s attached (pid %d)", worker.name, pid)

    def _message(self, attached: _Attached) -> None:
        try:
            message = attached.connection.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message:
            attached.worker.ready = bool(json.loads(message).get("ready"))
        else:  # it let go of the unit: it has to exit, and soon
            loop = asyncio.get_running_loop()
            loop.remove_reader(attached.connection.fileno())
            attached.worker.ready = False
            attached.kill_timer = loop.call_later(_LINGER_S, self._kill, attached, "left the unit and lives on")
        self._changed()

    def _look(self) -> None:
        """Kills ready workers that have been silent for too long. Looks are counted, not seconds: a machine that
        slept has not made anyone silent.
        """
        for attached in self._attached.values():
            beat = self._memory.page.read(attached.slot, Word.HEARTBEATS)
            if beat != attached.last_beat or not attached.worker.ready:
                attached.last_beat, attached.num_silent_looks = beat, 0
                continue
            attached.num_silent_looks += 1
            if attached.num_silent_looks == SILENT_LOOKS:
                self._kill(attached, f"gave no sign of life for {SILENT_LOOKS * self._look_every_s:g} s")
        self._look_timer = asyncio.get_running_loop().call_later(self._look_every_s, self._look)

    @staticmethod
    def _kill(attached: _Attached, reason: str) -> None:
        _log.warning("%s %s: killed", attached.worker.name, reason)
        signal.pidfd_send_signal(attached.pidfd, signal.SIGKILL)

    def _exited(self, attached: _Attached) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(attached.pidfd)
        loop.remove_reader(attached.connection.fileno())
        if attached.kill_timer is not None:
            attached.kill_timer.cancel()
        os.close(attached.pidfd)
        attached.connection.close()
        del self._attached[attached.worker.name]
        num_leases = self._unit.worker_exited(attached.worker.name, attached.progress.read())
        attached.progress.close()
        self._memory.give_back_slot(attached.slot)
        _log.info("%s exited; %d leases taken back", attached.worker.name, num_leases)
        self._changed()
