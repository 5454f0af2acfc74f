from typing import Any

import pytest

from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.placement.measured_cells import Cell
from muxmesh.profiler.profiled_models import ProfiledModel, pool_bytes, profiled_models
from muxmesh.types import Role
from tests.support.profiles import sim_model


def models_of(*units: dict[str, Any], unit: str | None = None) -> list[ProfiledModel]:
    """Those of units whose models are of the sim engine."""
    parsed = MeshConfig.model_validate({"units": units})
    files = PreparedModel(folder=None, image=None, weights_fingerprint="w")
    prepared = {one.name: {model.name: files for model in one.models} for one in parsed.units}
    return profiled_models(parsed, prepared, unit)


def sim(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "engine": "sim", **settings}


def test_a_model_on_several_units_is_measured_once() -> None:
    found = models_of(
        {"name": "u", "models": [sim("a"), sim("b")]}, {"name": "v", "models": [sim("a", compute_share=50)]}
    )
    assert [(model.unit.name, model.source) for model in found] == [("u", "a"), ("u", "b")]


def test_one_unit_can_be_chosen() -> None:
    units = {"name": "u", "models": [sim("a")]}, {"name": "v", "device": "cuda:0", "models": [sim("b")]}
    assert [model.source for model in models_of(*units, unit="v")] == ["b"]
    with pytest.raises(ConfigError, match=r"different kinds of devices.*--unit: u, v"):
        models_of(*units)
    with pytest.raises(ConfigError, match="--unit: no unit has the name w; units: u, v"):
        models_of(*units, unit="w")


def test_one_model_with_two_settings_is_refused() -> None:
    with pytest.raises(ConfigError, match="a and a are the same model with another block_size;"):
        models_of({"name": "u", "models": [sim("a")]}, {"name": "v", "models": [sim("a", block_size=32)]})


def test_of_several_units_the_one_with_the_largest_batch_counts_and_all_cores_are_used() -> None:
    units = [
        {"name": name, "cores": [index], "models": [sim("a", max_num_seqs=batch)]}
        for index, (name, batch) in enumerate((("u", 4), ("v", 7), ("w", 2)))
    ]
    (model,) = models_of(*units)
    assert (model.unit.name, model.limits.max_num_seqs, model.unit.cores) == ("v", 7, None)


def test_the_pool_of_a_timer_holds_its_largest_cell_and_is_no_larger_than_that_of_the_unit() -> None:
    model = sim_model(max_num_seqs=8)
    small, large = (Cell("m", Role.DECODE, 100, batch, 1024) for batch in (1, 8))
    needed = 8 * (1024 + 96) * model.shape.kv_bytes_per_token
    assert needed <= pool_bytes(model, [small, large]) < needed + model.unit.slab
    assert pool_bytes(model, [small]) == model.unit.slab
    huge = Cell("m", Role.DECODE, 100, 1 << 20, 1024)
    assert pool_bytes(model, [huge]) == model.unit.kv_pool
