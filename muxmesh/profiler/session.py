"""One run of a profile: measures the cells and slowdowns that are missing, and records each as soon as it is there.

Knows the order, the time that is left and what is shown of the progress. Timers measure, a recorder keeps.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from muxmesh.clock import Clock
from muxmesh.errors import EngineFailed
from muxmesh.placement.measured_cells import Cell, SampleSummary, Slowdown, each_beside
from muxmesh.profiler.remaining_time import RemainingTime
from muxmesh.profiler.sample_summary import summarize
from muxmesh.types import Role

Group = tuple[Cell, ...]
"""Workers that are measured side by side: what each of them computes again and again."""
_LEAD_S = 0.3
"""Processes that measure the same interval get the request so long before it begins."""
_NUM_INTERVALS = 7
"""Of a group, and the start of its processes, to estimate how long the first takes."""
_MIN_REPETITIONS = 3
_MAX_INTERVAL_FACTOR = 8
"""An interval with fewer repetitions is measured again, twice as long, up to this multiple."""


class Timer(Protocol):
    """Times the steps of one model on one share. See `TimerClient`."""

    async def times(self, role: Role, batch: int, length: int, repeats: int, longest_s: float) -> list[float]: ...

    async def intervals(
        self, role: Role, batch: int, length: int, from_s: float, until_s: float
    ) -> list[tuple[float, float]]: ...


OpenTimer = Callable[[Sequence[Cell], Sequence[int]], AbstractAsyncContextManager[Timer]]
"""Starts a timer for cells of one model and share, which ends with the context. Raises EngineFailed if it cannot.

The numbers are the shares of timers that compute beside it and were opened before.
"""
Show = Callable[[str, int, int, float | None], None]
"""Shows what is measured next, how many measurements of how many are done, and the seconds that remain, if known."""


class Recorder(Protocol):
    """Keeps what was measured. Both methods return when it is safe."""

    def record_cell(self, cell: Cell, summary: SampleSummary) -> None: ...

    def record_slowdowns(self, slowdowns: Sequence[Slowdown]) -> None: ...


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a profile may take."""

    repeats: int
    """Measurements of a cell, at least."""
    longest_cell_s: float
    """A cell is not repeated any more after so many seconds."""
    interval_s: float
    """Workers compute side by side, and alone, for so long."""
    budget_s: float | None = None
    """No measurement begins after so many seconds. None: all are made."""


class Session:
    """Measures rounds of cells, and groups after the first round."""

    def __init__(self, open_timer: OpenTimer, recorder: Recorder, effort: Effort, clock: Clock, show: Show) -> None:
        self._open_timer = open_timer
        self._recorder = recorder
        self._effort = effort
        self._clock = clock
        self._show = show
        self.left_out: list[str] = []
        """Groups that could not be measured, each with the reason: several models may not fit the device's memory."""

    async def run(self, rounds: Sequence[Sequence[Cell]], groups: Sequence[Group]) -> int:
        """Measures all of them, or until the budget is used. Returns how many measurements are left, `left_out` too.

        Raises EngineFailed if a model cannot be computed alone; what was recorded stays.
        """
        self._started_at_s = self._clock.monotonic_s()
        self._remaining = RemainingTime(
            [cell for cells in rounds for cell in cells], len(groups), _NUM_INTERVALS * self._effort.interval_s
        )
        first, *others = rounds or [[]]
        await self._measure_cells(first)
        await self._measure_groups(groups)
        for cells in others:
            await self._measure_cells(cells)
        if not self._remaining.num_left:
            self._show_next("")
        return self._remaining.num_left

    @property
    def _has_time(self) -> bool:
        budget_s = self._effort.budget_s
        return budget_s is None or self._clock.monotonic_s() - self._started_at_s < budget_s

    async def _measure_cells(self, cells: Sequence[Cell]) -> None:
        """Measures ``cells``, with one timer for neighbours of the same model and share."""
        effort = self._effort
        for _, group in groupby(cells, key=lambda cell: (cell.model, cell.share)):
            if not self._has_time:
                return
            same = list(group)
            async with self._open_timer(same, ()) as timer:
                for cell in same:
                    if not self._has_time:
                        return
                    self._show_next(str(cell))
                    began_s = self._clock.monotonic_s()
                    samples = await timer.times(
                        cell.role, cell.batch, cell.length, effort.repeats, effort.longest_cell_s
                    )
                    self._recorder.record_cell(cell, summarize(samples))
                    self._remaining.cell_done(cell, self._clock.monotonic_s() - began_s)

    async def _measure_groups(self, groups: Sequence[Group]) -> None:
        for group in groups:
            if not self._has_time:
                return
            name = " beside ".join(f"{cell.model} {cell.role} {cell.share}" for cell in group)
            self._show_next(name)
            began_s = self._clock.monotonic_s()
            async with AsyncExitStack() as stack:
                try:
                    shares = [cell.share for cell in group]
                    timers = [
                        await stack.enter_async_context(self._open_timer([cell], shares[:index]))
                        for index, cell in enumerate(group)
                    ]
                except EngineFailed as error:  # each of them was measured alone
                    self.left_out.append(f"{name}: {error}")
                    continue
                self._recorder.record_slowdowns(await self._slowdowns(group, timers))
            self._remaining.group_done(self._clock.monotonic_s() - began_s)

    async def _slowdowns(self, group: Group, timers: Sequence[Timer]) -> list[Slowdown]:
        """Each worker alone, all together, and each alone again: the speed of the machine changes meanwhile."""
        workers = list(zip(group, timers, strict=True))
        alone_s = [await self._repetitions([cell], [timer]) for cell, timer in workers]
        beside_s = await self._repetitions(group, timers)
        again_s = [await self._repetitions([cell], [timer]) for cell, timer in workers]
        return [
            Slowdown(cell, others, statistics.median(before_s + after_s), statistics.median(together_s))
            for (cell, others), (before_s,), together_s, (after_s,) in zip(
                each_beside(group), alone_s, beside_s, again_s, strict=True
            )
        ]

    async def _repetitions(self, group: Sequence[Cell], timers: Sequence[Timer]) -> list[list[float]]:
        """Seconds of each repetition of each worker, while all of ``group`` compute. At least one each."""
        interval_s = self._effort.interval_s
        while True:
            from_s = self._clock.monotonic_s() + _LEAD_S
            until_s = from_s + interval_s
            found = await asyncio.gather(
                *(
                    timer.intervals(cell.role, cell.batch, cell.length, from_s, until_s)
                    for cell, timer in zip(group, timers, strict=True)
                )
            )
            fewest = min(map(len, found))
            if fewest >= _MIN_REPETITIONS or (fewest and interval_s >= _MAX_INTERVAL_FACTOR * self._effort.interval_s):
                return [[end_s - start_s for start_s, end_s in one] for one in found]
            interval_s *= 2

    def _show_next(self, what: str) -> None:
        self._show(what, self._remaining.num_done, self._remaining.num_total, self._remaining.seconds)
