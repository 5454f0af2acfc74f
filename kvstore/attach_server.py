"""The attach socket: passes the unit's memory to worker processes, and observes whether they live.

Each process keeps one SOCK_SEQPACKET connection for its whole life (messages: `attach_protocol`). The kernel identifies
the peer (SO_PEERCRED), and the unit's fence reports its exit.

An attachment is one worker, which owns leases, together with every process that writes into the pool for it. Its leases
and its slot are reclaimed only when all of these processes have exited, since no software stops a store that has begun.
kvstore kills a worker that closes its connection and does not exit, a ready worker whose heartbeats stop, and one that
hangs in a step, or while its engine falls asleep or wakes: otherwise their leases or their place among the models that
are awake would block other requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvstore.attach_peer import identify_peer
from kvstore.attach_protocol import (
    BEAT_EVERY_S,
    MAX_MESSAGE_BYTES,
    MAX_SILENT_CHECKS,
    MAX_UNANSWERED_CHECKS,
    pool_description,
    segment_description,
    send_message,
)
from kvstore.attachment_record import AttachmentRecord
from kvstore.device_memory import DeviceMemory, Transport
from kvstore.fence import Fence
from kvstore.grant_page import Word
from kvstore.grant_table import GrantTable
from kvstore.model_states import WorkerCommand
from kvstore.progress_page import ProgressPage, new_progress_fd
from kvstore.sequence_progress import SequenceProgress
from kvstore.share_proof import ShareProver
from kvstore.unit import Unit
from muxmesh.background_task import start_watched
from muxmesh.errors import MeshError
from muxmesh.quoting import quoted
from muxmesh.step_cost import StepCost
from muxmesh.types import Role

_log = logging.getLogger(__name__)
_LONG_GRANT_S = 2.0
"""If grants are revoked after less than this, they are checked more often than heartbeats, so as not to be late."""
_ACCEPT_AGAIN_S = 1.0
"""Pause after an error of `accept`, such as too many open files. The socket stays readable meanwhile."""
_LINGER_S = 5.0
"""A worker that has closed its connection is killed if it has not exited after this."""


class AttachServer:
    """Owns the attachments. Calls ``changed`` when a worker becomes ready or not ready, and when it is gone."""

    def __init__(
        self,
        path: Path,
        unit: Unit,
        memory: DeviceMemory,
        swap_fd: int | None,
        grants: GrantTable,
        fence: Fence,
        changed: Callable[[], None],
        check_every_s: float = BEAT_EVERY_S,
        prover: ShareProver | None = None,
        identities: Mapping[str, str] = MappingProxyType({}),
        share_of: Callable[[Role, str], float] = lambda role, model: 1.0,
    ) -> None:
        """``prover``: None on a CPU, whose workers prove nothing. ``identities``: `KvIdentity.text` of models; a worker
        of one of them has to have the same. ``share_of``: a worker's part of the device, in (0, 1].
        """
        self._path = path
        self._unit = unit
        self._memory = memory
        self._swap_fd = swap_fd
        self._grants = grants
        self._changed = changed
        self._fence = fence
        self._prover = prover
        self._identities = identities
        self._share_of = share_of
        self._device_has_failed = False
        self._attachments: dict[str, AttachmentRecord] = {}
        self._check_every_s = check_every_s
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    def start(self) -> None:
        """Binds the socket, listens, and starts to check heartbeats and grants. Needs a running event loop."""
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._listen()
        self._check_heartbeats()
        self._check_grants()

    def close(self) -> None:
        """Stops listening and closes every connection: workers take that as the end of the unit."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for timer in self._timers.values():
            timer.cancel()
        for attachment in self._attachments.values():
            for watch_fd in list(attachment.processes):
                attachment.remove_process(watch_fd)
            attachment.cancel_all()

    def end_group(self, reason: str, device_has_failed: bool) -> None:
        """Kills all workers: they start again as a group. After a failure of the device no KV computed so far is used.

        The pool stays. Leases and slots are reclaimed as the fence reports the exits. After a failure no worker
        attaches before the last one of the group has exited, and the weights are loaded again.
        """
        _log.error("all workers of the unit end: %s", reason)
        if device_has_failed:
            self._device_has_failed = True
            num_credits = self._unit.device_failed()
            _log.warning("prefix cache emptied, %d credits ended", num_credits)
            self._forget_weights_after_failure()
        for attachment in self._attachments.values():
            self._kill(attachment, "ends with its group")
        self._changed()

    def _forget_weights_after_failure(self) -> None:
        """Once no worker may be filling them. From then on workers attach again."""
        if self._device_has_failed and not self._attachments:
            self._memory.forget_weights()
            self._device_has_failed = False

    def tell(self, command: WorkerCommand) -> None:
        """Tells a worker what its engine is to be. Does nothing if the worker has exited, or is about to."""
        attachment = self._attachments.get(command.worker)
        if attachment is None or not attachment.is_owner_alive or attachment.is_ending:
            return
        connection = next(iter(attachment.processes.values()))
        send_message(connection, {"engine": command.engine, "number": command.number})

    @property
    def transport(self) -> Transport:
        """How the unit's memory is passed to workers."""
        return self._memory.transport

    def cost_of(self, worker: str) -> StepCost | None:
        """Measured step cost of a worker; None before its first step, or if it is not attached."""
        attachment = self._attachments.get(worker)
        return self._grants.page.read_cost(attachment.slot) if attachment else None

    def copy_rate_of(self, worker: str) -> float | None:
        """Bytes per second of a worker's copies to and from the swap region; None before the first one."""
        if (attachment := self._attachments.get(worker)) is None:
            return None
        page, slot = self._grants.page, attachment.slot
        num_bytes = page.read(slot, Word.SWAP_OUT_BYTES) + page.read(slot, Word.SWAP_IN_BYTES)
        copying_ns = page.read(slot, Word.SWAP_NS)
        return num_bytes / copying_ns * 1e9 if num_bytes and copying_ns else None

    def slot_of(self, worker: str) -> int:
        """The worker's slot in the grant page. Raises KeyError if it is not attached."""
        return self._attachments[worker].slot

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.error("no process can attach: %s; tried again after %g s", error, _ACCEPT_AGAIN_S)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener.fileno())
            self._timers["accept"] = loop.call_later(_ACCEPT_AGAIN_S, self._listen)
            return
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._on_hello, connection)

    def _on_hello(self, connection: socket.socket) -> None:
        """Attaches the process that sent its first message. If any step fails, the earlier ones are undone."""
        asyncio.get_running_loop().remove_reader(connection.fileno())
        if self._device_has_failed:
            connection.close()  # with its message unread, which resets it: the worker tries again
            return
        pid = 0
        with ExitStack() as undo:
            undo.callback(connection.close)
            try:
                message = connection.recv(MAX_MESSAGE_BYTES)  # read first: an unread one would reset the connection
                pid = identify_peer(connection)
                hello = _parsed_hello(message)
                watch_fd = self._fence.watch(pid)
                undo.callback(os.close, watch_fd)
                if "writer_for" in hello:
                    attachment = self._add_writer(connection, hello)
                else:
                    attachment = self._add_worker(connection, hello, pid, undo)
            except (OSError, ValueError, KeyError, TypeError, MeshError) as error:
                _log.warning("refused to attach process %d: %s", pid, error)
                send_message(connection, {"refused": str(error)})
                return
            undo.pop_all()
        self._add_process(attachment, watch_fd, connection)
        _log.info("%s attached (pid %d)", attachment.worker.name, pid)

    def _add_worker(
        self, connection: socket.socket, hello: dict[str, Any], pid: int, undo: ExitStack
    ) -> AttachmentRecord:
        missing = [field for field in ("role", "model", "address") if field not in hello]
        if missing:
            raise ValueError(f"its first message lacks {', '.join(missing)}; a worker sends role, model and address")
        role, model_name, address = hello["role"], hello["model"], hello["address"]
        self._check_identity(model_name, hello.get("kv"))
        worker = self._unit.attach(Role(role), model_name, address, pid)
        undo.callback(self._unit.worker_exited, worker.name)
        slot, bell_fd = self._grants.allocate_slot(worker.role, worker.model, self._share_of(worker.role, worker.model))
        undo.callback(self._grants.free_slot, slot)
        model = self._unit.models[worker.model]
        size = (model.resident_limit, model.max_model_len // model.shape.block_size)
        progress_fd = new_progress_fd(*size)
        try:
            progress = ProgressPage(progress_fd, *size)
            weights, weights_fds = self._describe_weights(worker.model)
            reply = {
                "worker": worker.name, "slot": slot, "progress": size, "weights": weights, "engine": worker.told
            }  # fmt: skip
            own_fds = (self._grants.page_fd, self._grants.doorbell_fd, bell_fd, progress_fd)
            self._send(connection, reply, (*weights_fds, *own_fds))
        finally:
            os.close(progress_fd)
        attachment = self._attachments[worker.name] = AttachmentRecord(worker, slot, progress)
        return attachment

    def _check_identity(self, model: str, found: object) -> None:
        """Raises ValueError if the worker would read and write other KV than the unit has."""
        if found is not None and found != self._identities.get(model, found):
            raise ValueError(
                f"its KV of {model} is not that of the unit: mesh.yaml or the model has changed since kvstore started; "
                "restart kvstore"
            )

    def _add_writer(self, connection: socket.socket, hello: dict[str, Any]) -> AttachmentRecord:
        attachment = self._attachments.get(hello["writer_for"])
        if attachment is None or not attachment.is_owner_alive:
            raise ValueError(f"no worker {quoted(hello['writer_for'])} is attached")
        self._send(connection, {"worker": attachment.worker.name}, ())
        return attachment

    def _describe_weights(self, model: str) -> tuple[list[Any] | None, tuple[int, ...]]:
        """The description of a model's weights and their file descriptors; (None, ()) if workers map the image."""
        weights = self._memory.weights(model)
        if weights is None:
            return None, ()
        return segment_description(weights.segment), (*weights.segment.fds, weights.page_fd)

    def _send(self, connection: socket.socket, reply: dict[str, Any], fds: tuple[int, ...]) -> None:
        """Sends ``reply`` with a description of the pool, and the pool's file descriptors followed by ``fds``."""
        pool = pool_description(self._memory, self._unit.slab_bytes, self._swap_fd is not None)
        pool_fds = [fd for shard in self._memory.shards for segment in shard.segments for fd in segment.fds]
        swap_fds = [] if self._swap_fd is None else [self._swap_fd]
        socket.send_fds(connection, [json.dumps({**reply, "pool": pool}).encode()], [*pool_fds, *swap_fds, *fds])

    def _add_process(self, attachment: AttachmentRecord, watch_fd: int, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        is_owner = not attachment.processes
        attachment.processes[watch_fd] = connection
        loop.add_reader(watch_fd, self._on_exit, attachment, watch_fd, is_owner)
        if is_owner:
            loop.add_reader(connection.fileno(), self._on_message, attachment, connection)

    def _on_message(self, attachment: AttachmentRecord, connection: socket.socket) -> None:
        try:
            message = connection.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:  # the worker detached
            loop = asyncio.get_running_loop()
            loop.remove_reader(connection.fileno())
            attachment.worker.ready = False
            self._fence.expect_exit()
            attachment.kill_timer = loop.call_later(_LINGER_S, self._kill, attachment, "detached and did not exit")
        else:
            try:
                self._apply_message(attachment, connection, json.loads(message))
            except (ValueError, KeyError, TypeError) as error:
                _log.warning("%s sent a message that is not understood: %r", attachment.worker.name, error)
                return
        self._changed()

    def _apply_message(self, attachment: AttachmentRecord, connection: socket.socket, message: dict[str, Any]) -> None:
        """Raises KeyError for a message of another kind."""
        if self._prover is not None and "num_sms" in message:
            check = self._check_share(self._prover, attachment, connection, message)
            attachment.proof = start_watched(check, "share of a worker")
            return
        if "done" in message:
            attachment.worker.report(int(message["done"]))
            return
        ready = bool(message["ready"])
        if ready and self._prover is not None and not attachment.is_limited:
            _log.warning("%s is not ready: it has not proved its share of the GPU", attachment.worker.name)
            return
        attachment.worker.ready = ready and not attachment.is_ending
        if not ready:
            self._fence.expect_exit()

    async def _check_share(
        self, prover: ShareProver, attachment: AttachmentRecord, connection: socket.socket, message: dict[str, Any]
    ) -> None:
        """Lets the worker know whether it is limited as configured. It ends by itself if it is not."""
        reason = await prover.problem(attachment.worker, message)
        attachment.is_limited = not reason
        if reason:
            attachment.worker.ready = False
            _log.error("refused %s (pid %d): %s", attachment.worker.name, attachment.worker.pid, reason)
        send_message(connection, {"refused": reason})

    def progress(self) -> dict[int, SequenceProgress]:
        """What decode workers report of their sequences, by lease id."""
        found: dict[int, SequenceProgress] = {}
        for attachment in self._attachments.values():
            if attachment.worker.role is Role.DECODE:
                found |= attachment.progress.reports()
        return found

    def _check_heartbeats(self) -> None:
        """Kills ready workers without a heartbeat in `MAX_SILENT_CHECKS` checks, and those whose engine hangs while it
        falls asleep or wakes.
        """
        for attachment in list(self._attachments.values()):
            beat = self._grants.page.read(attachment.slot, Word.HEARTBEATS)
            if attachment.count_silent_checks(beat) == MAX_SILENT_CHECKS:
                self._end(attachment, f"sent no heartbeat for {MAX_SILENT_CHECKS * self._check_every_s:g} s")
            if attachment.count_unanswered_checks() == MAX_UNANSWERED_CHECKS:
                unanswered_s = MAX_UNANSWERED_CHECKS * self._check_every_s
                self._end(attachment, f"was told to be {attachment.worker.told} {unanswered_s:g} s ago and is not")
        self._timers["heartbeats"] = asyncio.get_running_loop().call_later(self._check_every_s, self._check_heartbeats)

    def _check_grants(self) -> None:
        """Revokes the grants of workers that do not return them, and kills those that hang in a step.

        A worker that a debugger has stopped is not killed. One whose grant is revoked may still return it.
        """
        check_every_s = self._check_every_s * min(1.0, self._grants.longest_grant_s / _LONG_GRANT_S)
        self._timers["grants"] = asyncio.get_running_loop().call_later(check_every_s, self._check_grants)
        stalled = self._grants.revoke_stalled(check_every_s)
        by_slot = {attachment.slot: attachment for attachment in self._attachments.values()}
        for slot in stalled.revoked:
            _log.warning("%s has not returned its recalled grant: revoked", by_slot[slot].worker.name)
        for attachment in (by_slot[slot] for slot in stalled.to_kill):
            if not attachment.is_ending and not attachment.is_traced:
                self._end(attachment, "hangs in a step")

    def _end(self, attachment: AttachmentRecord, reason: str) -> None:
        """Kills a worker, which gets no request from now on: under MPS its exit may take a while."""
        self._kill(attachment, reason)
        self._changed()

    def _kill(self, attachment: AttachmentRecord, reason: str) -> None:
        _log.warning("%s %s: killed", attachment.worker.name, reason)
        attachment.is_ending, attachment.worker.ready = True, False
        self._grants.end_grants(attachment.slot)
        for watch_fd in attachment.processes:
            self._fence.kill(watch_fd)

    def _on_exit(self, attachment: AttachmentRecord, watch_fd: int, is_owner: bool) -> None:
        """Kills the other processes if the worker's own has exited; reclaims the attachment after the last one."""
        attachment.remove_process(watch_fd)
        if is_owner:
            attachment.is_owner_alive = attachment.worker.ready = False
            attachment.cancel_all()
            for other in attachment.processes:
                self._fence.kill(other)
        if attachment.processes:
            return
        del self._attachments[attachment.worker.name]
        self._forget_weights_after_failure()
        num_leases = self._unit.worker_exited(attachment.worker.name, attachment.progress.read())
        attachment.progress.close()
        self._grants.free_slot(attachment.slot)
        _log.info("%s exited; %d leases reclaimed", attachment.worker.name, num_leases)
        self._changed()


def _parsed_hello(message: bytes) -> dict[str, Any]:
    """The first message of a process. Raises ValueError if it is no JSON object, or a name in it is no string."""
    try:
        hello = json.loads(message)
    except ValueError:
        hello = None
    if not isinstance(hello, dict):
        raise ValueError("its first message is no JSON object")
    for field in ("role", "model", "address", "writer_for"):
        if not isinstance(hello.get(field, ""), str):
            raise ValueError(f"its first message has {field}: {quoted(str(hello[field]))}; a string is needed")
    return hello
