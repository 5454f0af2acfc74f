"""Redis servers for tests on loopback: a Cluster of three, and a primary with a replica behind three Sentinels."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from muxmesh.supervisor.redis_server import redis_binary

_NUM_SLOTS = 16384
_READY_S = 30
SERVICE = "mesh"


def free_ports(number: int) -> list[int]:
    """Ports that are free now, each with a free port 10000 above it, which a node of a Cluster takes too."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < number:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            second = held.enter_context(socket.socket())
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found


@asynccontextmanager
async def server(port: int, folder: Path, *options: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A redis-server on ``port`` of loopback without persistence; it is ready. ``options``: `--name value`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = (
        redis_binary(), *_first(options), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder),
        "--loglevel", "warning", *_rest(options),
    )  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            async with client_of(port) as client:
                await _until(client.ping)
            yield process
        finally:
            process.kill()


def _first(options: Sequence[str]) -> list[str]:
    """The configuration file of a Sentinel has to be the first argument."""
    return [option for option in options if option.endswith(".conf")]


def _rest(options: Sequence[str]) -> list[str]:
    return [option for option in options if not option.endswith(".conf")] or ["--save", "", "--appendonly", "no"]


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Any]:
    """A client of the one server on ``port``."""
    client = redis.asyncio.Redis(port=port, socket_timeout=5, decode_responses=True)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def running_cluster(folder: Path) -> AsyncIterator[str]:
    """A Cluster of three nodes without replicas; yields its URL."""
    ports = free_ports(3)
    async with AsyncExitStack() as stack:
        clients = []
        for port in ports:
            files = ("--cluster-config-file", f"nodes-{port}.conf.txt", "--save", "", "--appendonly", "no")
            await stack.enter_async_context(server(port, folder, "--cluster-enabled", "yes", *files))
            clients.append(await stack.enter_async_context(client_of(port)))
        for index, client in enumerate(clients):
            first, end = (_NUM_SLOTS * number // len(clients) for number in (index, index + 1))
            await client.execute_command("CLUSTER", "ADDSLOTS", *range(first, end))
            await client.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])

        async def is_whole() -> bool:
            states = [await client.execute_command("CLUSTER", "INFO") for client in clients]
            return all(_is_whole(state, len(clients)) for state in states)

        await _until(is_whole)
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


def _is_whole(state: Any, num_nodes: int) -> bool:
    facts = state if isinstance(state, dict) else dict(line.split(":") for line in str(state).split())
    return facts["cluster_state"] == "ok" and int(facts["cluster_known_nodes"]) == num_nodes


@dataclass
class Watched:
    """A primary and its replica behind Sentinels."""

    url: str
    primary_port: int
    replica_port: int
    primary: subprocess.Popen[bytes]
    _sentinel_port: int

    async def fail_over(self) -> None:
        """Kills the primary; returns when the replica is the primary that Sentinel names."""
        self.primary.kill()
        async with client_of(self._sentinel_port) as sentinel:

            async def is_over() -> bool:
                found = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
                return int(found[1]) == self.replica_port

            await _until(is_over)
        async with client_of(self.replica_port) as client:

            async def is_primary() -> bool:
                return str((await client.info("replication"))["role"]) == "master"

            await _until(is_primary)


@asynccontextmanager
async def running_sentinels(folder: Path) -> AsyncIterator[Watched]:
    """One primary, one replica and three Sentinels, which agree after a second that the primary is down."""
    primary_port, replica_port, *sentinel_ports = free_ports(5)
    async with AsyncExitStack() as stack:
        primary = await stack.enter_async_context(server(primary_port, folder / "primary"))
        of_replica = ("--replicaof", "127.0.0.1", str(primary_port), "--save", "", "--appendonly", "no")
        await stack.enter_async_context(server(replica_port, folder / "replica", *of_replica))
        async with client_of(replica_port) as client:

            async def is_in_sync() -> bool:
                return str((await client.info("replication"))["master_link_status"]) == "up"

            await _until(is_in_sync)
        for port in sentinel_ports:
            path = folder / f"sentinel-{port}.conf"
            path.write_text(
                f"sentinel monitor {SERVICE} 127.0.0.1 {primary_port} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} 1000\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
            )
            await stack.enter_async_context(server(port, folder / f"s{port}", str(path), "--sentinel"))
        async with client_of(sentinel_ports[0]) as client:

            async def is_known() -> bool:
                facts = await client.execute_command("SENTINEL", "MASTER", SERVICE)
                pairs = facts if isinstance(facts, dict) else dict(zip(facts[::2], facts[1::2], strict=True))
                return int(pairs["num-other-sentinels"]) == 2 and int(pairs["num-slaves"]) == 1

            await _until(is_known)
        nodes = ",".join(f"127.0.0.1:{port}" for port in sentinel_ports)
        url = f"redis+sentinel://{nodes}/{SERVICE}"
        yield Watched(url, primary_port, replica_port, primary, sentinel_ports[0])


async def _until(what: Any) -> None:
    async with asyncio.timeout(_READY_S):
        while True:
            with contextlib.suppress(RedisError, OSError, KeyError, ValueError):
                if await what():
                    return
            await asyncio.sleep(0.05)
