"""A worker's attachment to its unit: the mapped pool and weights, the shared pages, and the attach socket.

The socket ties the two processes together: kvstore reclaims the leases of a worker whose socket closes, once the
worker has exited; a worker whose socket closes has lost its unit. What the pool holds is not known here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.attach_protocol import MAX_FDS, MAX_MESSAGE_BYTES, num_pool_fds, num_segment_fds, send_message
from kvstore.device_memory import CUDA, HOST, Transport
from kvstore.grant_page import GrantPage, Word
from kvstore.progress_page import ProgressPage
from kvstore.worker_slots import EngineState
from muxmesh.cuda.sm_groups import SmShare
from muxmesh.device.device_pool import DevicePool, HostPool
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.file_access import why_denied
from muxmesh.types import Role

if TYPE_CHECKING:  # only units on a GPU load torch
    from muxmesh.device.cuda_mapping import CudaSegments, MappedWeights
    from muxmesh.device.torch_device import TorchDevice

_log = logging.getLogger(__name__)

_RETRY_S = 0.1
_REPLY_TIMEOUT_S = 5.0
_PROOF_TIMEOUT_S = 30.0
"""Longer than the unit waits for the answers of an MPS daemon."""


@dataclass(frozen=True, slots=True)
class WorkerDevice:
    """The GPU of a worker: for torch, and for the driver, which maps the unit's memory there."""

    torch: TorchDevice
    segments: CudaSegments


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """The state that the engine is to be in. ``number`` counts the commands of this worker; 0: in the attach reply."""

    engine: EngineState
    number: int


