"""The control plane alone: a mesh whose sim engine takes no time.

(a) 100 requests a second: the time inside the router until the first token. (b) 64 long outputs at a time, one token a
message: CPU time of the router's process for each relayed message, in alternation with that of a relay without any
logic (`benchmarks.raw_relay`). The same for 16 outputs at a time, where fewer messages share a wake-up. The client runs
in this process, on the same cores.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import uvloop

from benchmarks.mesh_process import UpProcess, cpu_s, up
from benchmarks.raw_relay import NUM_TOKENS
from benchmarks.report import OUT, Report
from loadtest.html import page
from loadtest.mesh_target import MeshTarget
from loadtest.report import bottleneck
from loadtest.session import Options, Session
from loadtest.spec import parse_spec
from muxmesh.clock import SystemClock
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.v1 import inference_pb2, inference_pb2_grpc

RATE = 100
MOST_P50_MS, MOST_P99_MS, MOST_CPU_US = 3.0, 15.0, 110.0
CONFIG = {"units": [{"kv_pool": "1GiB", "models": [{"name": "sim", "engine": "sim", "max_num_seqs": 256}]}]}
REQUESTS = f"rate={RATE} burstiness=inf lengths=D(64,4) requests=3000"
LONG = f"rate=inf lengths=D(64,{NUM_TOKENS}) requests=128"
CONCURRENCY, FEWER = 64, 16
ROUNDS = 5


async def run(mesh: UpProcess, line: str, max_concurrency: int | None = None) -> dict[str, Any]:
    """The report of one load test."""
    target = MeshTarget(mesh.address, None, None)
    options = Options("muxmesh", "", max_concurrency=max_concurrency, calibrate=0)
    try:
        return await Session(target, options, SystemClock()).run(parse_spec(line))
    finally:
        await target.close()


async def router_cpu_us(mesh: UpProcess, concurrency: int) -> float:
    """CPU microseconds of the router for each message of long outputs."""
    router = mesh.pid_of("-m router")
    before_s = cpu_s(router)
    report = await run(mesh, LONG, concurrency)
    assert report["failed"] == 0
    num_messages: int = report["total_output_tokens"]
    return 1e6 * (cpu_s(router) - before_s) / num_messages


@asynccontextmanager
async def raw_relay(folder: Path) -> AsyncIterator[tuple[int, str]]:
    """Runs a source and a relay; yields process id and address of the relay."""
    addresses = [f"unix:{folder}/source.sock", free_listen_address("127.0.0.1:0")]
    processes = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.raw_relay", role, address, addresses[0]])
        for role, address in zip(("source", "relay"), addresses, strict=True)
    ]
    try:
        async with grpc.aio.insecure_channel(addresses[1]) as channel:
            await asyncio.wait_for(channel.channel_ready(), 30)
        yield processes[1].pid, addresses[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def relay_cpu_us(pid: int, address: str, concurrency: int) -> float:
    """CPU microseconds of the raw relay for each message."""

    async def one(stub: inference_pb2_grpc.InferenceAsyncStub) -> int:
        return len([None async for _ in stub.GenerateStream(inference_pb2.GenerateRequest())])

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        await one(stub)
        before_s = cpu_s(pid)
        counts = [
            sum(await asyncio.gather(*(one(stub) for _ in range(concurrency)))) for _ in range(128 // concurrency)
        ]
        return 1e6 * (cpu_s(pid) - before_s) / sum(counts)


async def bench() -> int:
    """Measures; exit code 1 if a bar is missed."""
    OUT.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        path = Path(folder, "mesh.yaml")
        path.write_text(json.dumps(CONFIG))
        async with up("-c", str(path)) as mesh, raw_relay(Path(folder)) as (pid, address):
            await run(mesh, LONG, CONCURRENCY)
            short = await run(mesh, REQUESTS)
            rounds: dict[int, list[tuple[float, float]]] = {CONCURRENCY: [], FEWER: []}
            for _ in range(ROUNDS):
                for concurrency, pairs in rounds.items():
                    ours = await router_cpu_us(mesh, concurrency)
                    pairs.append((ours, await relay_cpu_us(pid, address, concurrency)))
    (OUT / "router.html").write_text(page(json.loads(json.dumps([short]))))
    report = Report("router")
    report.figures = {
        "requests": {key: value for key, value in short.items() if key not in ("requests", "series")},
        "cpu_us_of_router_and_raw_relay": rounds,
    }
    p50, p99 = short["median_router_ms"], short["p99_router_ms"]
    done = short["request_throughput"]
    if slow := bottleneck(short):
        print(f"NOT RELIABLE: {slow}")
    report.bar("requests/s that were answered", done, f"{RATE} were sent", done > 0.97 * RATE and not short["failed"])
    report.bar("time inside the router, p50 (ms)", p50, f"at most {MOST_P50_MS}", p50 <= MOST_P50_MS)
    report.bar("time inside the router, p99 (ms)", p99, f"at most {MOST_P99_MS}", p99 <= MOST_P99_MS)
    report.bar("whole TTFT at the client, p50 (ms)", short["median_ttft_ms"])
    report.bar("whole TTFT at the client, p99 (ms)", short["p99_ttft_ms"])
    for concurrency, pairs in rounds.items():
        cpu_us = statistics.median(router for router, _ in pairs)
        ratio = statistics.median(router / raw for router, raw in pairs)
        required = (f"at most {MOST_CPU_US}", cpu_us <= MOST_CPU_US) if concurrency == CONCURRENCY else ()
        report.bar(f"router CPU for each relayed message, {concurrency} at a time (us)", cpu_us, *required)
        report.bar("the same, over a relay with nothing in it", ratio)
    report.bar("the driver's own share of a core", short["driver"]["cpu_share"], "not the bottleneck", not slow)
    return 0 if report.write() else 1


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(bench()))
