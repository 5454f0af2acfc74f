"""What the requests of a simulated run are judged by."""

import pytest

from loadtest.record import Run
from muxmesh.config.model_config import SimProfile
from muxmesh.config.schema import MeshConfig
from muxmesh.config.slo_config import SloConfig
from simulator.objectives import objectives_of
from simulator.step_times import LinearStepTimes
from tests.support.loadtest_reports import make_record

SIM = {"engine": "sim", "sim": {"base_s": 0.5}}
CONFIG = MeshConfig.model_validate(
    {
        "units": [
            {"name": "u", "cores": [0], "models": [{"name": "a", **SIM, "slo": {"scale": 4}}, {"name": "b", **SIM}]},
            {"name": "v", "cores": [1], "models": [{"name": "a", **SIM, "slo": {"scale": 4}}, {"name": "c", **SIM}]},
        ]
    }
)


def run_of(*models: str | None) -> Run:
    return Run([make_record(index, model=model) for index, model in enumerate(models)])


def test_each_model_that_is_requested_has_the_latency_of_its_own_step_times() -> None:
    slow = LinearStepTimes.of(SimProfile(base_s=2.0))
    found = objectives_of(CONFIG, run_of("a", "b"), {("u", "b"): slow, ("v", "a"): slow})
    assert found.unloaded.keys() == {"a", "b"}
    assert found.unloaded["a"].e2el_s(10, 3) == pytest.approx(0.5 + 3 * 0.5)
    assert found.unloaded["b"].e2el_s(10, 3) == pytest.approx(2.0 + 3 * 2.0)
    assert found.slos == {"a": SloConfig(scale=4)}


def test_a_request_that_names_no_model_is_for_the_first_one() -> None:
    found = objectives_of(CONFIG, run_of(None))
    assert (found.default, list(found.unloaded)) == ("a", ["a"])
