"""Services in a cgroup with a memory limit, as in a container: refused in one line, or served within the limit."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.models.host_memory import KVSTORE_BYTES, SIM_WORKER_BYTES
from muxmesh.supervisor.health_probe import wait_until_serving
from tests.support.memory_cgroup import MemoryCgroup, memory_cgroup
from tests.support.processes import ended_popen

MIB = 1 << 20
POOL_BYTES = 64 * MIB
pytestmark = pytest.mark.mesh


def runtime_of(folder: Path) -> MeshRuntime:
    unit = {"name": "u", "kv_pool": POOL_BYTES, "models": [{"name": "m", "engine": "sim"}]}
    runtime = MeshRuntime(
        config=MeshConfig.model_validate({"units": [unit]}),
        run_dir=folder,
        cache_dir=folder,
        redis_url=f"unix://{folder}/no-redis.sock",
        prepared={"u": {"m": PreparedModel(folder=None, image=None, weights_fingerprint="w")}},
    )
    runtime.write(folder / "runtime.json")
    return runtime


@contextmanager
def service(folder: Path, cgroup: MemoryCgroup, *command: str) -> "Iterator[subprocess.Popen[str]]":
    arguments = [sys.executable, "-m", *command, "--runtime", str(folder / "runtime.json"), "--unit", "u"]
    with ended_popen(subprocess.Popen(cgroup.command(*arguments), stderr=subprocess.PIPE, text=True)) as process:
        yield process


@pytest.mark.parametrize(
    ("command", "limit_bytes", "problem"),
    [
        (["kvstore"], POOL_BYTES, "unit u: kv_pool and kv_swap are together 64.0MiB, and kvstore needs 96.0MiB"),
        (["decode_svc", "--model", "m"], SIM_WORKER_BYTES - 4096, "decode/m: a worker needs 96.0MiB; the memory limit"),
    ],
    ids=["kvstore", "worker"],
)
def test_a_service_whose_memory_limit_is_too_small_says_so_in_one_line(
    tmp_path: Path, command: list[str], limit_bytes: int, problem: str
) -> None:
    runtime_of(tmp_path)
    with memory_cgroup(limit_bytes) as cgroup, service(tmp_path, cgroup, *command) as process:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        (line,) = stderr.splitlines()
        assert f"cannot serve: {problem}" in line
        assert f"of this container or service (cgroup, {cgroup.limit_file})" in line


async def test_under_a_memory_limit_the_pool_counts_to_kvstore_from_its_start_on(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path)
    with (
        memory_cgroup(POOL_BYTES + KVSTORE_BYTES) as cgroup,
        service(tmp_path, cgroup, "kvstore") as process,
    ):
        async with asyncio.timeout(60):
            await wait_until_serving(runtime.endpoints()[ProcessKey("kvstore", "u")].address)
        used_bytes = int(cgroup.usage_file.read_text())
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0
    assert POOL_BYTES < used_bytes <= POOL_BYTES + KVSTORE_BYTES
