"""Start-up time with a warm cache, memory of the weights, and CPU of an idle mesh."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import Any

from benchmarks.mesh_process import UpProcess, anonymous_bytes, cpu_s, mapped_bytes, up
from benchmarks.report import Report
from muxmesh.client import Message

NUM_STARTS = 3
IDLE_S = 40.0
_IMAGE, _POOL = "-panels-v", "memfd:muxmesh-kv-pool"


async def first_token_s(mesh: UpProcess) -> float:
    """Seconds from the start of `muxmesh up` to the first streamed token."""
    async for _ in mesh.client.stream([Message("user", "What is the capital of France?")], temperature=0):
        return time.monotonic() - mesh.started_at_s
    raise AssertionError("a stream has at least one message")


async def idle_percent(mesh: UpProcess) -> dict[str, float]:
    """CPU of each process over IDLE_S, in percent of one core."""
    pids = mesh.pids()
    before = {pid: cpu_s(pid) for pid in pids}
    await asyncio.sleep(IDLE_S)
    return {f"{_short(command)} {pid}": (cpu_s(pid) - before[pid]) / IDLE_S * 100 for pid, command in pids.items()}


def weights(mesh: UpProcess) -> dict[str, dict[str, Any]]:
    """Resident and proportional bytes of the weight image and of the pool in each worker, and its anonymous bytes."""
    found: dict[str, dict[str, Any]] = {}
    for role in ("prefill_svc", "decode_svc"):
        pid = mesh.pid_of(f"-m {role}")
        found[role] = {
            name: dict(zip(("rss", "pss"), mapped_bytes(pid, what), strict=True))
            for name, what in (("image", _IMAGE), ("pool", _POOL))
        }
        found[role]["anonymous"] = anonymous_bytes(pid)
    return found


def _short(command: str) -> str:
    return (
        command.rsplit(" -m ", maxsplit=1)[-1].split(maxsplit=1)[0]
        if " -m " in command
        else command.split(maxsplit=1)[0].rsplit("/", maxsplit=1)[-1]
    )


async def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    report = Report("start")
    async with up():  # fills the caches: model, kernels, pages
        pass
    seconds, ready = [], []
    for _ in range(NUM_STARTS):
        async with up() as mesh:
            seconds.append(await first_token_s(mesh))
            ready.append(mesh.ready_at_s - mesh.started_at_s)
    async with up() as mesh:
        await first_token_s(mesh)
        await mesh.client.generate("Warm " * 200, max_new_tokens=8)
        memory = weights(mesh)
        idle = await idle_percent(mesh)
    image_rss = max(worker["image"]["rss"] for worker in memory.values())
    image_pss = sum(worker["image"]["pss"] for worker in memory.values())
    report.figures = {"first_token_s": seconds, "ready_s": ready, "memory": memory, "idle_percent": idle}
    for name, percent in idle.items():
        print(f"{name:40} {percent:6.3f} % of a core, idle")
    for role, parts in memory.items():
        print(
            f"{role}: image rss {parts['image']['rss'] / 1e6:.0f} MB, pss {parts['image']['pss'] / 1e6:.0f} MB, "
            f"own memory {parts['anonymous'] / 1e6:.0f} MB"
        )
    median_s = statistics.median(seconds)
    report.bar("start to first token, median s", median_s, "at most 10", median_s <= 10)
    report.bar("start to first token, worst s", max(seconds), "at most 10", max(seconds) <= 10)
    report.bar("copies of the weights (sum of PSS / RSS)", image_pss / image_rss, "1", image_pss / image_rss < 1.05)
    own = max(worker["anonymous"] for worker in memory.values())
    report.bar("largest private memory of a worker / image", own / image_rss, "under 0.6", own / image_rss < 0.6)
    report.bar("idle mesh, % of one core", sum(idle.values()), "under 2", sum(idle.values()) < 2)
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
