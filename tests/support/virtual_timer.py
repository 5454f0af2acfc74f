"""A timer of a sim model in virtual time, in this process: what it measures is what its profile says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from muxmesh.clock import ManualClock
from muxmesh.config.model_config import SimProfile
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.placement.measured_cells import Cell
from muxmesh.profiler.step_timer import StepTimer
from muxmesh.types import Role

BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
PROFILE = SimProfile(base_s=0.01, per_token_s=0.001, per_context_s=0.00001)


def step_timer(
    clock: ManualClock,
    sleep: Callable[[float], None] | None = None,
    max_steps: int = 1,
    pause: Callable[[], None] = lambda: None,
) -> StepTimer:
    """Times steps that advance ``clock``, or call ``sleep``."""
    runner = SimRunner(PROFILE, range(35, 93), 0, sleep or clock.advance, max_steps)
    return StepTimer(Scheduler(16, 128, 259), runner, BLOCK_SIZE, MAX_MODEL_LEN, clock, pause=pause)


class VirtualTimers:
    """Timers that share a clock and do not run side by side: ``slower`` is the slowdown of those that seem to.

    ``opened`` has (model, share) of each in order; ``before_cell`` and ``before_open`` may raise.
    """

    def __init__(self, clock: ManualClock, slower: float = 1.0) -> None:
        self._clock = clock
        self.slower = slower
        self.num_computing = 0
        self.opened: list[tuple[str, int]] = []
        self.beside: list[tuple[int, ...]] = []
        self.before_cell: Callable[[], None] = lambda: None
        self.before_open: Callable[[str], None] = lambda model: None

    @asynccontextmanager
    async def open(self, cells: Sequence[Cell], beside: Sequence[int]) -> AsyncIterator[VirtualTimer]:
        ((model, share),) = {(cell.model, cell.share) for cell in cells}
        self.opened.append((model, share))
        self.beside.append(tuple(beside))
        self.before_open(model)
        yield VirtualTimer(self, self._clock, share)


class VirtualTimer:
    """Takes 100 / share times as long as the profile says."""

    def __init__(self, timers: VirtualTimers, clock: ManualClock, share: int) -> None:
        self._timers = timers
        self._clock = clock
        self._factor = 100 / share

    async def times(self, role: Role, batch: int, length: int, repeats: int, longest_s: float) -> list[float]:
        self._timers.before_cell()
        return _slower_timer(self._clock, self._factor).samples(role, batch, length, repeats, longest_s)

    async def intervals(
        self, role: Role, batch: int, length: int, from_s: float, until_s: float
    ) -> list[tuple[float, float]]:
        clock, timers = ManualClock(self._clock.monotonic_s()), self._timers
        timers.num_computing += 1
        await asyncio.sleep(0)
        factor = self._factor * (timers.slower if timers.num_computing > 1 else 1.0)
        await asyncio.sleep(0)
        timers.num_computing -= 1
        found = _slower_timer(clock, factor).intervals(role, batch, length, from_s, until_s)
        self._clock.advance(max(0.0, until_s - self._clock.monotonic_s()))
        return found


def _slower_timer(clock: ManualClock, factor: float) -> StepTimer:
    return step_timer(clock, lambda seconds: clock.advance(seconds * factor))
