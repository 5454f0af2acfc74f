"""The control plane alone: a mesh whose sim engine takes no time, so what is left is the mesh's own.

(a) 100 requests a second: the time inside the router until the first token. (b) Long answers, one token a message: CPU
of the router's process for each message that it relays. The driver runs in this process, on the same cores.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop

from benchmarks.mesh_process import UpProcess, cpu_s, up
from benchmarks.report import OUT, Report
from loadtest.html import page
from loadtest.mesh_target import MeshTarget
from loadtest.session import Options, Session
from loadtest.spec import parse_spec
from muxmesh.clock import SystemClock

RATE = 100
MOST_P50_MS, MOST_P99_MS, MOST_CPU_US = 3.0, 15.0, 110.0
CONFIG = {"units": [{"kv_pool": "1GiB", "models": [{"name": "sim", "engine": "sim", "max_num_seqs": 256}]}]}
REQUESTS = f"rate={RATE} burstiness=inf lengths=D(64,4) requests=3000"
LONG = "rate=4 burstiness=inf lengths=D(64,500) requests=60"


async def run(mesh: UpProcess, line: str) -> dict[str, Any]:
    """The report of one run."""
    target = MeshTarget(mesh.address, None, None)
    try:
        return await Session(target, Options("muxmesh", "", calibrate=3), SystemClock()).run(parse_spec(line))
    finally:
        await target.close()


async def bench() -> int:
    """Both halves; exit code 1 if a bar is missed."""
    OUT.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        path = Path(folder, "mesh.yaml")
        path.write_text(json.dumps(CONFIG))
        async with up("-c", str(path)) as mesh:
            router = mesh.pid_of("-m router")
            short = await run(mesh, REQUESTS)
            before_s = cpu_s(router)
            long = await run(mesh, LONG)
            router_cpu_s = cpu_s(router) - before_s
    messages = sum(1 for count in long["requests"]["num_output"] for _ in range(count))
    cpu_us = 1e6 * router_cpu_s / messages
    (OUT / "router.html").write_text(page(json.loads(json.dumps([short]))))
    report = Report("router")
    report.figures = {
        name: {key: value for key, value in one.items() if key not in ("requests", "series")}
        for name, one in (("requests", short), ("long answers", long))
    }
    p50, p99 = short["median_router_ms"], short["p99_router_ms"]
    done, wanted = short["request_throughput"], 0.97 * RATE
    report.bar("requests/s that were answered", done, f"{RATE} were sent", done > wanted)
    report.bar("time inside the router, p50 (ms)", p50, f"at most {MOST_P50_MS}", p50 <= MOST_P50_MS)
    report.bar("time inside the router, p99 (ms)", p99, f"at most {MOST_P99_MS}", p99 <= MOST_P99_MS)
    report.bar("whole TTFT at the client, p50 (ms)", short["median_ttft_ms"], "printed", True)
    report.bar("whole TTFT at the client, p99 (ms)", short["p99_ttft_ms"], "printed", True)
    report.bar("router CPU for each relayed message (us)", cpu_us, f"at most {MOST_CPU_US}", cpu_us <= MOST_CPU_US)
    report.bar("the driver's own share of a core", short["driver"]["cpu_share"], "below 0.9", True)
    return 0 if report.write() else 1


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(bench()))
