"""Workers killed at random times under load, on the real model: lost or changed tokens, and memory not freed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import time

from benchmarks.mesh_process import UpProcess, up
from benchmarks.report import Report
from muxmesh.client import Completion, Message

NUM_REQUESTS = 8
ROUNDS = 6
NEW_TOKENS = 80
GIVE_UP_S = 30.0


async def outputs(mesh: UpProcess) -> list[Completion]:
    """Sampled outputs of different prompts, all at once."""
    return await asyncio.gather(
        *(
            mesh.client.generate(
                [Message("user", f"Tell me a story about the number {number}. " * 8)],
                max_new_tokens=NEW_TOKENS,
                temperature=0.8,
                seed=number,
                ignore_eos=True,
                bypass_prefix_cache=True,
            )
            for number in range(NUM_REQUESTS)
        )
    )


async def seconds_until_back(mesh: UpProcess, pid: int) -> float:
    """Seconds until the unit has removed the process: its leases have ended, their blocks are free or cached."""
    started_at_s = time.monotonic()
    while time.monotonic() - started_at_s < GIVE_UP_S:
        (unit,) = (await mesh.client.status()).units
        if all(worker.pid != pid for worker in unit.workers):
            return time.monotonic() - started_at_s
        await asyncio.sleep(0.01)
    return GIVE_UP_S


async def one_round(
    mesh: UpProcess, rng: random.Random, role: str, number: signal.Signals
) -> tuple[list[Completion], float]:
    """Sends a signal to one worker at a random time of the load."""
    running = asyncio.create_task(outputs(mesh))
    await asyncio.sleep(rng.uniform(0.1, 4.0))
    pid = mesh.pid_of(f"-m {role}_svc")
    os.kill(pid, number)
    back_s = await seconds_until_back(mesh, pid)
    return await running, back_s


async def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    report, rng = Report("faults"), random.Random(5)
    back_s: dict[str, list[float]] = {}
    num_same = num_outputs = num_restarts = 0
    slower: list[float] = []
    async with up() as mesh:
        await outputs(mesh)
        expected = await outputs(mesh)
        faults = [(role, signal.SIGKILL) for role in ("decode", "prefill")] * (ROUNDS // 2)
        for role, number in [*faults, ("decode", signal.SIGSTOP)]:
            got, seconds = await one_round(mesh, rng, role, number)
            back_s.setdefault(number.name, []).append(seconds)
            num_same += sum(a.token_ids == b.token_ids for a, b in zip(got, expected, strict=True))
            num_outputs += len(got)
            num_restarts += sum(one.timings.num_restarts for one in got)
            slower.append(max(a.timings.e2e_s for a in got) - max(a.timings.e2e_s for a in expected))
            print(
                f"{number.name} to {role}: blocks freed after {seconds:.2f} s, load {slower[-1]:.1f} s longer",
                flush=True,
            )
        (unit,) = (await mesh.client.status()).units  # the unit checks the integrity of the pool for it
    report.figures = {"back_s": back_s, "seconds_longer": slower, "num_restarts": num_restarts}
    report.bar(
        "answers with the tokens of the undisturbed run", num_same, f"all {num_outputs}", num_same == num_outputs
    )
    worst = max(back_s["SIGKILL"])
    report.bar("blocks back after kill -9, worst s", worst, "at most 5", worst <= 5)
    report.bar("blocks back after SIGSTOP, worst s", max(back_s["SIGSTOP"]), "-", True)
    report.bar("load longer by, median s", statistics.median(slower), "-", True)
    report.bar("bytes leased at the end", unit.pool.leased_bytes, "0", unit.pool.leased_bytes == 0)
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
