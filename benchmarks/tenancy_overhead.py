"""What tenants cost: a mesh with API keys, quotas and fairness beside one without, on a sim engine that takes no time.

(a) 100 requests a second to each in turn: the time inside the router until the first token. (b) Long outputs, 64 at a
time: CPU time of all routers for each relayed token, of the mesh without and with, then of one with one router and one
with two. Two meshes run at a time. The client runs in this process, on the same cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import uvloop

from benchmarks.mesh_process import UpProcess, cpu_s, up
from benchmarks.report import OUT, Report
from benchmarks.tenant_quotas import add_tenants
from loadtest.mesh_target import MeshTarget
from loadtest.session import Options, Session
from loadtest.spec import parse_spec
from muxmesh.clock import SystemClock

RATE, SECONDS, CONCURRENCY = 100, 5, 64
SHORT_ROUNDS = 3
"""Rounds of (a) for each round of (b): short ones, as a machine that stalls for 0.3 s spoils the p99 of a whole one."""
MOST_P50_MS, MOST_P99_MS, MOST_CPU_RATIO = 0.5, 1.5, 1.1
SHORT = f"rate={RATE} burstiness=inf lengths=D(64,4) requests={RATE * SECONDS}"
LONG = "rate=inf lengths=D(64,1000) requests=128"
LIMITS = ("--tokens-per-minute", "2000000000", "--requests-per-minute", "1000000", "--max-concurrent-requests", "10000")
"""High enough for all requests: each is reserved and settled."""
WITHOUT, WITH, TWO = "without", "with", "with, two routers"
KEYS = {"access": {"mode": "keys"}}
CONFIGS: dict[str, dict[str, Any]] = {
    WITHOUT: {"order": {"fairness": False}},
    WITH: KEYS,
    TWO: {**KEYS, "routers": 2},
}


class MeasuredMesh:
    """A mesh, and the key with which it is called."""

    def __init__(self, mesh: UpProcess, api_key: str | None) -> None:
        self._mesh, self._api_key = mesh, api_key

    async def run(self, line: str, max_concurrency: int | None = None) -> dict[str, Any]:
        """The report of one load test."""
        target = MeshTarget(self._mesh.address, None, None, api_key=self._api_key)
        options = Options("muxmesh", "", max_concurrency=max_concurrency, calibrate=0)
        try:
            return await Session(target, options, SystemClock()).run(parse_spec(line))
        finally:
            await target.close()

    async def cpu_us(self) -> float:
        """CPU microseconds of all routers for each output token."""
        routers = [pid for pid, command in self._mesh.pids().items() if "-m router " in command]
        before_s = sum(map(cpu_s, routers))
        report = await self.run(LONG, CONCURRENCY)
        assert report["failed"] == 0
        num_tokens: int = report["total_output_tokens"]
        return 1e6 * (sum(map(cpu_s, routers)) - before_s) / num_tokens


@asynccontextmanager
async def measured(name: str) -> AsyncIterator[MeasuredMesh]:
    """Runs the mesh of this name."""
    model = {"name": "sim", "engine": "sim", "max_num_seqs": 256}
    config = {
        "router": {"log_requests": False}, "units": [{"kv_pool": "1GiB", "models": [model]}], **CONFIGS[name]
    }  # fmt: skip
    path = OUT / f"tenancy_{name.replace(', ', '_').replace(' ', '_')}.yaml"
    path.write_text(json.dumps(config))
    async with up("-c", str(path)) as mesh:
        if "access" not in config:
            yield MeasuredMesh(mesh, None)
            return
        keys = await add_tenants(mesh, {"acme": LIMITS})
        yield MeasuredMesh(mesh, keys["acme"])


@asynccontextmanager
async def two_meshes(*names: str) -> AsyncIterator[dict[str, MeasuredMesh]]:
    """Runs two meshes, warm."""
    async with AsyncExitStack() as stack:
        meshes = {name: await stack.enter_async_context(measured(name)) for name in names}
        for mesh in meshes.values():
            await mesh.run(LONG, CONCURRENCY)
        yield meshes


def in_turn(names: Iterable[str], index: int) -> list[str]:
    """The names, every second time the last one first."""
    return list(names)[:: 1 if index % 2 == 0 else -1]


async def bench(rounds: int) -> int:
    """Measures; exit code 1 if a bar is missed."""
    OUT.mkdir(parents=True, exist_ok=True)
    report = Report("tenancy_overhead")
    times: dict[str, list[tuple[float, float]]] = {WITHOUT: [], WITH: []}
    cpu: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    routers: dict[str, list[float]] = {WITH: [], TWO: []}
    async with two_meshes(*times) as meshes:
        for index in range(rounds):
            for short_index in range(SHORT_ROUNDS):
                for name in in_turn(times, index + short_index):
                    short = await meshes[name].run(SHORT)
                    assert short["failed"] == 0
                    times[name].append((short["median_router_ms"], short["p99_router_ms"]))
            for name in in_turn(cpu, index):
                cpu[name].append(await meshes[name].cpu_us())
    async with two_meshes(*routers) as meshes:
        for index in range(rounds):
            for name in in_turn(routers, index):
                routers[name].append(await meshes[name].cpu_us())
    report.figures = {"router_ms_p50_p99": times, "cpu_us": cpu, "cpu_us_of_one_and_two_routers": routers}
    for index, (what, most) in enumerate((("p50", MOST_P50_MS), ("p99", MOST_P99_MS))):
        medians = {name: statistics.median(one[index] for one in found) for name, found in times.items()}
        for name, value in medians.items():
            report.bar(f"time inside the router, {what}, {name} (ms)", value)
        added = medians[WITH] - medians[WITHOUT]
        report.bar(f"time inside the router, {what}, added (ms)", added, f"at most {most}", added <= most)
    for name, values in cpu.items():
        report.bar(f"router CPU for each token, {name} (us)", statistics.median(values))
    ratio = statistics.median(two / one for two, one in zip(routers[TWO], routers[WITH], strict=True))
    is_small = ratio <= MOST_CPU_RATIO
    report.bar("router CPU for each token, two routers over one", ratio, f"at most {MOST_CPU_RATIO}", is_small)
    return 0 if report.write() else 1


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    return uvloop.run(bench(parser.parse_args().rounds))


if __name__ == "__main__":
    raise SystemExit(main())
