"""Fairness between tenants on a real mesh with API keys and two routers: `python -m benchmarks.fairness_mesh`.

One sim model with 16 slots and steps of 20 ms. Two tenants keep their queues full for a minute, each by clients that
send their next request as soon as one has ended. Counted at the clients: Jain's index of the output tokens by weight,
and how far the services are apart. In the middle a small request of a third tenant comes, three times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import uvloop

from benchmarks.mesh_process import UpProcess, up
from benchmarks.report import OUT, Report
from benchmarks.tenant_quotas import add_tenants
from muxmesh.client import MeshClient
from muxmesh.client.retries import NO_RETRIES
from muxmesh.fairness import Fairness

SLOTS, STEP_S, PROMPT = 16, 0.02, "Hello"
WARM_UP_S, SMALL_TOKENS, NUM_SMALL = 8.0, 20, 3
SMALL = "small"


@dataclass(frozen=True)
class Load:
    """``number`` requests of a tenant are open all the time, each with ``outputs`` of ``num_output`` tokens."""

    tenant: str
    number: int
    num_output: int
    outputs: int = 1
    priority: int = 0
    weight: float = 1.0


LOADS: Mapping[str, tuple[Load, Load]] = {
    "10 times as many requests": (Load("a", 240, 50), Load("b", 24, 120)),
    "flood of the best class": (Load("a", 120, 50, priority=-5), Load("b", 24, 100)),
    "64 outputs for each request": (Load("a", 4, 100, outputs=64), Load("b", 24, 50)),
    "short against long outputs": (Load("a", 120, 20), Load("b", 24, 500)),
    "weights of 2 and 1": (Load("a", 60, 50, weight=2.0), Load("b", 60, 50)),
}


class Served:
    """Output tokens of each tenant that have reached its clients."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()

    async def keep_sending(self, client: MeshClient, load: Load) -> None:
        """One request after another."""
        while True:
            stream = client.stream(
                PROMPT, max_new_tokens=load.num_output, ignore_eos=True, priority=load.priority,
                num_sequences=load.outputs,
            )  # fmt: skip
            async for delta in stream:
                self.tokens[load.tenant] += len(delta.token_ids)


async def first_token_s(client: MeshClient) -> float:
    """Seconds until the first token of a small request, which is read to its end."""
    begun_s, first_s = time.monotonic(), 0.0
    async for delta in client.stream(PROMPT, max_new_tokens=SMALL_TOKENS, ignore_eos=True):
        if delta.token_ids and not first_s:
            first_s = time.monotonic() - begun_s
    return first_s


@contextlib.asynccontextmanager
async def mesh_with_tenants(loads: tuple[Load, Load]) -> AsyncIterator[tuple[UpProcess, dict[str, str]]]:
    """The mesh, and the API keys of the tenants of ``loads`` and of the small requests."""
    model = {"name": "sim", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S}}
    config = {
        "access": {"mode": "keys"}, "routers": 2, "router": {"log_requests": False},
        "units": [{"kv_pool": "1GiB", "models": [model]}],
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "fairness_mesh.yaml"
    path.write_text(json.dumps(config))
    async with up("-c", str(path)) as mesh:
        weights = {SMALL: 1.0, **{load.tenant: load.weight for load in loads}}
        yield mesh, await add_tenants(mesh, {name: ("--weight", str(weight)) for name, weight in weights.items()})


async def measure(report: Report, name: str, loads: tuple[Load, Load], seconds: float) -> None:
    """Runs one row and adds its bars."""
    served, apart_s, starts_s = Served(), 0.0, list[float]()
    async with mesh_with_tenants(loads) as (mesh, keys), contextlib.AsyncExitStack() as stack:
        clients = {
            tenant: await stack.enter_async_context(MeshClient(mesh.address, api_key=key, retries=NO_RETRIES))
            for tenant, key in keys.items()
        }
        idle_s = statistics.median([await first_token_s(clients[SMALL]) for _ in range(5)])
        tasks = [
            asyncio.create_task(served.keep_sending(clients[load.tenant], load))
            for load in loads
            for _ in range(load.number)
        ]
        await asyncio.sleep(WARM_UP_S)
        before, begun_s = served.tokens.copy(), time.monotonic()
        small = asyncio.create_task(_small_requests(clients[SMALL], seconds / (NUM_SMALL + 1), starts_s))
        shares: dict[str, float] = {}
        while time.monotonic() < begun_s + seconds:
            await asyncio.sleep(0.5)
            shares = {one.tenant: (served.tokens[one.tenant] - before[one.tenant]) / one.weight for one in loads}
            apart_s = max(apart_s, (max(shares.values()) - min(shares.values())) * STEP_S / SLOTS)
        await small
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    report.bar(f"{name}: requests that failed", len(ended), "0", not ended)
    squares = sum(value**2 for value in shares.values())
    jain = sum(shares.values()) ** 2 / (len(shares) * squares) if squares else 0.0
    report.bar(f"{name}: Jain index", jain, ">= 0.99", jain >= 0.99)
    bound_s = 1.5 * Fairness().band_s + max(load.num_output for load in loads) * STEP_S
    report.bar(f"{name}: services apart, s of the device", apart_s, f"<= {bound_s:g}", apart_s <= bound_s)
    steps = [(start_s - idle_s) / STEP_S for start_s in starts_s]
    median_steps = statistics.median(steps)
    report.bar(f"{name}: steps that a small request waits, median", median_steps, "<= 2", median_steps <= 2)
    report.bar(f"{name}: the same, most", max(steps))
    report.figures[name] = {"tokens": dict(served.tokens), "starts_s": starts_s, "idle_s": idle_s}


async def _small_requests(client: MeshClient, every_s: float, starts_s: list[float]) -> None:
    for _ in range(NUM_SMALL):
        await asyncio.sleep(every_s)
        starts_s.append(await first_token_s(client))


async def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each row; default %(default)s")
    parser.add_argument("--only", metavar="ROW", choices=LOADS, help="one row; default: all")
    arguments = parser.parse_args()
    report = Report("fairness_mesh")
    for name, loads in LOADS.items():
        if arguments.only in (None, name):
            await measure(report, name, loads, arguments.seconds)
    return 0 if report.write() else 1


if __name__ == "__main__":
    raise SystemExit(uvloop.run(main()))
