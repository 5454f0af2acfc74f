from pathlib import Path

import pytest

from benchmarks.shared_device.systems import KV_MIB, Model, mesh_config
from muxmesh.config.schema import MeshConfig

MODELS = [Model(name, Path("/models") / name, "lengths=D(1,1)") for name in ("a", "b")]


@pytest.mark.parametrize("system", ["adbs", "temporal", "fcfs", "roundrobin"])
def test_a_shared_unit_has_all_cores_and_all_memory(system: str) -> None:
    config = MeshConfig.model_validate(mesh_config(system, MODELS, 48, [0, 1], slo_scale=8.0))
    (unit,) = config.units
    assert unit.cores == (0, 1)
    assert unit.arbiter.mode == system
    assert unit.kv_pool == KV_MIB << 20
    assert [model.slo.scale for model in unit.models if model.slo] == [8.0, 8.0]


def test_spatial_gives_each_model_a_core_and_an_equal_part_of_the_memory() -> None:
    config = MeshConfig.model_validate(mesh_config("spatial", MODELS, 48, [0, 1]))
    assert [unit.cores for unit in config.units] == [(0,), (1,)]
    assert [[model.name for model in unit.models] for unit in config.units] == [["a"], ["b"]]
    assert sum(unit.kv_pool for unit in config.units) == KV_MIB << 20
    with pytest.raises(ValueError, match="2 models on 1 cores"):
        mesh_config("spatial", MODELS, 48, [0])
