"""How soon an aborted request has released its memory, on the real model: seconds until the unit holds no lease."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.mesh_process import UpProcess, up
from benchmarks.report import Report
from muxmesh.client import Message
from muxmesh.errors import DeadlineExceeded, Unavailable

LONG: dict[str, Any] = {"max_new_tokens": 1000, "ignore_eos": True, "temperature": 0.7, "bypass_prefix_cache": True}
LONG_PROMPT = "Tell me everything you know about the sea. " * 60
NUM_RANDOM = 1000
ROUNDS = 5
GIVE_UP_S = 20.0


async def num_leased(mesh: UpProcess) -> int:
    """Leases, credits and queued requests of the unit."""
    (unit,) = (await mesh.client.status()).units
    if not unit.connected:
        raise Unavailable("the router is not connected to the unit")
    return sum(model.num_leases + model.num_credits + model.num_queued_requests for model in unit.models)


async def seconds_until_free(mesh: UpProcess) -> float:
    """Seconds from now until nothing is leased; infinite if that takes more than GIVE_UP_S."""
    started_at_s = time.monotonic()
    while await num_leased(mesh):
        if time.monotonic() - started_at_s > GIVE_UP_S:
            return math.inf
        await asyncio.sleep(0.005)
    return time.monotonic() - started_at_s


async def cancel_in_decode(mesh: UpProcess) -> float:
    """The client cancels during decode, after some tokens."""
    stream = mesh.client.stream("Once upon a time", **LONG)
    for _ in range(5):
        await anext(stream)
    await stream.aclose()
    return await seconds_until_free(mesh)


async def cancel_in_prefill(mesh: UpProcess) -> float:
    """The client cancels during prefill."""
    task = asyncio.create_task(mesh.client.generate(LONG_PROMPT, **LONG))
    while not await num_leased(mesh):
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return await seconds_until_free(mesh)


async def deadline(mesh: UpProcess) -> float:
    """The deadline passes during decode."""
    try:
        await mesh.client.generate("Once upon a time", timeout_s=0.8, **LONG)
    except DeadlineExceeded:
        return await seconds_until_free(mesh)
    raise AssertionError("the deadline did not pass")


async def killed_client(mesh: UpProcess) -> float:
    """The client's process is killed during decode."""
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", "generate", "--address", mesh.address, "--max-new-tokens", "1000",
        "Once upon a time", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert client.stdout is not None
    await client.stdout.read(4)
    client.kill()
    await client.wait()
    return await seconds_until_free(mesh)


async def random_cancels(mesh: UpProcess) -> int:
    """Cancels NUM_RANDOM requests at random times, 20 at a time; returns the number of leases a second later."""
    rng = random.Random(7)

    async def one() -> None:
        prompt = "Hello " * rng.randint(1, 80)
        task = asyncio.create_task(mesh.client.generate(prompt, **LONG))
        await asyncio.sleep(rng.random() * 1.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for _ in range(NUM_RANDOM // 20):
        await asyncio.gather(*(one() for _ in range(20)))
    await asyncio.sleep(1.0)
    return await num_leased(mesh)


async def killed_decode_worker(mesh: UpProcess, temperature: float) -> tuple[bool, float]:
    """Kills the decode worker with SIGKILL during the output.

    Returns whether the text is that of an undisturbed run, and the longest gap between messages in seconds.
    """
    options: dict[str, Any] = {"temperature": temperature, "seed": 5, "max_new_tokens": 80, "ignore_eos": True}
    prompt = [Message("user", "Tell me a story about a fox.")]
    expected = await mesh.client.generate(prompt, **options)
    text, longest_gap_s, last_at_s = "", 0.0, time.monotonic()
    killed, num_restarts = False, 0
    async for delta in mesh.client.stream(prompt, **options):
        text += delta.text
        longest_gap_s = max(longest_gap_s, time.monotonic() - last_at_s)
        last_at_s = time.monotonic()
        if len(text) > 40 and not killed:
            os.kill(mesh.pid_of("-m decode_svc"), signal.SIGKILL)
            killed = True
        if delta.timings:
            num_restarts = delta.timings.num_restarts
    return text == expected.text and num_restarts >= 1, longest_gap_s


async def killed_router(mesh: UpProcess) -> float:
    """Seconds from SIGKILL to the router until its successor reports that nothing is leased."""
    stream = mesh.client.stream("Once upon a time", **LONG)
    await anext(stream)
    started_at_s = time.monotonic()
    os.kill(mesh.pid_of("-m router"), signal.SIGKILL)
    await asyncio.gather(stream.aclose(), return_exceptions=True)
    while time.monotonic() - started_at_s < GIVE_UP_S:
        try:
            if await num_leased(mesh) == 0:
                return time.monotonic() - started_at_s
        except (Unavailable, DeadlineExceeded):
            pass
        await asyncio.sleep(0.01)
    return math.inf


async def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    report = Report("abort")
    cases: dict[str, Callable[[UpProcess], Awaitable[float]]] = {
        "cancel in decode": cancel_in_decode,
        "cancel in prefill": cancel_in_prefill,
        "deadline passed": deadline,
        "client killed": killed_client,
    }
    async with up() as mesh:
        for name, case in cases.items():
            seconds = [await case(mesh) for _ in range(ROUNDS)]
            report.figures[name] = seconds
            report.bar(f"{name}: s until free (max of {ROUNDS})", max(seconds), "under 1", max(seconds) < 1)
            print(
                f"{name}: median {statistics.median(seconds):.3f} s, max {max(seconds):.3f} s until nothing is leased"
            )
        leased = await random_cancels(mesh)
        report.bar(f"leased after {NUM_RANDOM} random cancels", leased, "0", leased == 0)
        for temperature in (0.0, 0.7):
            same, gap_s = await killed_decode_worker(mesh, temperature)
            report.figures[f"killed decode worker, T={temperature}"] = {"same_text": same, "longest_gap_s": gap_s}
            report.bar(f"same text after a restart by kill -9, T={temperature}", float(same), "1", same)
            print(f"decode worker killed at T={temperature}: same text {same}, longest gap {gap_s:.2f} s")
        seconds_back = await killed_router(mesh)
        report.figures["killed router, s until it answers with nothing leased"] = seconds_back
        report.bar("router killed: s until back and free", seconds_back, "under 10", seconds_back < 10)
        (unit,) = (await mesh.client.status()).units
        report.bar("bytes leased at the end", unit.pool.leased_bytes, "0", unit.pool.leased_bytes == 0)
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
