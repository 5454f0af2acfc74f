"""Every kind of process stopped (SIGSTOP) under 20 streams: lost or changed tokens, and the time until all serve again.

Half of the streams begin before the stop and half after it. A stopped router ends its streams with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.mesh_process import UpProcess, up
from benchmarks.report import Report
from muxmesh.client import MeshClient
from muxmesh.errors import MeshError, Unavailable

CONFIG = """
units:
  - models:
      - {name: m, engine: sim, max_num_seqs: 32, sim: {base_s: 0.02, per_token_s: 0.001}}
"""
KINDS = {"redis": "redis-server", "kvstore": "-m kvstore", "prefill": "-m prefill_svc", "decode": "-m decode_svc",
         "router": "-m router"}  # fmt: skip
"""A part of the command line of each kind."""
NUM_STREAMS = 20
NEW_TOKENS = 120
BAR_S = 15.0
GIVE_UP_S = 60.0


@dataclass
class Stream:
    """What arrived of one request."""

    tokens: list[int]
    error: MeshError | None = None


async def read(client: MeshClient, seed: int, into: Stream) -> None:
    """Reads one sampled stream to its end or its error."""
    try:
        prompt = f"Tell me a story about the number {seed}."
        async for delta in client.stream(prompt, seed=seed, temperature=1.0, max_new_tokens=NEW_TOKENS):
            into.tokens += delta.token_ids
    except MeshError as error:
        into.error = error


async def serves(mesh: UpProcess, killed: int) -> bool:
    """True if the stopped process is gone, and every process of the mesh serves."""
    if Path(f"/proc/{killed}").exists():
        return False
    try:
        status = await mesh.client.status(timeout_s=1.0)
    except MeshError:
        return False
    return status.redis_connected and all(
        unit.connected and len(unit.workers) == 2 and all(worker.ready for worker in unit.workers)
        for unit in status.units
    )


async def stop_one(mesh: UpProcess, kind: str) -> tuple[list[Stream], float, float]:
    """Stops one process. Returns the streams, and the seconds until it was killed and until all processes serve."""
    streams = [Stream([]) for _ in range(NUM_STREAMS)]
    early, late = streams[: NUM_STREAMS // 2], streams[NUM_STREAMS // 2 :]
    reading = [asyncio.create_task(read(mesh.client, seed, one)) for seed, one in enumerate(early)]
    while not all(len(one.tokens) >= 5 for one in early):
        await asyncio.sleep(0.01)
    pid = mesh.pid_of(KINDS[kind])
    os.kill(pid, signal.SIGSTOP)
    stopped_at_s = time.monotonic()
    reading += [asyncio.create_task(read(mesh.client, len(early) + n, one)) for n, one in enumerate(late)]
    while Path(f"/proc/{pid}").exists() and time.monotonic() - stopped_at_s < GIVE_UP_S:
        await asyncio.sleep(0.02)
    killed_s = time.monotonic() - stopped_at_s
    while not await serves(mesh, pid) and time.monotonic() - stopped_at_s < GIVE_UP_S:
        await asyncio.sleep(0.05)
    serves_s = time.monotonic() - stopped_at_s
    await asyncio.gather(*reading)
    return streams, killed_s, serves_s


async def restarts(mesh: UpProcess, kind: str) -> int:
    """Restarts of the process of this kind, as the mesh reports them. Redis reports no process of its own."""
    status = await mesh.client.status(timeout_s=10.0)
    return sum(process.num_restarts for process in status.processes if process.name.startswith(kind))


async def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    report = Report("stopped")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mesh.yaml").write_text(CONFIG)
        async with up("-c", f"{folder}/mesh.yaml") as mesh:
            expected = [Stream([]) for _ in range(NUM_STREAMS)]
            await asyncio.gather(*(read(mesh.client, seed, one) for seed, one in enumerate(expected)))
            for kind in KINDS:
                streams, killed_s, serves_s = await stop_one(mesh, kind)
                _add_bars(report, kind, streams, expected, serves_s)
                report.figures[kind] = {"killed_s": killed_s, "serves_s": serves_s}
                print(f"{kind}: killed after {killed_s:.1f} s, all serve after {serves_s:.1f} s", flush=True)
                if kind != "redis":
                    num_restarts = await restarts(mesh, kind)
                    report.bar(f"{kind}: restarts reported", num_restarts, "at least 1", num_restarts >= 1)
            (unit,) = (await mesh.client.status()).units  # the unit checks the integrity of the pool for it
    report.bar("bytes leased at the end", unit.pool.leased_bytes, "0", unit.pool.leased_bytes == 0)
    return 0 if report.write() else 1


def _add_bars(report: Report, kind: str, streams: list[Stream], expected: list[Stream], serves_s: float) -> None:
    complete = sum(
        one.error is None and one.tokens == right.tokens for one, right in zip(streams, expected, strict=True)
    )
    if kind == "router":
        refused = sum(
            isinstance(one.error, Unavailable) and one.tokens == right.tokens[: len(one.tokens)]
            for one, right in zip(streams, expected, strict=True)
        )
        ok = complete + refused == NUM_STREAMS
        report.bar("router: streams complete, or UNAVAILABLE after right tokens", complete + refused, "all 20", ok)
    else:
        report.bar(f"{kind}: streams complete with the right tokens", complete, "all 20", complete == NUM_STREAMS)
    report.bar(f"{kind}: all processes serve again, s", serves_s, f"at most {BAR_S:.0f}", serves_s <= BAR_S)
    for error in {str(one.error) for one in streams if one.error is not None}:
        print(f"{kind}: {error}")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
