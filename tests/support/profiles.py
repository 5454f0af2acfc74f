"""Models to profile and measured cells, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.placement.measured_cells import Cell, SampleSummary
from muxmesh.placement.profile import MachineFacts
from muxmesh.profiler.profiled_models import ProfiledModel
from muxmesh.types import Role

MACHINE = MachineFacts("cpu", "A CPU", 1, 8 << 30, 2)


def sim_model(name: str = "m", weights: str = "w", device: str = "cpu", **settings: Any) -> ProfiledModel:
    """A sim model without prepared files; its weights have the fingerprint ``weights``."""
    models = [{"name": name, "engine": "sim", **settings}]
    config = MeshConfig.model_validate({"units": [{"device": device, "models": models}]})
    (unit,) = config.units
    return ProfiledModel(
        unit, unit.models[0], PreparedModel(folder=None, image=None, weights_fingerprint=weights), SIM_SPEC
    )


def cells(model: str, shares: Sequence[int] = (50, 100), batches: Sequence[int] = (1, 4)) -> dict[Cell, SampleSummary]:
    """Measured cells of both roles, at the lengths 64 and 256; longer ones and those of smaller shares take longer."""
    return {
        Cell(model, role, share, batch, length): SampleSummary((batch + length / 64) / share, 0.01, 5, 0)
        for role in Role
        for share in shares
        for batch in batches
        for length in (64, 256)
    }
