import pytest

from benchmarks.shared_device.loads import planned, streams
from benchmarks.shared_device.tight import MODES, config, virtual
from muxmesh.config.schema import MeshConfig
from muxmesh.types import Role


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_a_mesh_whose_models_have_the_slo(mode: str) -> None:
    parsed = MeshConfig.model_validate(config(mode, 4))
    assert len(parsed.units) == (2 if mode == "spatial" else 1)
    assert [model.slo.scale for model in parsed.models().values() if model.slo] == [4, 4]


def test_spatial_computes_one_worker_of_each_half_at_a_time_at_the_speed_of_half_a_device() -> None:
    parsed = MeshConfig.model_validate(config("spatial", 4))
    assert {unit.arbiter.mode for unit in parsed.units} == {"temporal"}
    assert {model.compute_share.of(role) for model in parsed.models().values() for role in Role} == {50}


def test_every_request_of_a_plan_ends_in_virtual_time() -> None:
    contents = {"a": "lengths=D(40,10)", "b": "lengths=D(40,10)"}
    requests = planned(streams(contents, 1.0, 4.0), 5.0, 1, range(40, 200))
    records = virtual("adbs", 4, requests)
    assert len(records) == len(requests) and all(record.is_ok for record in records)
