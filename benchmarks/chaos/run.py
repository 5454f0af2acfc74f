"""One run: computes the expected outputs, sends the load, injects the planned faults, judges.

The plan and the load are functions of the seed alone; how they interleave depends on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.chaos.cases import Case, LoadSize, requests_of_client, sample_cases
from benchmarks.chaos.checker import check_call, check_faults, check_log, leaks
from benchmarks.chaos.clients import Load
from benchmarks.chaos.history import COMPLETED, Call, Holdings, InjectedFault, Violation
from benchmarks.chaos.holdings import read_holdings
from benchmarks.chaos.injector import Injector
from benchmarks.chaos.meshes import ChaosMesh
from benchmarks.chaos.plan import PlannedFault
from benchmarks.chaos.processes import MPS_QUESTION, MeshProcesses
from benchmarks.chaos.report import counts_line, recovery_lines
from benchmarks.chaos.status_watch import StatusWatch
from benchmarks.mesh_process import UpProcess
from muxmesh.errors import DeadlineExceeded, InternalError, Unavailable
from muxmesh.process_state import has_ended

_SETTLED_WITHIN_S = 60.0
_STOPPED_WITHIN_S = 60.0


def cases_of(seed: int, models: Sequence[str], size: LoadSize) -> list[Case]:
    """The cases of a run's load."""
    return sample_cases(random.Random(f"{seed} cases"), models, size)


async def undisturbed_calls(address: str, cases: Sequence[Case], size: LoadSize) -> list[Call]:
    """Sends each case to a mesh without faults. Raises InternalError if one does not complete."""
    calls = await Load(address, size.call_limit_s).call_all(cases, 2)
    for call in calls:
        if call.end != COMPLETED:
            raise InternalError(f"{call.request.case}: {call.end} on the undisturbed mesh: {call.problem}")
    return calls


class ChaosRun:
    """Owns the history of one run on a mesh that has just started, and its violations."""

    def __init__(
        self, kind: ChaosMesh, mesh: UpProcess, processes: MeshProcesses, seed: int, reference: Sequence[Call] | None
    ) -> None:
        """``reference``: the expected calls of the cases; None if those of the undisturbed mesh are."""
        self.violations: list[Violation] = []
        self._mesh = mesh
        self._processes = processes
        self._seed = seed
        self._reference = reference
        self._size = kind.load
        self._load = self._new_load()
        self._injector = Injector(kind.faults, processes, lambda: self._load.at_s)
        self._watch = StatusWatch(mesh.client)

    async def run(self, seconds: float, plan: Sequence[PlannedFault]) -> None:
        """Fills the history and the violations."""
        cases = cases_of(self._seed, self._processes.models, self._size)
        print(f"{len(cases)} cases on the undisturbed mesh", flush=True)
        expected = await self._undisturbed(cases)
        before = await self._settled(None)
        print(f"{self._size.num_clients} clients and {len(plan)} faults, {seconds:.0f} s", flush=True)
        await self._disturbed(seconds, plan, cases)
        for name in self._processes.names:
            if not await self._processes.serves(name, None, _SETTLED_WITHIN_S):
                self.violations.append(Violation("other", f"{name} does not serve at the end"))
        print("the same cases again", flush=True)
        faults = self._injector.faults
        self._check(self._load.calls, expected, faults)
        self._check(await self._new_load().call_all(cases, self._size.num_clients), expected, ())
        given_up = self._load.num_given_up
        self.violations += [Violation("lost", f"{given_up} requests were given up after many retries")] * (given_up > 0)
        self.violations += check_faults(faults)
        self.violations += self._watch.violations
        self.violations += leaks(before, await self._settled(before))

    async def stop(self) -> None:
        """Ends the mesh as Ctrl-C does, and looks at what it left: exit code, processes, folders, logs.

        Some processes are killed just before, so that the mesh ends in the middle of a recovery.
        """
        rng = random.Random(f"{self._seed} end")
        pids = {pid: name for pid, name in self._processes.by_pid().items() if name != MPS_QUESTION}
        for pid in rng.sample(sorted(pids, key=lambda pid: pids[pid]), rng.randint(0, 3)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(rng.uniform(0.0, 1.5))
        pids |= self._processes.by_pid()
        process, state_dir = self._mesh.process, self._mesh.state_dir
        process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(_STOPPED_WITHIN_S):
                code = await process.wait()
        except TimeoutError:
            self.violations.append(Violation("other", f"did not exit within {_STOPPED_WITHIN_S:.0f} s of SIGINT"))
            process.kill()
            return
        if code != 0:
            self.violations.append(Violation("other", f"exited with {code} on SIGINT"))
        left = [name for pid, name in pids.items() if not has_ended(pid)]
        left += self._processes.remnants().values()
        left += [path.name for path in state_dir.glob("run-*")]
        self.violations += [Violation("leaked", f"{name} is left after SIGINT") for name in dict.fromkeys(left)]
        for path in sorted((state_dir / "logs").glob("*.log*")):
            self.violations += check_log(path.name, path.read_text(errors="replace").splitlines())

    def lines(self, seconds: float) -> Iterator[str]:
        """The result, for people; the last line has the counts."""
        yield from recovery_lines(self._injector.faults)
        yield f"swapped out {self._watch.swapped_bytes / 1e6:.1f} MB; {self._watch.num_looks} checks of integrity"
        yield from (f"VIOLATION {violation.kind}: {violation.text}" for violation in self.violations)
        requests = {"requests": self._load.num_requests, "retried": self._load.num_retries}
        yield counts_line(self._seed, seconds, requests, self._load.calls, self._injector.faults, self.violations)

    def _new_load(self) -> Load:
        return Load(self._mesh.address, self._size.call_limit_s)

    async def _undisturbed(self, cases: Sequence[Case]) -> list[Call]:
        """The expected calls. A second time, all at once, they must be the same; that opens what opens on demand."""
        load = self._new_load()
        first = await undisturbed_calls(self._mesh.address, cases, self._size)
        expected = first if self._reference is None else self._reference
        self._check([*first, *await load.call_all(cases, self._size.num_clients)], expected, ())
        return list(expected)

    def _check(self, calls: Iterable[Call], expected: Sequence[Call], faults: Sequence[InjectedFault]) -> None:
        """Compares calls with those of the same cases on the undisturbed mesh."""
        for call in calls:
            self.violations += check_call(call, expected[call.request.case.number], faults)

    async def _disturbed(self, seconds: float, plan: Sequence[PlannedFault], cases: Sequence[Case]) -> None:
        self._load = self._new_load()
        streams = [
            requests_of_client(random.Random(f"{self._seed} client {number}"), cases)
            for number in range(self._size.num_clients)
        ]
        watching = asyncio.create_task(self._watch.run())
        clients = asyncio.create_task(self._load.run_clients(streams))
        injecting = asyncio.create_task(self._injector.run(plan))
        await asyncio.sleep(seconds)
        self._load.stop()
        await asyncio.gather(clients, injecting)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    async def _settled(self, before: Holdings | None) -> Holdings:
        """What the mesh holds once nothing runs any more, and nothing more than before is held; or after a while."""
        end_s = time.monotonic() + _SETTLED_WITHIN_S
        while True:
            try:
                status = await self._mesh.client.status()
            except (Unavailable, DeadlineExceeded):
                if time.monotonic() > end_s:
                    raise
                await asyncio.sleep(0.5)
                continue
            now = read_holdings(status, self._processes, self._mesh.state_dir)
            if not any(leaks(before or now, now)) or time.monotonic() > end_s:
                return now
            await asyncio.sleep(0.5)
