"""Restarts of a service without a supervisor, as its registry in a real Redis counts them."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from muxmesh.clock import SystemClock
from muxmesh.process_registry import ProcessRegistry
from tests.support.processes import ended_popen

pytestmark = pytest.mark.mesh


async def test_a_killed_service_counts_a_restart_and_one_that_stops_as_asked_does_not(
    tmp_path: Path, redis_url: str
) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text("units:\n  - {name: u, kv_pool: 64MiB, models: [{name: m, engine: sim}]}\n")
    prepare = ["prepare", "-c", str(config), "--run-dir", str(tmp_path / "r"), "--redis-url", redis_url]
    assert await asyncio.to_thread(main, prepare) == 0
    command = [sys.executable, "-m", "kvstore", "--runtime", str(tmp_path / "r" / "runtime.json"), "--unit", "u"]
    registry = ProcessRegistry(redis_url, "default", SystemClock())

    async def restarts_of(pid: int) -> int:
        while True:
            for record, num_restarts in await registry.processes() or ():
                if record.pid == pid:
                    return num_restarts
            await asyncio.sleep(0.05)

    counts = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        with ended_popen(subprocess.Popen(command, text=True)) as process:
            async with asyncio.timeout(60):
                counts.append(await restarts_of(process.pid))
            os.kill(process.pid, number)
            await asyncio.to_thread(process.wait, 60)
    await registry.close()
    assert counts == [0, 1, 1, 2]
