"""CPU time of a decode worker of the default model, against its `compute_share`, on all cores of the machine.

For each share: a mesh whose decode worker has it, with more requests than it can serve; the worker's CPU time by
/proc, over the time of a window, over the cores. It may be at most the share and 5 %.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from benchmarks.mesh_process import UpProcess, cpu_s, up
from benchmarks.report import Report
from muxmesh.config.schema import DEFAULT_MODEL

SHARES = tuple(map(int, sys.argv[1:])) or (25, 50, 75, 100)
WINDOW_S = 5.0
NUM_WINDOWS = 3
NUM_REQUESTS = 8
MOST_ABOVE = 0.05


async def _keep_busy(mesh: UpProcess, number: int) -> None:
    while True:
        async for _ in mesh.client.stream(
            f"Count from {number}.", model=DEFAULT_MODEL, max_new_tokens=400, ignore_eos=True
        ):
            pass


async def measure(share: int) -> list[float]:
    """The parts of the machine's CPU time that the decode worker used, one for each window."""
    model = {"name": DEFAULT_MODEL, "max_num_seqs": NUM_REQUESTS, "compute_share": {"decode": share}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mesh.yaml"
        path.write_text(yaml.safe_dump({"units": [{"models": [model]}]}))
        async with up("-c", str(path)) as mesh:
            load = [asyncio.create_task(_keep_busy(mesh, number)) for number in range(NUM_REQUESTS)]
            await asyncio.sleep(3)  # the prompts
            pid, cores = mesh.pid_of("decode_svc"), len(os.sched_getaffinity(0))
            parts = []
            for _ in range(NUM_WINDOWS):
                started_s, used_s = time.monotonic(), cpu_s(pid)
                await asyncio.sleep(WINDOW_S)
                parts.append((cpu_s(pid) - used_s) / (time.monotonic() - started_s) / cores)
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)
            return parts


def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    report = Report("shares")
    for share in SHARES:
        parts = report.figures[str(share)] = asyncio.run(measure(share))
        worst, limit = max(parts), share / 100 + MOST_ABOVE
        print(f"share {share} %: {', '.join(f'{100 * part:.1f} %' for part in parts)}")
        report.bar(f"CPU time at a share of {share} %, worst window", worst, f"<= {limit:.2f}", worst <= limit)
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
