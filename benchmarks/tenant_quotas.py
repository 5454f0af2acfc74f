"""Quotas over four routers, with real processes and a real Redis: one server, a Cluster, a failover of Sentinel.

Three tenants send `REQUESTS` requests to a sim engine over many connections, so that all routers serve each tenant:
one with a limit on tokens, one on requests, one on concurrent requests. In each run the tokens that were granted are
compared with what the buckets hold, and the totals in Redis with those of the clients. Then a router is killed while it
has open reservations.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop

from benchmarks.mesh_process import UpProcess, up
from benchmarks.report import OUT, Report
from muxmesh.client import MeshClient
from muxmesh.client.retries import NO_RETRIES
from muxmesh.errors import MeshError, QuotaExceeded, Unavailable
from muxmesh.redis_connection import RedisClient, open_redis
from muxmesh.tenants.quota_book import QuotaBook
from muxmesh.tenants.tenant_directory import TenantDirectory
from tests.support.redis_servers import Watched, free_ports, running_cluster, running_sentinels, server

NUM_ROUTERS = 4
REQUESTS = 10_000
CLIENTS = 12
"""Connections of each tenant."""
PROMPT_TOKENS, OUTPUT_TOKENS = 5, 20
PER_REQUEST = PROMPT_TOKENS + OUTPUT_TOKENS
TOKENS_PER_MINUTE, REQUESTS_PER_MINUTE, MAX_CONCURRENT = 12_000, 900, 6
TENANTS = {
    "tokens": ("--tokens-per-minute", str(TOKENS_PER_MINUTE)),
    "requests": ("--requests-per-minute", str(REQUESTS_PER_MINUTE)),
    "concurrent": ("--max-concurrent-requests", str(MAX_CONCURRENT)),
}
OWNER_TTL_S = 30.0
FAIL_OVER_AT = 0.4
"""Part of the requests after which the primary is killed."""


@dataclass
class Tally:
    """What the clients of one tenant saw."""

    num_granted: int = 0
    num_tokens: int = 0
    num_refused: int = 0
    num_unavailable: int = 0
    num_running: int = 0
    most_running: int = 0
    others: list[str] = field(default_factory=list)


class QuotaRun:
    """The mesh of one run, and `muxmesh tenant` for it."""

    def __init__(self, mesh: UpProcess, keys: dict[str, str], client: RedisClient, mesh_id: str) -> None:
        self.mesh, self.keys = mesh, keys
        self.directory = TenantDirectory(client, mesh_id, random.SystemRandom())
        self.book = QuotaBook(client, mesh_id)
        self.tallies = {name: Tally() for name in keys}
        self.num_sent = 0

    async def send(self, num_requests: int, on_sent: Callable[[int], Awaitable[None]]) -> float:
        """Sends ``num_requests``, as many of each tenant; returns the seconds that it took."""
        started_s = time.monotonic()
        left = dict.fromkeys(self.keys, num_requests // len(self.keys))

        async def client(name: str) -> None:
            tally = self.tallies[name]
            async with MeshClient(self.mesh.address, api_key=self.keys[name], retries=NO_RETRIES) as one:
                while left[name] > 0:
                    left[name] -= 1
                    self.num_sent += 1
                    await on_sent(self.num_sent)
                    await self._request(one, tally)

        await asyncio.gather(*(client(name) for name in self.keys for _ in range(CLIENTS)))
        return time.monotonic() - started_s

    async def _request(self, client: MeshClient, tally: Tally) -> None:
        tally.num_running += 1
        try:
            output = await client.generate("Hello", max_new_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
        except QuotaExceeded:
            tally.num_refused += 1
        except Unavailable:  # the router was killed, or Redis is away
            tally.num_unavailable += 1
            await asyncio.sleep(0.02)
        except MeshError as error:
            tally.others.append(str(error))
        else:
            tally.num_granted += 1
            tally.num_tokens += PROMPT_TOKENS + len(output.token_ids)
        finally:
            tally.num_running -= 1

    async def usage(self, name: str) -> dict[str, Any]:
        """What `muxmesh tenant usage` shows. No process is started for it: this one has connections of gRPC."""
        record = (await self.directory.read()).records[name]
        return dataclasses.asdict(await self.book.usage(record.tenant))

    async def settled(self, within_s: float) -> tuple[dict[str, dict[str, Any]], float]:
        """The usage of all tenants once nothing is reserved, and the seconds until then."""
        started_s = time.monotonic()
        while True:
            usages = {name: await self.usage(name) for name in self.keys}
            waited_s = time.monotonic() - started_s
            if all(one["open_requests"] == 0 for one in usages.values()) or waited_s > within_s:
                return usages, waited_s
            await asyncio.sleep(0.2)


async def tenant_command(mesh: UpProcess, *arguments: str) -> Any:
    """What `muxmesh tenant` prints with --json."""
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "muxmesh"), "tenant", *arguments, "--state-dir", str(mesh.state_dir),
        "--json", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0, (arguments, out.decode())
    return json.loads(out)


async def add_tenants(mesh: UpProcess, tenants: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Adds tenants with options of `muxmesh tenant add`; returns their API keys, which every router knows then."""
    keys = {name: (await tenant_command(mesh, "add", name, *options))["api_key"] for name, options in tenants.items()}
    await asyncio.sleep(1.5)  # until every router has read the directory
    return keys


