"""Starts `muxmesh up` as a process, as a user does, and measures its processes through /proc."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import OUT
from loadtest.mesh_target import MeshTarget
from muxmesh.client import MeshClient
from muxmesh.errors import Unavailable

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class UpProcess:
    """A running `muxmesh up` with a client. Times are those of `time.monotonic`."""

    process: asyncio.subprocess.Process
    client: MeshClient
    address: str
    state_dir: Path
    started_at_s: float
    ready_at_s: float

    def pids(self) -> dict[int, str]:
        """Process id → command line of every process of the mesh, including the supervisor."""
        found = {}
        for pid in (self.process.pid, *children_of(self.process.pid)):
            with contextlib.suppress(FileNotFoundError):  # it has ended
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def pid_of(self, what: str) -> int:
        """The id of a process whose command line contains ``what``."""
        return next(pid for pid, command in self.pids().items() if what in command)


@asynccontextmanager
async def up(*arguments: str) -> AsyncIterator[UpProcess]:
    """Runs a mesh on a free port with its own state directory; stops it with SIGINT if it has not been stopped."""
    with tempfile.TemporaryDirectory(prefix="mm-") as state_dir:
        started_at_s = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "muxmesh", "up", "--quiet", "--listen", "127.0.0.1:0", "--state-dir", state_dir,
            *arguments, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                if line.startswith(b"muxmesh ready on "):
                    break
            else:
                raise Unavailable(f"muxmesh up exited with {await process.wait()} before it was ready")
            address = line.split()[-1].decode()
            async with MeshClient(address) as client:
                yield UpProcess(process, client, address, Path(state_dir), started_at_s, time.monotonic())
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            await process.wait()


@asynccontextmanager
async def mesh_target(
    name: str, config: Mapping[str, Any], temperature: float
) -> AsyncIterator[tuple[UpProcess, MeshTarget]]:
    """Runs a mesh with ``config``, written to ``name``.yaml in `OUT`; yields it and a target that sends to it."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.yaml"
    path.write_text(json.dumps(config, indent=1))
    async with up("-c", str(path)) as mesh:
        target = MeshTarget(mesh.address, temperature, None)
        try:
            yield mesh, target
        finally:
            await target.close()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process: user and system, all threads."""
    parts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(parts[11]) + int(parts[12])) / _TICKS_PER_S


def mapped_bytes(pid: int, what: str) -> tuple[int, int]:
    """Resident and proportional bytes of the mappings of a process whose name contains ``what``."""
    rss = pss = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            inside = what in line
        elif inside and head == "Rss:":
            rss += int(line.split()[1]) * 1024
        elif inside and head == "Pss:":
            pss += int(line.split()[1]) * 1024
    return rss, pss


def children_of(root: int) -> list[int]:
    """All descendants of the process ``root``."""
    children, found = _children(), []
    todo = list(children.get(root, []))
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(path.name))
    return children


def proportional_bytes(pid: int) -> int:
    """Memory of a process, in which shared pages are divided among the processes that map them."""
    return _bytes_of(pid, "smaps_rollup", "Pss")


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process, by proportional set size."""
    return _bytes_of(pid, "smaps_rollup", "Pss_Anon")


def peak_mb(pid: int) -> float:
    """The largest resident set of a process since its start, in MB."""
    return _bytes_of(pid, "status", "VmHWM") / 1e6


def _bytes_of(pid: int, file: str, field: str) -> int:
    """A field in kB of a file of /proc/PID."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{file} of this kernel has no {field}")
