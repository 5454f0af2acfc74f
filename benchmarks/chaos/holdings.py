"""Reads what a mesh holds: from its status, /proc and its folders."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.chaos.history import Holdings
from benchmarks.chaos.processes import MPS_QUESTION, MeshProcesses
from muxmesh.v1 import mesh_pb2
from tests.support.fake_driver import device_resources

_MEMORY = re.compile(r"^\S+ \S+ \S+ \S+ (\d+) +/memfd:(\S+)")
"""A line of /proc/PID/maps that maps a memfd: its inode and its name."""
_TRANSIENT = ("zombie", "ended", MPS_QUESTION)


def read_holdings(status: mesh_pb2.GetStatusResponse, processes: MeshProcesses, state_dir: Path) -> Holdings:
    """``status``: of the same moment. Processes that end meanwhile are left out."""
    by_pid = {**processes.by_pid(), processes.supervisor_pid: "supervisor"}
    alive = {name: Path(f"/proc/{pid}") for pid, name in by_pid.items() if name not in _TRANSIENT}
    fds = {name: len(list(folder.iterdir())) for name, folder in _existing(alive, "fd")}
    threads = {name: len(list(folder.iterdir())) for name, folder in _existing(alive, "task")}
    memory = {found for _, maps in _existing(alive, "maps") for found in _memory(maps)}
    names = [
        *(f"process {name}" for name in by_pid.values() if name != MPS_QUESTION),
        *(f"shared memory {name}" for _, name in memory),
        *(f"folder {path.name}" for path in state_dir.glob("run-*")),
        *(f"socket {path.name}" for path in processes.runtime.run_dir.glob("*.sock")),
        *(f"file {path.parent.name}/{path.name}" for path in processes.runtime.run_dir.glob("mps-*/*")),
        *_device_memory(alive),
    ]
    return Holdings(dict(_counters(status, processes)), fds, threads, tuple(sorted(names)))


def _existing(alive: dict[str, Path], part: str) -> Iterator[tuple[str, Path]]:
    return ((name, folder / part) for name, folder in alive.items() if (folder / part).exists())


def _device_memory(alive: Mapping[str, Path]) -> Iterator[str]:
    """Descriptors and mappings of a fake GPU's memory, with the name of the process."""
    for name, folder in alive.items():
        with contextlib.suppress(OSError):  # it ends meanwhile
            for what, count in device_resources(int(folder.name)).items():
                yield from [f"device memory of {name}: {what.split()[0]}"] * count


def _memory(maps: Path) -> Iterator[tuple[str, str]]:
    return ((found[1], found[2]) for line in maps.read_text().splitlines() if (found := _MEMORY.match(line)))


def _counters(status: mesh_pb2.GetStatusResponse, processes: MeshProcesses) -> Iterator[tuple[str, int]]:
    yield "Redis not connected", int(not status.redis_connected)
    registered = {process.name for process in status.processes}
    expected = {endpoint.name for endpoint in processes.runtime.endpoints().values()}
    yield "processes not in the registry", len(expected - registered)
    for model in status.models:
        yield f"{model.model}: waiting", model.num_requests_waiting
        yield f"{model.model}: running", model.num_requests_running
    for unit in status.units:
        yield f"{unit.unit}: not connected", int(not unit.connected)
        yield f"{unit.unit}: leased bytes", unit.pool.leased_bytes
        yield f"{unit.unit}: swap bytes", unit.pool.swap_used_bytes
        yield f"{unit.unit}: swapped leases", unit.pool.num_swapped_leases
        workers = 2 * len(processes.runtime.unit(unit.unit).models)
        yield f"{unit.unit}: workers not ready", workers - sum(worker.ready for worker in unit.workers)
        yield f"{unit.unit}: workers too many", max(0, len(unit.workers) - workers)
        for placed in unit.models:
            name = f"{unit.unit}, {placed.model}"
            yield f"{name}: leases", placed.num_leases
            yield f"{name}: credits", placed.num_credits
            yield f"{name}: queued requests", placed.num_queued_requests
            yield f"{name}: leased token blocks", placed.num_leased_token_blocks
