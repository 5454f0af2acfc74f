"""A worker's attachment to its unit: the mapped pool, the grant page, and the socket that says that both live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvstore.grant import GrantPage
from muxmesh.config.runtime import Role
from muxmesh.errors import Unavailable

_RETRY_S = 0.1
_NUM_RETRIES = 300
_MAX_MESSAGE_BYTES = 4096


class Attachment:
    """What the unit gave this worker. ``pool`` is the unit's memory itself, as f32; ``worker`` is our name there."""

    def __init__(self, connection: socket.socket, reply: dict[str, object], fds: list[int]) -> None:
        pool_fd, page_fd, self.doorbell_fd, self.bell_fd = fds
        self.pool = np.frombuffer(mmap.mmap(pool_fd, 0), dtype=np.float32)
        self.page = GrantPage(page_fd)
        os.close(pool_fd)
        os.close(page_fd)
        self.worker = str(reply["worker"])
        self.slot = int(str(reply["slot"]))
        self.slab_bytes = int(str(reply["slab_bytes"]))
        self._connection = connection

    def set_ready(self, ready: bool) -> None:
        """Tells the unit whether this worker takes requests. A unit that is gone need not know."""
        with contextlib.suppress(OSError):
            self._connection.send(json.dumps({"ready": ready}).encode())

    def on_unit_lost(self, lost: Callable[[], None]) -> None:
        """Calls ``lost`` once when kvstore is gone: what is mapped then belongs to nobody."""
        loop = asyncio.get_running_loop()

        def readable() -> None:
            try:
                if self._connection.recv(_MAX_MESSAGE_BYTES):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
            loop.remove_reader(self._connection.fileno())
            lost()

        loop.add_reader(self._connection.fileno(), readable)


async def attach(path: Path, role: Role, model: str, address: str) -> Attachment:
    """Attaches to the unit that listens on ``path``, waiting up to 30 s for it. Raises Unavailable."""
    for _ in range(_NUM_RETRIES):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(5.0)
            connection.connect(str(path))
            connection.send(json.dumps({"role": role.value, "model": model, "address": address}).encode())
            message, fds, _, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 4)
        except OSError:
            connection.close()
            await asyncio.sleep(_RETRY_S)
            continue
        if len(fds) != 4:
            raise Unavailable(f"the unit at {path} refused {role.value} of {model}; see its log")
        connection.setblocking(False)
        return Attachment(connection, json.loads(message), fds)
    raise Unavailable(f"no unit listens on {path}")
