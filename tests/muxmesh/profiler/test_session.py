from collections.abc import Sequence

import pytest

from muxmesh.clock import ManualClock
from muxmesh.engine.sim_runner import sim_step_cost
from muxmesh.errors import EngineFailed
from muxmesh.placement.measured_cells import Cell, SampleSummary, Slowdown
from muxmesh.profiler.grid import Grid, ModelLimits, cells_of
from muxmesh.profiler.interference import fit_contention, groups_of
from muxmesh.profiler.session import Effort, Session
from muxmesh.types import Role
from tests.support.virtual_timer import PROFILE, VirtualTimers

MODELS = [ModelLimits("a", 4, 2048, 1 << 20), ModelLimits("b", 4, 2048, 1 << 20)]
GRID = Grid((25, 50, 100), (1, 2, 4), (64, 256), max_prefill_tokens=512)
EFFORT = Effort(repeats=3, longest_cell_s=60, interval_s=2.0)
ROUNDS, GROUPS = cells_of(GRID, MODELS), groups_of(GRID, MODELS)
NUM_CELLS = sum(map(len, ROUNDS))


class Recorded:
    """Keeps everything in lists."""

    def __init__(self) -> None:
        self.cells: dict[Cell, SampleSummary] = {}
        self.slowdowns: list[Slowdown] = []

    def record_cell(self, cell: Cell, summary: SampleSummary) -> None:
        self.cells[cell] = summary

    def record_slowdowns(self, slowdowns: Sequence[Slowdown]) -> None:
        self.slowdowns += slowdowns


def session(
    timers: VirtualTimers,
    clock: ManualClock,
    recorded: Recorded,
    shown: list[tuple[int, int, float | None]],
    effort: Effort = EFFORT,
) -> Session:
    return Session(
        timers.open, recorded, effort, clock, lambda what, done, total, left_s: shown.append((done, total, left_s))
    )


async def test_every_cell_is_measured_and_each_process_started_once_in_a_round() -> None:
    clock, recorded = ManualClock(), Recorded()
    timers = VirtualTimers(clock)
    assert await session(timers, clock, recorded, []).run(ROUNDS, []) == 0
    assert set(recorded.cells) == {cell for cells in ROUNDS for cell in cells}
    assert len(timers.opened) == sum(len({(cell.model, cell.share) for cell in cells}) for cells in ROUNDS)
    one = recorded.cells[Cell("a", Role.DECODE, 50, 4, 256)]
    assert one.seconds == pytest.approx(2 * sim_step_cost(PROFILE).step_s(4, 4 * 256), rel=0.05)


async def test_the_slowdown_is_that_of_neighbours_against_alone() -> None:
    clock, recorded = ManualClock(), Recorded()
    assert await session(VirtualTimers(clock, slower=1.3), clock, recorded, []).run([], GROUPS) == 0
    assert len(recorded.slowdowns) == sum(map(len, GROUPS))
    assert [one.ratio for one in recorded.slowdowns] == pytest.approx([1.3] * len(recorded.slowdowns), rel=0.05)
    of_pair = [one for one in recorded.slowdowns if len(one.beside) == 1]
    assert of_pair[0].beside == (of_pair[1].worker,) and of_pair[1].beside == (of_pair[0].worker,)
    fitted = fit_contention(of_pair)
    assert fitted is not None and fitted.factor == pytest.approx(0.6, rel=0.1)


async def test_each_timer_of_a_group_knows_the_shares_before_it() -> None:
    clock = ManualClock()
    timers = VirtualTimers(clock)
    await session(timers, clock, Recorded(), []).run([], GROUPS)
    shares = [[cell.share for cell in group] for group in GROUPS]
    assert timers.beside == [tuple(one[:index]) for one in shares for index in range(len(one))]


async def test_groups_come_after_the_first_round() -> None:
    clock, recorded = ManualClock(), Recorded()
    counts: list[int] = []
    timers = VirtualTimers(clock)
    timers.before_cell = lambda: counts.append(len(recorded.slowdowns))
    await session(timers, clock, recorded, []).run(ROUNDS, GROUPS)
    assert counts == [0] * len(ROUNDS[0]) + [sum(map(len, GROUPS))] * (NUM_CELLS - len(ROUNDS[0]))


async def test_no_measurement_begins_after_the_budget() -> None:
    clock, recorded = ManualClock(), Recorded()
    effort = Effort(3, 60, 2.0, budget_s=5.0)
    left = await session(VirtualTimers(clock), clock, recorded, [], effort).run(ROUNDS, GROUPS)
    assert 0 < len(recorded.cells) < len(ROUNDS[0])
    assert left == NUM_CELLS + len(GROUPS) - len(recorded.cells)


async def test_progress_counts_what_is_done_and_knows_how_long_the_rest_takes() -> None:
    clock, shown = ManualClock(), list[tuple[int, int, float | None]]()
    timers, times = VirtualTimers(clock), list[float]()
    timers.before_cell = lambda: times.append(clock.monotonic_s())
    await session(timers, clock, Recorded(), shown).run(ROUNDS, [])
    assert [done for done, _, _ in shown] == list(range(NUM_CELLS + 1))
    assert {total for _, total, _ in shown} == {NUM_CELLS}
    assert shown[0][2] is None
    half = NUM_CELLS // 2
    assert shown[half][2] == pytest.approx(clock.monotonic_s() - times[half], rel=0.3)


async def test_what_was_measured_before_a_failure_is_recorded() -> None:
    clock, recorded = ManualClock(), Recorded()
    timers = VirtualTimers(clock)

    def fail() -> None:
        if len(recorded.cells) == 3:
            raise EngineFailed("a step cannot be computed")

    timers.before_cell = fail
    with pytest.raises(EngineFailed):
        await session(timers, clock, recorded, []).run(ROUNDS, GROUPS)
    assert len(recorded.cells) == 3


async def test_a_group_that_cannot_be_loaded_together_is_left_out_with_the_reason() -> None:
    clock, recorded = ManualClock(), Recorded()
    timers = VirtualTimers(clock)
    num_of_b = 0

    def fail_for_some(model: str) -> None:
        nonlocal num_of_b
        num_of_b += model == "b"
        if num_of_b == 1 and model == "b":
            raise EngineFailed("the device has too little memory")

    timers.before_open = fail_for_some
    profiling = session(timers, clock, recorded, [])
    assert await profiling.run([], GROUPS) == 1
    assert profiling.left_out == ["a decode 50 beside b decode 50: the device has too little memory"]
    assert len(recorded.slowdowns) == sum(map(len, GROUPS[1:]))
