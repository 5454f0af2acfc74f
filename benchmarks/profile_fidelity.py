"""How well a quick profile predicts the times of steps that are not in it: `python -m benchmarks.profile_fidelity`.

Profiles the default model on a small grid, then measures cells between the grid's and compares them with the table's
interpolation (what the placement search reads) and with the fitted step costs (what the simulator reads). Some cells of
the grid are measured again: how far these are from the file is what the machine's own changes amount to.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

from benchmarks.report import OUT, Report
from muxmesh.cli.common import cache_dir
from muxmesh.config.schema import DEFAULT_MODEL, MeshConfig
from muxmesh.models.prepared_model import prepare_model
from muxmesh.placement.measured_cells import Cell
from muxmesh.placement.profile import ModelProfile
from muxmesh.placement.profile_file import read_profile
from muxmesh.profiler.grid import Grid
from muxmesh.profiler.profiled_models import profiled_models
from muxmesh.profiler.sample_summary import summarize
from muxmesh.profiler.timer_mesh import TimerMesh
from muxmesh.types import Role
from simulator.measured_times import MeasuredStepTimes, prefill_steps

GRID = Grid((50, 100), (1, 4, 16), (64, 256, 1024), 1024)
BETWEEN: dict[Role, tuple[tuple[int, int], ...]] = {
    Role.PREFILL: ((1, 150), (2, 100), (3, 200), (1, 600)),
    Role.DECODE: ((2, 150), (3, 500), (6, 100), (8, 200), (12, 64), (1, 700)),
}
"""Batches and lengths between those of the grid."""
AGAIN: dict[Role, tuple[tuple[int, int], ...]] = {
    Role.PREFILL: ((1, 64), (1, 256)),
    Role.DECODE: ((1, 64), (4, 256), (16, 64)),
}
"""Cells of the grid."""
BETWEEN_SHARES = 75
REPEATS, CELL_S = 5, 1.5
MAX_ERROR = 0.1

Predict = Callable[[Cell], float]


def main() -> int:
    """Profiles, measures and compares."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "profile_fidelity.yaml"
    lists = {"--shares": GRID.shares, "--batches": GRID.batches, "--lengths": GRID.lengths}
    options = [part for name, values in lists.items() for part in (name, ",".join(map(str, values)))]
    limits = (
        "--max-prefill-tokens",
        str(GRID.max_prefill_tokens),
        "--repeats",
        str(REPEATS),
        "--cell-seconds",
        str(CELL_S),
    )
    subprocess.run((sys.executable, "-m", "muxmesh", "profile", "-o", path, "--restart", *options, *limits), check=True)
    profile = read_profile(path)
    model = profile.models[DEFAULT_MODEL]
    measured = asyncio.run(_measure(_cells()))
    bench = Report("profile_fidelity")
    table, costs = _by_table(model), _by_costs(model)
    for role in Role:
        for share in (*GRID.shares, BETWEEN_SHARES):
            of = [cell for cell in measured if (cell.role, cell.share) == (role, share)]
            between = [cell for cell in of if (cell.batch, cell.length) in BETWEEN[role]]
            again = [cell for cell in of if cell in model.samples]
            name = f"{role} at share {share}"
            if again:
                bench.bar(f"{name}: grid measured again, median error", _error(measured, again, table))
            for what, predict in (("interpolated", table), ("by step costs", costs)):
                error = _error(measured, between, predict)
                bar = ("at most 10 %", error <= MAX_ERROR) if share in GRID.shares else ()
                bench.bar(f"{name}: {what}, median error", error, *bar)
    bench.bar("contention", profile.contention)
    bench.figures["cells"] = [
        {"cell": str(cell), "measured_s": seconds, "interpolated_s": table(cell), "by_step_costs_s": costs(cell)}
        for cell, seconds in measured.items()
    ]
    return 0 if bench.write() else 1


def _cells() -> list[Cell]:
    return [
        Cell(DEFAULT_MODEL, role, share, batch, length)
        for share in (*GRID.shares, BETWEEN_SHARES)
        for role in Role
        for batch, length in (*BETWEEN[role], *(AGAIN[role] if share in GRID.shares else ()))
    ]


async def _measure(cells: Sequence[Cell]) -> dict[Cell, float]:
    """Median seconds of each cell, in processes as those of the profile."""
    config = MeshConfig()
    (unit,) = config.units
    files = prepare_model(unit.models[0], "panels", cache_dir(), cache_dir(), lambda phase, done, total: None)
    (model,) = profiled_models(config, {unit.name: {DEFAULT_MODEL: files}})
    timers = TimerMesh([model], cache_dir(), {}, None)
    found = {}
    async with timers:
        for share in dict.fromkeys(cell.share for cell in cells):
            of_share = [cell for cell in cells if cell.share == share]
            async with timers.open(of_share) as timer:
                for cell in of_share:
                    samples = await timer.times(cell.role, cell.batch, cell.length, REPEATS, CELL_S)
                    found[cell] = summarize(samples).seconds
    return found


def _by_table(model: ModelProfile) -> Predict:
    table = model.smoothed[1]
    return lambda cell: table.interpolated(cell.role, cell.share, cell.batch, cell.length)


def _by_costs(model: ModelProfile) -> Predict:
    assert model.settings is not None
    budget = model.settings.step_token_budget
    times = MeasuredStepTimes(model.tables[1], budget)

    def predict(cell: Cell) -> float:
        share = cell.share / 100
        if cell.role == Role.PREFILL:
            return sum(times.prefill_s(shape, share) for shape in prefill_steps(cell.batch, cell.length, budget))
        base_s, per_context_s = times.decode_cost(cell.batch, share)
        return base_s + per_context_s * cell.batch * cell.length

    return predict


def _error(measured: dict[Cell, float], cells: Sequence[Cell], predict: Predict) -> float:
    return statistics.median(abs(predict(cell) / measured[cell] - 1) for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
