"""Injects the faults of a plan, each when it is due, and prints how each ended."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from benchmarks.chaos.faults import Fault, Hit, NotRecovered, NotSurvived
from benchmarks.chaos.history import InjectedFault
from benchmarks.chaos.plan import PlannedFault
from benchmarks.chaos.processes import MeshProcesses
from benchmarks.chaos.report import fault_line


class Injector:
    """Owns the faults that happened. ``table``: of faults. ``now_s``: seconds since the load started."""

    def __init__(self, table: Sequence[Fault], processes: MeshProcesses, now_s: Callable[[], float]) -> None:
        self.faults: list[InjectedFault] = []
        self._table = {fault.name: fault for fault in table}
        self._processes = processes
        self._now_s = now_s

    async def run(self, plan: Sequence[PlannedFault]) -> None:
        """Injects every fault of the plan; returns when the mesh has recovered from all of them, or should have."""
        await asyncio.gather(*(self._inject(self._table[planned.fault], planned) for planned in plan))

    async def _inject(self, fault: Fault, planned: PlannedFault) -> None:
        await asyncio.sleep(planned.at_s - self._now_s())
        at_s, note = self._now_s(), ""
        problem: NotRecovered | None = None
        try:
            hit = await fault.inject(self._processes, planned.target)
        except (LookupError, ProcessLookupError):
            note = "did not run"
        else:
            problem = await self._problem(fault, planned, hit)
        is_judged_alone = isinstance(problem, NotSurvived)
        happened = InjectedFault(
            fault.name,
            planned.target,
            at_s,
            math.inf if problem and not is_judged_alone else self._now_s(),
            fault.allows(planned.target),
            str(problem or ""),
            is_judged_alone,
            note,
        )
        self.faults.append(happened)
        print(fault_line(happened), flush=True)

    async def _problem(self, fault: Fault, planned: PlannedFault, hit: Hit) -> NotRecovered | None:
        """Undoes a fault, and waits until the mesh has recovered. Returns what went wrong."""
        await asyncio.sleep(planned.hold_s)
        try:
            await fault.undo(self._processes, planned.target, hit)
            await fault.recovered(self._processes, planned.target, hit)
        except NotRecovered as error:
            return error
        except (LookupError, ProcessLookupError):
            return NotRecovered("does not run any more")
        return None
