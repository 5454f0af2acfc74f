from benchmarks.shared_device.floods import KEPT, sim_setup, virtual_flood
from muxmesh.config.schema import MeshConfig


def test_a_flood_of_one_model_in_virtual_time_leaves_the_others_their_attainment() -> None:
    assert virtual_flood(2.0, 45.0) >= KEPT


def test_the_unit_under_a_flood_has_three_models_with_the_same_slo() -> None:
    parsed = MeshConfig.model_validate(sim_setup(10.0, 1).config)
    assert list(parsed.models()) == ["a", "b", "c"]
    assert {model.slo.scale for model in parsed.models().values() if model.slo} == {8}