@asynccontextmanager
async def quota_run(redis_url: str, name: str) -> AsyncIterator[QuotaRun]:
    """A mesh of four routers on the Redis at ``redis_url``, with the three tenants."""
    model = {"name": "sim", "engine": "sim", "max_num_seqs": 64, "sim": {"base_s": 0.001}}
    config = {
        "mesh_id": name, "routers": NUM_ROUTERS, "redis_url": redis_url,
        "access": {"mode": "keys", "on_redis_loss": "closed"}, "router": {"log_requests": False},
        "units": [{"kv_pool": "64MiB", "slab": "1MiB", "models": [model]}],
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"tenant_quotas_{name}.yaml"
    path.write_text(json.dumps(config))
    async with up("-c", str(path)) as mesh:
        keys = await add_tenants(mesh, TENANTS)
        client = open_redis(redis_url)
        yield QuotaRun(mesh, keys, client, name)
        await client.aclose()


def check(report: Report, run: QuotaRun, usages: dict[str, dict[str, Any]], seconds: float, name: str) -> None:
    """Compares what was granted with the limits, and the totals in Redis with those of the clients."""
    allowed = TOKENS_PER_MINUTE * (1 + seconds / 60)
    tokens, requests = run.tallies["tokens"].num_tokens, run.tallies["requests"].num_granted
    most = REQUESTS_PER_MINUTE * (1 + seconds / 60)
    report.bar(
        f"{name}: tokens beyond the bucket", tokens - allowed, f"<= {PER_REQUEST}", tokens - allowed <= PER_REQUEST
    )
    report.bar(f"{name}: requests beyond the bucket", requests - most, "<= 1", requests - most <= 1)
    for tenant, tally in run.tallies.items():
        used = usages[tenant]["prompt_tokens"] + usages[tenant]["output_tokens"]
        is_same = used == tally.num_tokens and usages[tenant]["open_requests"] == 0
        report.bar(f"{name}: {tenant}: tokens in Redis less those of clients", used - tally.num_tokens, "0", is_same)
        report.figures[f"{name} {tenant}"] = {**vars(tally), "usage": usages[tenant], "seconds": seconds}
        others = len(tally.others)
        report.bar(f"{name}: {tenant}: other errors", others, "0", others == 0)


async def run_steadily(report: Report, redis_url: str, name: str, num_requests: int) -> None:
    """All requests of one run, and what the limits say of them."""

    async def nothing(number: int) -> None:
        pass

    async with quota_run(redis_url, name) as run:
        seconds = await run.send(num_requests, nothing)
        usages, _ = await run.settled(20)
        report.bar(f"{name}: requests sent in {seconds:.0f} s", run.num_sent)
        check(report, run, usages, seconds, name)
        if name == "one":
            await kill_a_router(report, run)


async def kill_a_router(report: Report, run: QuotaRun) -> None:
    """Kills a router that has open reservations of the tenant `concurrent`: they are given back within the TTL."""
    clients = [MeshClient(run.mesh.address, api_key=run.keys["concurrent"], retries=NO_RETRIES) for _ in range(6)]
    streams = [client.stream("Hello", max_new_tokens=3000, ignore_eos=True) for client in clients]
    await asyncio.gather(*(anext(stream) for stream in streams))
    before = (await run.usage("concurrent"))["open_requests"]
    for number in range(2, NUM_ROUTERS + 1):
        os.kill(run.mesh.pid_of(f"--name router-{number}"), signal.SIGKILL)
    os.kill(run.mesh.pid_of("--name router"), signal.SIGKILL)
    usages, seconds = await run.settled(OWNER_TTL_S + 15)
    after = usages["concurrent"]["open_requests"]
    report.bar("killed routers: reservations that they held", before)
    report.bar("killed routers: reservations that are left", after, "0", after == 0)
    most_s = OWNER_TTL_S + 2
    report.bar("killed routers: seconds until all were given back", seconds, f"<= {most_s:g}", seconds <= most_s)
    for stream in streams:
        await stream.aclose()
    for client in clients:
        await client.close()


async def run_through_a_failover(report: Report, watched: Watched, num_requests: int) -> None:
    """The primary is killed on the way. What was granted and is not charged is what the replica lacked."""
    failing: list[asyncio.Task[None]] = []

    async def fail_over(number: int) -> None:
        if number == int(FAIL_OVER_AT * num_requests):
            failing.append(asyncio.create_task(watched.fail_over()))

    async with quota_run(watched.url, "sentinel") as run:
        seconds = await run.send(num_requests, fail_over)
        await asyncio.gather(*failing)
        usages, _ = await run.settled(40)
        tally, usage = run.tallies["tokens"], usages["tokens"]
        excess = tally.num_tokens - TOKENS_PER_MINUTE * (1 + seconds / 60)
        lost = tally.num_tokens - usage["prompt_tokens"] - usage["output_tokens"]
        report.bar("sentinel: requests refused or lost while there was no primary", tally.num_unavailable)
        report.bar("sentinel: tokens granted and not charged (the replica lacked them)", lost)
        report.bar(
            "sentinel: tokens beyond the bucket", excess, "<= those + one request", excess <= max(0, lost) + PER_REQUEST
        )
        left = sum(one["open_requests"] for one in usages.values())
        report.bar("sentinel: reservations left open", left, "0", left == 0)
        report.figures["sentinel"] = {name: {**vars(one), "usage": usages[name]} for name, one in run.tallies.items()}


async def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--kinds", default="one,cluster,sentinel")
    arguments = parser.parse_args()
    report, kinds = Report("tenant_quotas"), arguments.kinds.split(",")
    with TemporaryDirectory(prefix="mm-") as folder:
        if "one" in kinds:
            (port,) = free_ports(1)
            async with server(port, Path(folder) / "one"):
                await run_steadily(report, f"redis://127.0.0.1:{port}", "one", arguments.requests)
        if "cluster" in kinds:
            async with running_cluster(Path(folder) / "cluster") as url:
                await run_steadily(report, url, "cluster", arguments.requests)
        if "sentinel" in kinds:
            (Path(folder) / "sentinel").mkdir()
            async with running_sentinels(Path(folder) / "sentinel") as watched:
                await run_through_a_failover(report, watched, arguments.requests)
    return 0 if report.write() else 1


if __name__ == "__main__":
    raise SystemExit(uvloop.run(main()))
