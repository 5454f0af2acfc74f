"""Opens a Redis by its URL: one server, a primary behind Sentinel, or a Cluster.

    redis://[USER:PASSWORD@]HOST:PORT[/DB]          one server; rediss:// with TLS, unix://PATH for a socket
    redis+sentinel://HOST:PORT,HOST:PORT/SERVICE    the primary of SERVICE, as these Sentinels know it
    redis+cluster://HOST:PORT,HOST:PORT             a Cluster, which these nodes know
    rediss+sentinel://, rediss+cluster://           the same with TLS

Options of the connection follow as a query, such as ``?ssl_ca_certs=FILE``, and for Sentinel
``?sentinel_username=U&sentinel_password=P``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

RedisClient = Any
"""A client of redis-py: `redis.asyncio.Redis` or `RedisCluster`. Their commands are the same, their types are not."""

REDIS_URL_PATTERN = r"^(rediss?(\+sentinel|\+cluster)?|unix)://"
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
    options = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, **options}
    if kind == "cluster":
        return RedisCluster(startup_nodes=[ClusterNode(*node) for node in nodes], **settings, **options)
    again: dict[str, Any] = {"retry": Retry(NoBackoff(), 1), "retry_on_error": [RedisConnectionError]}
    if kind == "sentinel":
        of_sentinel = {name.removeprefix("sentinel_"): settings.pop(name) for name in _sentinel_options(settings)}
        is_tls = {"ssl": settings["ssl"]} if "ssl" in settings else {}
        sentinel_options = {**of_sentinel, **is_tls, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        sentinel = Sentinel(nodes, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
        return sentinel.master_for(path, **{"redis_class": _Primary, **settings, **options, **again})
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
        kind, _, path, settings = _split(url)
        if kind:
            plain = {name: value for name, value in settings.items() if name not in _sentinel_options(settings)}
            plain.pop("ssl", None)
            url = f"redis://localhost?{urlencode(plain)}"
        connection = redis.asyncio.ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError) as error:  # TypeError: an option that connections do not have
        return f"cannot be opened: {str(error).rpartition('__init__() ')[2]}"
    if kind == "sentinel" and not path:
        return "names no service; needed is redis+sentinel://HOST:PORT,HOST:PORT/SERVICE"
    if isinstance(connection, redis.asyncio.UnixDomainSocketConnection) and not connection.path:
        return "has no path; needed is a URL such as unix:///run/redis.sock"
    return None


def without_password(url: str) -> str:
    """``url`` for a message: without what stands before the `@` of its host, and without passwords of its query."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    path, question, query = path.partition("?")
    kept = "&".join(part for part in query.split("&") if "password" not in part.lower())
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}{question if kept else ''}{kept}"


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
    settings: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    settings |= {"username": unquote(user)} if user else {}
    settings |= {"password": unquote(password)} if password else {}
    settings |= {"ssl": True} if scheme == "rediss" else {}
    service, _, database = parts.path.removeprefix("/").partition("/")
    if database:
        settings["db"] = int(database)
    if kind == "cluster" and service:
        raise ValueError("a Cluster has neither a service nor a database, so nothing follows its nodes")
    return kind, list(_nodes(hosts, _DEFAULT_PORTS[kind])), service, settings


def _nodes(hosts: str, default_port: int) -> Iterator[tuple[str, int]]:
    for text in hosts.split(","):
        found = _NODE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no HOST:PORT")
        port = int(found["port"] or default_port)
        if not 0 < port < 2**16:
            raise ValueError(f"port {port} is out of range")
        yield found["host"].strip("[]"), port
