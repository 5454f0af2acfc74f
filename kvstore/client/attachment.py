"""A worker's attachment to its unit: the mapped pool, the grant page, and the socket that says that both live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.attach_protocol import MAX_MESSAGE_BYTES, NUM_FDS
from kvstore.client.swap import SwapRegion
from kvstore.grant import GrantPage, Word
from kvstore.progress import ProgressPage
from muxmesh.config.runtime import Role
from muxmesh.errors import Unavailable

_RETRY_S = 0.1
_NUM_RETRIES = 300
_ANSWER_TIMEOUT_S = 5.0


class Attachment:
    """What the unit gave this worker. ``pool`` is the unit's memory itself, as f32; ``worker`` is our name there;
    ``swap`` is None if the unit has no host memory to swap to.

    ``progress`` is where the unit looks for what we had computed, should we die.
    """

    def __init__(self, connection: socket.socket, reply: dict[str, Any], fds: list[int]) -> None:
        pool_fd, swap_fd, page_fd, self.doorbell_fd, self.bell_fd, progress_fd = fds
        self.pool = np.frombuffer(mmap.mmap(pool_fd, 0), dtype=np.float32)
        self.swap = SwapRegion(swap_fd) if os.fstat(swap_fd).st_size else None
        self.page = GrantPage(page_fd)
        self.progress = ProgressPage(progress_fd, *reply["progress"])
        for mapped in (pool_fd, swap_fd, page_fd, progress_fd):
            os.close(mapped)
        self.worker = str(reply["worker"])
        self.slot = int(reply["slot"])
        self.slab_bytes = int(reply["slab_bytes"])
        self._connection = connection

    def beat(self) -> None:
        """Tells the unit that this worker's event loop turns. To be called every `BEAT_EVERY_S`."""
        self.page.add(self.slot, Word.HEARTBEATS, 1)

    def set_ready(self, ready: bool) -> None:
        """Tells the unit whether this worker takes requests. A unit that is gone need not know."""
        with contextlib.suppress(OSError):
            self._connection.send(json.dumps({"ready": ready}).encode())

    def close(self) -> None:
        """Lets go of the unit. The process has to end soon: the unit waits for that."""
        self._connection.close()

    def on_unit_lost(self, lost: Callable[[], None]) -> None:
        """Calls ``lost`` once when kvstore is gone: what is mapped then belongs to nobody."""
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
            lost()

        loop.add_reader(self._connection.fileno(), readable)


async def attach(path: Path, role: Role, model: str, address: str) -> Attachment:
    """Attaches to the unit that listens on ``path``, waiting up to 30 s for it. Raises Unavailable."""
    hello = json.dumps({"role": role.value, "model": model, "address": address}).encode()
    for _ in range(_NUM_RETRIES):
        try:
            connection, reply, fds = await asyncio.to_thread(_say_hello, path, hello)
        except OSError:
            await asyncio.sleep(_RETRY_S)
            continue
        if not reply:
            connection.close()
            raise Unavailable(f"the unit at {path} refused {role.value} of {model}; see its log")
        return Attachment(connection, json.loads(reply), fds)
    raise Unavailable(f"no unit listens on {path}")


def _say_hello(path: Path, hello: bytes) -> tuple[socket.socket, bytes, list[int]]:
    """Blocks until the unit answers; an empty answer is a refusal. Raises OSError."""
    with ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        connection.settimeout(_ANSWER_TIMEOUT_S)
        connection.connect(str(path))
        connection.send(hello)
        reply, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, NUM_FDS)
        connection.setblocking(False)
        undo.pop_all()
        return connection, reply, fds
