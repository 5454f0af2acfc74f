"""A worker's attachment to its unit: the mapped pool, the shared pages, and the attach socket.

The socket ties the two processes together: kvstore reclaims the leases of a worker whose socket closes, once the
worker has exited; a worker whose socket closes has lost its unit. What the pool holds is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvstore.attach_protocol import MAX_FDS, MAX_MESSAGE_BYTES, num_pool_fds
from kvstore.device_memory import HOST
from kvstore.grant_page import GrantPage, Word
from kvstore.progress_page import ProgressPage
from muxmesh.device.device_pool import DevicePool, HostPool
from muxmesh.errors import Unavailable
from muxmesh.types import Role

_RETRY_S = 0.1
_NUM_RETRIES = 300
_REPLY_TIMEOUT_S = 5.0


class Attachment:
    """Owns what the unit sent to this worker.

    ``pool``: the unit's memory, mapped. ``page``, ``slot``: the grant page and this worker's slot in it. ``progress``:
    the page in which the unit finds what this worker had computed if it dies. ``worker``: its name in the unit.
    """

    def __init__(self, connection: socket.socket, reply: Mapping[str, Any], fds: Sequence[int]) -> None:
        """``reply`` and ``fds``: see `kvstore.attach_protocol`. Raises Unavailable, see `map_pool`."""
        num_pool = num_pool_fds(reply["pool"])
        self.pool = map_pool(reply["pool"], fds[:num_pool])
        page_fd, self.doorbell_fd, self.bell_fd, progress_fd = fds[num_pool:]
        self.page = GrantPage(page_fd)
        self.progress = ProgressPage(progress_fd, *reply["progress"])
        for fd in (page_fd, progress_fd):
            os.close(fd)
        self.worker = str(reply["worker"])
        self.slot = int(reply["slot"])
        self._connection = connection

    def beat(self) -> None:
        """Shows the unit that this worker's event loop runs. To be called every `BEAT_EVERY_S` seconds."""
        self.page.add(self.slot, Word.HEARTBEATS, 1)

    def set_ready(self, ready: bool) -> None:
        """Reports to the unit whether this worker accepts requests. Does nothing if the unit is gone."""
        with contextlib.suppress(OSError):
            self._connection.send(json.dumps({"ready": ready}).encode())

    def close(self) -> None:
        """Detaches from the unit. The process has to exit soon: a worker that detaches and lives on is killed."""
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()

    def on_unit_lost(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` once when kvstore closes the socket or exits: nothing manages the mapped pool then."""
        loop = asyncio.get_running_loop()

        def readable() -> None:
            try:
                if self._connection.recv(MAX_MESSAGE_BYTES):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
            loop.remove_reader(self._connection.fileno())
            callback()

        loop.add_reader(self._connection.fileno(), readable)


def map_pool(description: Mapping[str, Any], fds: Sequence[int]) -> DevicePool:
    """Maps a unit's pool as its description says (`kvstore.attach_protocol.pool_description`). Closes ``fds``.

    Raises Unavailable for a kind of memory that this worker cannot map.
    """
    try:
        segments = [len(shard) for shard in description["shards"]]
        if description["device"] != HOST or segments != [1]:
            raise Unavailable(
                f"the unit's pool is {description['device']} memory with {segments} segments in its shards; "
                f"this worker maps one segment of {HOST} memory"
            )
        pool_fd, *swap_fds = fds
        return HostPool.map(pool_fd, description["slab_bytes"], swap_fds[0] if swap_fds else None)
    finally:
        for fd in fds:
            os.close(fd)


async def attach(path: Path, role: Role, model: str, address: str) -> Attachment:
    """Attaches to the unit that listens on ``path``; waits up to 30 s until it does.

    Raises Unavailable if no unit listens, or the unit refuses the worker.
    """
    hello = {"role": role.value, "model": model, "address": address}
    connection, reply, fds = await _connect(path, hello, f"{role.value} of {model}")
    return Attachment(connection, reply, fds)


async def attach_writer(path: Path, worker: str) -> tuple[socket.socket, DevicePool]:
    """Attaches a further process that writes into the pool for ``worker``, such as an engine core. See `attach`.

    The leases of the worker end only after this process has exited too, and kvstore kills it if the worker exits. The
    caller keeps the returned connection open.
    """
    connection, reply, fds = await _connect(path, {"writer_for": worker}, f"a writer for {worker}")
    return connection, map_pool(reply["pool"], fds)


async def _connect(
    path: Path, hello: Mapping[str, str], description: str
) -> tuple[socket.socket, dict[str, Any], list[int]]:
    message = json.dumps(hello).encode()
    for _ in range(_NUM_RETRIES):
        try:
            connection, reply, fds = await asyncio.to_thread(_exchange_hello, path, message)
        except OSError:
            await asyncio.sleep(_RETRY_S)
            continue
        if not reply:
            connection.close()
            raise Unavailable(f"the unit at {path} refused {description}; see its log")
        return connection, json.loads(reply), fds
    raise Unavailable(f"no unit listens on {path}")


def _exchange_hello(path: Path, hello: bytes) -> tuple[socket.socket, bytes, list[int]]:
    """Sends ``hello`` and blocks until the unit replies; an empty reply is a refusal. Raises OSError."""
    with ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        connection.settimeout(_REPLY_TIMEOUT_S)
        connection.connect(str(path))
        connection.send(hello)
        reply, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, MAX_FDS)
        connection.setblocking(False)
        undo.pop_all()
        return connection, reply, fds
