"""The table of faults. To add one: write how to inject it, how to undo it, how to see that the mesh has recovered.

A function of the table gets the mesh's processes and the name of the target. Samples nothing (`plan`), and judges no
client (`checker`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc

from benchmarks.chaos.processes import MeshProcesses
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc
from muxmesh.process_state import has_ended
from muxmesh.rpc.channels import internal_channel
from muxmesh.supervisor.liveness import CHECK_EVERY_S, MAX_STOPPED_CHECKS

BACK_WITHIN_S = 120.0
"""Bound on a restart: the longest back-off of the supervisor, and the start of a process on a busy machine."""
HANG_NOTICED_WITHIN_S = 25.0
"""Bound on noticing that a process hangs: the 15 s that the mesh promises, and a busy machine."""
SHORT_STOP_S = (0.2, (MAX_STOPPED_CHECKS - 1.5) * CHECK_EVERY_S)
"""Least and most seconds of a stop after which the supervisor does not kill the process."""
SERVICES = ("router", "kvstore", "prefill", "decode")
CLIENT = "client"
"""The role, and the name, of a client process of its own."""
MODEL = "model"
"""The role of a model, which is named model/ and its name."""
_SLEEPS = itertools.count()


class NotRecovered(Exception):
    """The mesh did not do after a fault what it should. The message says what."""


class NotSurvived(NotRecovered):
    """A process ended that the fault should have left alone: a violation only if no other fault happened meanwhile."""


@dataclass(frozen=True, slots=True)
class Hit:
    """What a fault hit: the process ``pid`` of its target. ``others``: further processes by name, to be looked at."""

    pid: int
    others: Mapping[str, int] = field(default_factory=dict)


async def _nothing(processes: MeshProcesses, target: str, hit: Hit) -> None:
    pass


def _unavailable_without_router(target: str) -> frozenset[str]:
    """Clients of a router that dies get UNAVAILABLE. Any other process is replaced without their knowledge."""
    return frozenset({"Unavailable", "WorkerLost"}) if target == "router" else frozenset()


def no_error(target: str) -> frozenset[str]:
    """No error of a client is allowed."""
    return frozenset()


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault.

    ``weight``: how often, relative to others. ``roles``: of the processes that it hits. ``inject`` returns what it
    hit, and raises LookupError if the target does not run. After ``hold_s`` (least and most seconds), ``undo`` ends
    the fault. ``recovered`` returns when the mesh is as before, or raises NotRecovered. ``allows``: by target, the
    names of the errors that clients may see until then.
    """

    name: str
    weight: float
    roles: tuple[str, ...]
    inject: Callable[[MeshProcesses, str], Awaitable[Hit]]
    recovered: Callable[[MeshProcesses, str, Hit], Awaitable[None]]
    undo: Callable[[MeshProcesses, str, Hit], Awaitable[None]] = _nothing
    hold_s: tuple[float, float] = (0.0, 0.0)
    allows: Callable[[str], frozenset[str]] = _unavailable_without_router


async def kill(processes: MeshProcesses, target: str) -> Hit:
    """Kills the target with SIGKILL."""
    pid = processes.pid(target)
    os.kill(pid, signal.SIGKILL)
    return Hit(pid)


async def _end(processes: MeshProcesses, target: str) -> Hit:
    pid = processes.pid(target)
    os.kill(pid, signal.SIGTERM)
    return Hit(pid)


async def _stop(processes: MeshProcesses, target: str) -> Hit:
    pid = processes.pid(target)
    os.kill(pid, signal.SIGSTOP)
    return Hit(pid)


async def _continue(processes: MeshProcesses, target: str, hit: Hit) -> None:
    try:
        os.kill(hit.pid, signal.SIGCONT)
    except ProcessLookupError:
        raise NotSurvived("did not survive a stop that is shorter than the bound") from None


async def replaced(processes: MeshProcesses, target: str, hit: Hit) -> None:
    """The target serves in another process; for a kvstore, so do the workers of its unit."""
    await require_serving(processes, processes.restarted_with(target), hit.pid)


async def require_serving(processes: MeshProcesses, names: Iterable[str], not_pid: int | None) -> None:
    """Waits until all processes serve, in others than ``not_pid``. Raises NotRecovered."""
    for name in names:
        if not await processes.serves(name, not_pid, BACK_WITHIN_S):
            raise NotRecovered(f"{name} does not serve {BACK_WITHIN_S:.0f} s later")


async def until_ended(name: str, pid: int) -> None:
    """Waits until the mesh has ended a process. Kills it itself after `HANG_NOTICED_WITHIN_S`: raises NotRecovered."""
    try:
        async with asyncio.timeout(HANG_NOTICED_WITHIN_S):
            while not has_ended(pid):
                await asyncio.sleep(0.05)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise NotRecovered(f"{name} was not killed within {HANG_NOTICED_WITHIN_S:.0f} s") from None


async def _killed_and_replaced(processes: MeshProcesses, target: str, hit: Hit) -> None:
    await until_ended(target, hit.pid)
    await replaced(processes, target, hit)


async def survived(processes: MeshProcesses, target: str, hit: Hit) -> None:
    """The target serves in the same process."""
    await require_serving(processes, [target], None)
    if processes.by_pid().get(hit.pid) != target:
        raise NotSurvived("was restarted after a stop that is shorter than the bound")


async def _vanishing_client(processes: MeshProcesses, target: str) -> Hit:
    """Kills a client process in the middle of its output."""
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", "generate", "--address", processes.listen, "--model", processes.models[0],
        "--max-new-tokens", "180", "--temperature", "1", "--num-sequences", "2", "A client that vanishes",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert client.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10.0):
            await client.stdout.read(1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(client.pid, signal.SIGKILL)
    await client.wait()
    return Hit(client.pid)


async def _put_to_sleep(processes: MeshProcesses, target: str) -> Hit:
    """Lets a model fall asleep, with weights kept or, each second time, dropped. Requests wake it again.

    The command may fail, if another fault hits what carries it out.
    """
    pid = processes.pid("router")
    drops = next(_SLEEPS) % 2 == 1
    request = admin_pb2.PutModelToSleepRequest(model=target.removeprefix(f"{MODEL}/"), drop_weights=drops)
    async with internal_channel(processes.runtime.admin_address("router")) as channel:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await admin_pb2_grpc.RouterAdminServiceStub(channel).PutModelToSleep(request, timeout=BACK_WITHIN_S)
    return Hit(pid)


FAULTS: tuple[Fault, ...] = (
    Fault("kill -9", 5, (*SERVICES, "redis"), kill, replaced),
    Fault("stop", 3, (*SERVICES, "redis"), _stop, survived, _continue, SHORT_STOP_S, no_error),
    Fault("hang", 1, (*SERVICES, "redis"), _stop, _killed_and_replaced),
    Fault("end", 1, (*SERVICES, "redis"), _end, replaced),
    Fault("vanish", 1, (CLIENT,), _vanishing_client, _nothing, allows=no_error),
    Fault("sleep", 3, (MODEL,), _put_to_sleep, _nothing, allows=no_error),
)
"""kill -9; SIGSTOP, then SIGCONT before the mesh may restart the process; SIGSTOP for ever; SIGTERM; a client that is
killed; a model that has to sleep."""
