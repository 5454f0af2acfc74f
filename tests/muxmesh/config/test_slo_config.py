"""The SLO of a model in mesh.yaml: what is valid, and the error for what is not."""

import pytest

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.slo_config import SloConfig
from tests.support.mesh_yaml import problems, units


@pytest.mark.parametrize("slo", [{"ttft_s": 0.5}, {"tpot_s": 0.05}, {"ttft_s": 1, "tpot_s": 0.1}, {"scale": 8}])
def test_a_model_has_limits_in_seconds_or_a_scale(slo: dict[str, float]) -> None:
    model = ModelConfig.model_validate({"name": "m", "slo": slo})
    assert model.slo == SloConfig(**slo)


def test_a_model_has_no_slo_unless_it_is_set() -> None:
    assert ModelConfig(name="m").slo is None


@pytest.mark.parametrize(
    ("slo", "problem"),
    [
        ("{}", "slo: sets no objective; set ttft_s, tpot_s or both, in seconds, or scale, such as scale: 8"),
        (
            "{scale: 8, ttft_s: 1}",
            "slo: scale: contradicts ttft_s: set limits in seconds (ttft_s, tpot_s or both) or scale",
        ),
        (
            "{scale: 8, ttft_s: 1, tpot_s: 1}",
            "slo: scale: contradicts ttft_s and tpot_s: set limits in seconds (ttft_s, tpot_s or both) or scale",
        ),
        ("{scale: 0.5}", "slo.scale: is 0.5; must be at least 1"),
        ("{ttft_s: 0}", "slo.ttft_s: is 0; must be more than 0"),
        ("{tpot_s: -1}", "slo.tpot_s: is -1; must be more than 0"),
        ("{ttft_s: yes}", "slo.ttft_s: is true; must be a number"),
    ],
)
def test_an_slo_that_says_nothing_or_two_things_is_refused_by_name(slo: str, problem: str) -> None:
    (found,) = problems(units(f"models: [{{name: m, slo: {slo}}}]"))
    assert f"units[0].models[0].{problem}" in found
