"""A real redis-server for tests, on a unix socket and without persistence."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from muxmesh.supervisor.redis_server import redis_command, wait_for_redis


@contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    """Starts a server whose files are in ``folder``; yields its URL."""
    socket = folder / "redis.sock"
    with subprocess.Popen(redis_command(socket, folder), stdout=subprocess.DEVNULL) as process:
        try:
            asyncio.run(asyncio.wait_for(wait_for_redis(f"unix://{socket}"), 20))
            yield f"unix://{socket}"
        finally:
            process.kill()


@dataclass
class RedisProcess:
    """A server that a test kills and starts again, without its data."""

    folder: Path
    _process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"unix://{self.folder / 'redis.sock'}"

    async def start(self) -> None:
        self._process = subprocess.Popen(
            redis_command(self.folder / "redis.sock", self.folder), stdout=subprocess.DEVNULL
        )
        await asyncio.wait_for(wait_for_redis(self.url), 20)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def running_redis_process(folder: Path) -> Iterator[RedisProcess]:
    """A server that the test starts; its files are in ``folder``. It does not outlive the block."""
    server = RedisProcess(folder)
    try:
        yield server
    finally:
        server.kill()
