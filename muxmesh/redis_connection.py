"""Opens a Redis by its URL: one server, a primary behind Sentinel, or a Cluster.

    redis://[USER:PASSWORD@]HOST:PORT[/DB]          one server; rediss:// with TLS, unix://PATH for a socket
    redis+sentinel://HOST:PORT,HOST:PORT/SERVICE    the primary of SERVICE, as these Sentinels know it
    redis+cluster://HOST:PORT,HOST:PORT             a Cluster, which these nodes know
    rediss+sentinel://, rediss+cluster://           the same with TLS

Options of the connection follow as a query, such as ``?ssl_ca_certs=FILE``, and for Sentinel
``?sentinel_username=U&sentinel_password=P``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError

from muxmesh.errors import Unavailable

REDIS_ERRORS = (RedisError, RedisClusterException, OSError)
"""What a command raises if Redis does not carry it out. `RedisClusterException` is no RedisError."""
RedisClient = Any
"""A client of redis-py: `redis.asyncio.Redis` or `RedisCluster`. Their commands are the same, their types are not."""

TIMEOUT_S = 2.0
_DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}
_MAX_CONNECTIONS = 64
_NODE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:,@/]+)(:(?P<port>\d{1,5}))?")


def open_redis(url: str, *, timeout_s: float = TIMEOUT_S, **options: Any) -> RedisClient:
    """A client of the Redis at ``url``, which connects when it is used.

    A connection that the server has closed is opened again, and the command repeated once. When all connections are in
    use, a command waits for one. ``options`` are those of redis-py. Raises ValueError, TypeError or RedisError for a
    URL that is none.
    """
    kind, nodes, path, settings = _split(url)
    of_sentinel = {name.removeprefix("sentinel_"): settings.pop(name) for name in _sentinel_options(settings)}
    options = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, **settings, **options}
    if kind == "cluster":
        return RedisCluster(startup_nodes=[ClusterNode(*node) for node in nodes], **options)
    again: dict[str, Any] = {"retry": Retry(NoBackoff(), 1), "retry_on_error": [RedisConnectionError]}
    if kind == "sentinel":
        tls = {name: value for name, value in settings.items() if name.startswith("ssl")}
        sentinel_options = {**tls, **of_sentinel, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        sentinel = Sentinel(nodes, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
        return sentinel.master_for(path, **{"redis_class": _Primary, **options, **again})
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url, max_connections=_MAX_CONNECTIONS, timeout=timeout_s, **options, **again
    )
    return redis.asyncio.Redis.from_pool(pool)


class _Primary(redis.asyncio.Redis):
    """A client of the primary. Closing it closes its connections to the Sentinels too, which redis-py leaves open."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        for sentinel in self.connection_pool.sentinel_manager.sentinels:  # type: ignore[attr-defined]
            await sentinel.aclose()


def redis_url_problem(url: str) -> str | None:
    """Why no client can open ``url``: its nodes, its port, its options or its path. Makes no connection."""
    try:
        kind, _, path, _ = _split(url)
        if kind:
            parts = urlsplit(url)
            scheme = url.partition("+")[0]
            url = f"{scheme}://localhost?{urlencode(_split_query(parts.query)[1])}"
        connection = redis.asyncio.ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError) as error:  # TypeError: an option that connections do not have
        return f"cannot be opened: {str(error).rpartition('__init__() ')[2]}"
    if kind == "sentinel" and not path:
        return "names no service; needed is redis+sentinel://HOST:PORT,HOST:PORT/SERVICE"
    if isinstance(connection, redis.asyncio.UnixDomainSocketConnection) and not connection.path:
        return "has no path; needed is a URL such as unix:///run/redis.sock"
    return None


@contextlib.contextmanager
def redis_required() -> Iterator[None]:
    """Raises Unavailable for a command in the block that Redis does not carry out."""
    try:
        yield
    except REDIS_ERRORS as error:
        raise Unavailable(f"Redis does not respond: {error}") from error


def without_password(url: str) -> str:
    """``url`` for a message: without what stands before the `@` of its host, and without passwords of its query."""
    scheme, separator, rest = url.partition("://")
    rest = rest.rpartition("@")[2]  # a password may have any character
    host, question, query = rest.partition("?")
    kept = "&".join(part for part in query.split("&") if "password" not in part.lower())
    return f"{scheme}{separator}{host}{question if kept else ''}{kept}"


def _sentinel_options(settings: dict[str, Any]) -> list[str]:
    return [name for name in settings if name.startswith("sentinel_")]


def _split(url: str) -> tuple[str, list[tuple[str, int]], str, dict[str, Any]]:
    """(``sentinel``, ``cluster`` or empty, nodes, path, settings of the connection). Raises ValueError."""
    scheme, _, kind = url.partition("://")[0].partition("+")
    if not kind:
        return "", [], "", {}
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    sentinel_settings, others = _split_query(parts.query)
    typed = parse_url(f"{scheme}://localhost?{urlencode(others)}")
    settings: dict[str, Any] = {
        name: value for name, value in typed.items() if name not in ("host", "port", "connection_class")
    } | sentinel_settings
    settings |= {"username": unquote(user)} if user else {}
    settings |= {"password": unquote(password)} if password else {}
    settings |= {"ssl": True} if scheme == "rediss" else {}
    service, _, database = parts.path.removeprefix("/").partition("/")
    if database:
        settings["db"] = int(database)
    if kind == "cluster" and service:
        raise ValueError("a Cluster has neither a service nor a database, so nothing follows its nodes")
    return kind, list(_nodes(hosts, _DEFAULT_PORTS[kind])), service, settings


def _split_query(query: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The options for Sentinels, and the others. Raises ValueError."""
    pairs = parse_qsl(query, strict_parsing=bool(query))
    of_sentinel = {name: value for name, value in pairs if name.startswith("sentinel_")}
    return of_sentinel, {name: value for name, value in pairs if name not in of_sentinel}


def _nodes(hosts: str, default_port: int) -> Iterator[tuple[str, int]]:
    for text in hosts.split(","):
        found = _NODE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no HOST:PORT")
        port = int(found["port"] or default_port)
        if not 0 < port < 2**16:
            raise ValueError(f"port {port} is out of range")
        yield found["host"].strip("[]"), port
