"""The profile of a CPU, seen as cores that units divide among themselves. Pure.

A share of the machine's profile is a number of cores. A worker with the share s of a unit on k of C cores computes as a
worker with the share s * k / C of the whole machine. So a profile by share becomes one by number of cores and share,
like that of GPUs by tensor-parallel degree and share, and the same search plans both.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from muxmesh.placement.profile import ModelProfile, Profile
from muxmesh.placement.step_table import Grid, StepTable
from muxmesh.types import Role

_SHARES = (25, 50, 75, 100)


def by_cores(profile: Profile) -> Profile:
    """``profile`` with a table for 1, 2, 4, ... cores and for all. ``machine.num_devices`` is the number of cores."""
    cores = max(1, profile.machine.cores)
    sizes = sorted({*(1 << power for power in range(cores.bit_length())), cores})
    models = {name: _model_by_cores(model, sizes, cores) for name, model in profile.models.items()}
    machine = replace(
        profile.machine, num_devices=cores, memory_bytes=profile.machine.memory_bytes // cores, cores=cores
    )
    return replace(profile, machine=machine, models=models)


def _model_by_cores(model: ModelProfile, sizes: list[int], cores: int) -> ModelProfile:
    whole = model.smoothed[1]
    return replace(model, tables={size: _of_cores(whole, size / cores) for size in sizes}, samples={})


def _of_cores(table: StepTable, part: float) -> StepTable:
    """The table of a unit that has ``part`` of the machine."""

    def grid(role: Role) -> Grid:
        cells = [
            [
                [table.interpolated(role, share * part, batch, length) for length in table.lengths]
                for batch in table.batches
            ]
            for share in _SHARES
        ]
        return np.array(cells)

    return StepTable(_SHARES, table.batches, table.lengths, grid(Role.PREFILL), grid(Role.DECODE))
