"""The faults of a mesh on a fake GPU (`tests/support/fake_mps`): of the device, of the MPS daemon and of its clients.

See `faults` for what an entry of the table is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from benchmarks.chaos.faults import (
    FAULTS,
    Fault,
    Hit,
    NotSurvived,
    kill,
    no_error,
    replaced,
    require_serving,
    survived,
    until_ended,
)
from benchmarks.chaos.processes import MPS, MeshProcesses
from kvstore.mps_clients import RELEASE_WITHIN_S
from muxmesh.client import MeshClient
from muxmesh.errors import MeshError

SILENT_S = (0.5, 2.5)
"""Least and most seconds without an answer after which the supervisor does not kill the daemon: the question that was
lost last ends 5 s later, and 8 s without an answer are a hang.
"""
KEEPS_CLIENTS_S = (0.5, 1.6 * RELEASE_WITHIN_S)
"""Least and most seconds for which exited clients stay in the list: for some, the other workers have to end too; for
none, kvstore."""
_WORKERS = ("prefill", "decode")
_LOADS_WITHIN_S = 60.0
_SWAPS_WITHIN_S = 30.0
_NUM_SEGMENTS = 2
"""Pieces of device memory that a worker maps: the pool and its model's weights."""


def _let_fail(processes: MeshProcesses, daemon: str, how: str) -> None:
    """Lets a daemon fail in a way that the head of the fake lists. Raises LookupError if there is none."""
    try:
        (processes.pipe_dir(daemon) / f"fake.{how}").touch()
    except FileNotFoundError:
        raise LookupError(f"{daemon} does not run") from None


def _recover(processes: MeshProcesses, daemon: str, how: str) -> None:
    (processes.pipe_dir(daemon) / f"fake.{how}").unlink(missing_ok=True)


async def _with_group(processes: MeshProcesses, target: str) -> Hit:
    """The daemon, its clients and the kvstores of its GPU. Raises LookupError if it has no clients."""
    pid, clients = processes.pid(target), await processes.clients_of(target)
    if not clients:
        raise LookupError(f"{target} has no clients")
    group = set(processes.group_of(target))
    running = {name: pid for pid, name in processes.by_pid().items() if name in group}
    return Hit(pid, {name: pid for name, pid in running.items() if pid in clients or name.startswith("kvstore")})


async def _fail_device(processes: MeshProcesses, target: str) -> Hit:
    hit = await _with_group(processes, target)
    _let_fail(processes, target, "fault")
    return hit


async def _kill_daemon(processes: MeshProcesses, target: str) -> Hit:
    hit = await _with_group(processes, target)
    os.kill(hit.pid, signal.SIGKILL)
    return hit


async def _group_replaced(processes: MeshProcesses, target: str, hit: Hit) -> None:
    """All workers of the GPU are other processes, and every kvstore is the same.

    A worker that goes on raises NotRecovered; what `group_problem` finds after that may come from another fault.
    """
    for name, pid in hit.others.items():
        if not name.startswith("kvstore"):
            await until_ended(name, pid)
    await require_serving(processes, [target, *processes.group_of(target)], None)
    if problem := group_problem(hit.others, {name: pid for pid, name in processes.by_pid().items()}):
        raise NotSurvived(problem)


def group_problem(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """What is wrong with the processes of a GPU, as pids by name, after a fault of the device; empty if nothing is."""
    for name, pid in before.items():
        if name not in now:
            return f"{name} does not run any more"
        if name.startswith("kvstore") and now[name] != pid:
            return f"{name} was restarted, which had not failed"
        if not name.startswith("kvstore") and now[name] == pid:
            return f"{name} goes on, whose work has failed"
    return ""


async def _daemon_and_group_replaced(processes: MeshProcesses, target: str, hit: Hit) -> None:
    await _group_replaced(processes, target, hit)
    await replaced(processes, target, hit)


async def _silence(processes: MeshProcesses, target: str) -> Hit:
    hit = Hit(processes.pid(target))
    _let_fail(processes, target, "silent")
    return hit


async def _end_silence(processes: MeshProcesses, target: str, hit: Hit) -> None:
    _recover(processes, target, "silent")


async def _killed_for_silence(processes: MeshProcesses, target: str, hit: Hit) -> None:
    try:
        await until_ended(target, hit.pid)
    finally:
        _recover(processes, target, "silent")
    await replaced(processes, target, hit)


async def _kill_listed(processes: MeshProcesses, target: str) -> Hit:
    """Kills a worker that the daemon keeps in its list."""
    _let_fail(processes, processes.daemon_of(target), "keeps_clients")
    return await kill(processes, target)


async def _end_listing(processes: MeshProcesses, target: str, hit: Hit) -> None:
    _recover(processes, processes.daemon_of(target), "keeps_clients")


async def _kill_while_loading(processes: MeshProcesses, target: str) -> Hit:
    """Kills the kvstore, and then a worker as soon as it has mapped the memory for weights of the next one."""
    before = processes.pid(target)
    await kill(processes, processes.kvstore_of(target))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LOADS_WITHIN_S):
            while True:
                with contextlib.suppress(LookupError, OSError):
                    pid = processes.pid(target)
                    if pid != before and _num_mapped_segments(pid) >= _NUM_SEGMENTS:
                        os.kill(pid, signal.SIGKILL)
                        return Hit(pid)
                await asyncio.sleep(0.005)
    raise LookupError(f"{target} did not map its memory within {_LOADS_WITHIN_S:.0f} s")


def _num_mapped_segments(pid: int) -> int:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "memfd:fake-cuda-memory" in line})


async def _kill_while_swapping(processes: MeshProcesses, target: str) -> Hit:
    """Kills a worker when sequences are swapped out. Raises LookupError if none is within `_SWAPS_WITHIN_S`."""
    async with MeshClient(processes.listen) as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SWAPS_WITHIN_S):
                while not await _swaps(client):
                    await asyncio.sleep(0.02)
                return await kill(processes, target)
    raise LookupError(f"nothing was swapped out within {_SWAPS_WITHIN_S:.0f} s")


async def _swaps(client: MeshClient) -> bool:
    try:
        status = await client.status()
    except MeshError:
        return False
    return any(unit.pool.num_swapped_leases for unit in status.units)


GPU_FAULTS: tuple[Fault, ...] = (
    *FAULTS,
    Fault("fault", 5, (MPS,), _fail_device, _group_replaced, allows=no_error),
    Fault("mps kill", 2, (MPS,), _kill_daemon, _daemon_and_group_replaced, allows=no_error),
    Fault("silent", 2, (MPS,), _silence, survived, _end_silence, SILENT_S, no_error),
    Fault("mute", 1, (MPS,), _silence, _killed_for_silence, allows=no_error),
    Fault("listed", 3, _WORKERS, _kill_listed, replaced, _end_listing, KEEPS_CLIENTS_S, no_error),
    Fault("loading", 2, _WORKERS, _kill_while_loading, replaced, allows=no_error),
    Fault("swapping", 3, ("decode",), _kill_while_swapping, replaced, allows=no_error),
)
"""Besides those of any mesh: a fault of the device; kill -9 of the daemon; a daemon that does not answer, for a short
time or for ever; a worker that stays in the daemon's list after its end; one that is killed while weights are loaded,
or KV is swapped."""
