"""A real redis-server for tests, on a unix socket and without persistence."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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