class Attachment:
    """Owns what the unit sent to this worker.

    ``pool``: the unit's memory, mapped. ``weights``: None on a CPU. ``transport``: how the unit passed both. ``page``,
    ``slot``: the grant page and this worker's slot in it. ``progress``: the page in which the unit finds what this
    worker had computed if it dies. ``worker``: its name in the unit. ``num_sms``: streaming multiprocessors of the
    whole device, of which this worker may have a share; 0 on a CPU.
    """

    def __init__(
        self, connection: socket.socket, reply: Mapping[str, Any], fds: Sequence[int], device: WorkerDevice | None
    ) -> None:
        """``reply`` and ``fds``: see `kvstore.attach_protocol`. ``device`` is None on a CPU. Takes over all of them.

        Raises Unavailable or DeviceError, see `map_pool`; then nothing stays open or mapped.
        """
        num_pool = num_pool_fds(reply["pool"])
        *weights_fds, page_fd, self.doorbell_fd, self.bell_fd, progress_fd = fds[num_pool:]
        with ExitStack() as undo:
            undo.callback(connection.close)
            for fd in fds[num_pool:]:
                undo.callback(os.close, fd)
            if device is not None:
                undo.callback(device.segments.close)
            self.pool = map_pool(reply["pool"], fds[:num_pool], device)
            self.weights = _map_weights(reply["weights"], weights_fds, device)
            undo.pop_all()
        self.page = GrantPage(page_fd)
        self.progress = ProgressPage(progress_fd, *reply["progress"])
        for fd in (*weights_fds[:-1], page_fd, progress_fd):
            os.close(fd)
        self.transport = Transport(reply["pool"]["transport"])
        self.num_sms = int(reply["pool"]["num_sms"])
        self.worker = str(reply["worker"])
        self.slot = int(reply["slot"])
        self.command = EngineCommand(EngineState(reply["engine"]), 0)
        """The latest one."""
        self._has_command = asyncio.Event()
        self._connection = connection

    def beat(self) -> None:
        """Shows the unit that this worker's event loop runs. To be called every `BEAT_EVERY_S` seconds."""
        self.page.add(self.slot, Word.HEARTBEATS, 1)

    async def prove_share(self, num_sms: int, is_mps_client: bool) -> None:
        """Reports what the driver says of this process's share of the GPU. To be called before `on_unit_lost`.

        Raises Unavailable if the unit refuses it, with what would be right, or is gone.
        """
        message = json.dumps({"num_sms": num_sms, "mps": is_mps_client}).encode()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_PROOF_TIMEOUT_S):
                self._connection.send(message)
                reply = await loop.sock_recv(self._connection, MAX_MESSAGE_BYTES)
                while self._read_command(reply):  # which the unit may send at any time
                    reply = await loop.sock_recv(self._connection, MAX_MESSAGE_BYTES)
        except (OSError, TimeoutError) as error:
            raise Unavailable(
                f"the unit did not confirm this worker's share of the GPU: {error or 'no reply'}"
            ) from error
        reason = json.loads(reply)["refused"] if reply else "the unit is lost"
        if reason:
            raise Unavailable(f"the unit refused {self.worker}: {reason}")

    def set_ready(self, ready: bool) -> None:
        """Reports to the unit whether this worker accepts requests. Does nothing if the unit is gone."""
        send_message(self._connection, {"ready": ready})

    async def next_command(self) -> EngineCommand:
        """Waits for a command of the unit. A later one replaces an earlier one."""
        await self._has_command.wait()
        self._has_command.clear()
        return self.command

    def report_done(self, command: EngineCommand) -> None:
        """Reports that the engine is in the state of ``command``. Does nothing if the unit is gone."""
        send_message(self._connection, {"done": command.number})

    def _read_command(self, message: bytes) -> bool:
        """Keeps a command for `next_command`; False if the message is none."""
        content = json.loads(message) if message else {}
        if "engine" not in content:
            return False
        self.command = EngineCommand(EngineState(content["engine"]), int(content["number"]))
        self._has_command.set()
        return True

    def close(self) -> None:
        """Detaches from the unit. The process has to exit soon: a worker that detaches and lives on is killed."""
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()

    def on_unit_lost(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` once when kvstore closes the socket or exits: nothing manages the mapped pool then.

        From then on commands are read, see `next_command`.
        """
        loop = asyncio.get_running_loop()

        def readable() -> None:
            try:
                if message := self._connection.recv(MAX_MESSAGE_BYTES):
                    self._read_command(message)
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
            loop.remove_reader(self._connection.fileno())
            callback()

        loop.add_reader(self._connection.fileno(), readable)


def open_worker_device(share: SmShare | None) -> WorkerDevice:
    """Opens the GPU of this process for torch and for the driver. Raises DeviceError.

    With ``share`` a green context limits what it computes to these SMs.
    """
    from muxmesh.cuda.driver import CudaDriver  # noqa: PLC0415 - only units on a GPU need torch
    from muxmesh.device.cuda_mapping import CudaSegments  # noqa: PLC0415
    from muxmesh.device.torch_device import open_torch_device  # noqa: PLC0415

    device = open_torch_device(share)
    return WorkerDevice(device, CudaSegments(CudaDriver(), device.torch_device))


def map_pool(description: Mapping[str, Any], fds: Sequence[int], device: WorkerDevice | None = None) -> DevicePool:
    """Maps a unit's pool as its description says (`kvstore.attach_protocol.pool_description`). Closes ``fds``.

    ``device`` is None on a CPU. Raises Unavailable for a kind of memory that this worker cannot map; DeviceError if the
    driver refuses it, or it is that of another device.
    """
    try:
        kind = HOST if device is None else CUDA
        segments = [len(shard) for shard in description["shards"]]
        if description["device"] != kind or segments != [1]:
            raise Unavailable(
                f"the unit's pool is {description['device']} memory with {segments} segments in its shards; "
                f"this worker maps one segment of {kind} memory"
            )
        segment = description["shards"][0][0]
        num_segment = num_segment_fds(segment)
        pool_fd, swap_fd = (next(iter(part), None) for part in (fds[:num_segment], fds[num_segment:]))
        if device is not None:
            return _map_cuda_pool(segment, description["slab_bytes"], pool_fd, swap_fd, device)
        assert pool_fd is not None, "host memory comes with a file descriptor"
        return HostPool.map(pool_fd, description["slab_bytes"], swap_fd)
    finally:
        for fd in fds:
            os.close(fd)


def _map_cuda_pool(
    segment: Sequence[Any], slab_bytes: int, fd: int | None, swap_fd: int | None, device: WorkerDevice
) -> DevicePool:
    from muxmesh.device.cuda_pool import CudaPool  # noqa: PLC0415 - only units on a GPU need torch
    from muxmesh.device.pinned_swap import PinnedSwap  # noqa: PLC0415

    memory = device.segments.map(*_parse_segment(segment), fd)
    swap = None if swap_fd is None else PinnedSwap(swap_fd, device.torch, device.segments.register_host)
    return CudaPool(memory, slab_bytes, swap, device.torch)


def _map_weights(
    segment: Sequence[Any] | None, fds: Sequence[int], device: WorkerDevice | None
) -> MappedWeights | None:
    """Maps the weights of the worker's model, if the unit sent any. The last file descriptor is the weights page."""
    if segment is None or device is None:
        return None
    from muxmesh.device.cuda_mapping import MappedWeights  # noqa: PLC0415 - only units on a GPU need torch

    *segment_fds, page_fd = fds
    memory = device.segments.map(*_parse_segment(segment), next(iter(segment_fds), None))
    return MappedWeights(memory, page_fd)


def _parse_segment(description: Sequence[Any]) -> tuple[int, str, bytes]:
    """Size, device UUID and IPC handle of a segment."""
    num_bytes, device_uuid, ipc_handle = description
    return num_bytes, device_uuid, bytes.fromhex(ipc_handle)


async def attach(
    path: Path, role: Role, model: str, address: str, device: WorkerDevice | None = None, kv: str = ""
) -> Attachment:
    """Attaches to the unit that listens on ``path``; waits until one does. ``device``: None on a CPU.

    ``kv``: `KvIdentity.text` of the model; empty: not checked. Raises Unavailable if the unit refuses the worker;
    ConfigError if this process may not use the socket; or an error of `map_pool`.
    """
    hello = {"role": role.value, "model": model, "address": address} | ({"kv": kv} if kv else {})
    connection, reply, fds = await _connect(path, hello, f"{role.value} of {model}")
    return Attachment(connection, reply, fds, device)


async def attach_writer(
    path: Path, worker: str, device: WorkerDevice | None = None
) -> tuple[socket.socket, DevicePool]:
    """Attaches a further process that writes into the pool for ``worker``, such as an engine core. See `attach`.

    The leases of the worker end only after this process has exited too, and kvstore kills it if the worker exits. The
    caller keeps the returned connection open.
    """
    connection, reply, fds = await _connect(path, {"writer_for": worker}, f"a writer for {worker}")
    with ExitStack() as undo:
        undo.callback(connection.close)
        pool = map_pool(reply["pool"], fds, device)
        undo.pop_all()
    return connection, pool


async def _connect(
    path: Path, hello: Mapping[str, str], description: str
) -> tuple[socket.socket, dict[str, Any], list[int]]:
    message = json.dumps(hello).encode()
    is_waiting = False
    while True:
        try:
            connection, reply, fds = await asyncio.to_thread(_exchange_hello, path, message)
        except PermissionError as error:
            raise ConfigError(why_denied(path)) from error
        except OSError as error:
            if not is_waiting:
                _log.info("%s waits for the kvstore of its unit at %s: %s", description, path, error.strerror or error)
                is_waiting = True
            await asyncio.sleep(_RETRY_S)
            continue
        content = json.loads(reply) if reply else {"refused": "the connection was closed"}
        if reason := content.get("refused"):
            connection.close()
            raise Unavailable(f"the unit at {path} refused {description}: {reason}")
        return connection, content, fds


def _exchange_hello(path: Path, hello: bytes) -> tuple[socket.socket, bytes, list[int]]:
    """Sends ``hello`` and blocks until the unit replies, or closes the connection. Raises OSError."""
    with ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        connection.settimeout(_REPLY_TIMEOUT_S)
        connection.connect(str(path))
        connection.send(hello)
        reply, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, MAX_FDS)
        connection.setblocking(False)
        undo.pop_all()
        return connection, reply, fds
