"""Three models in virtual time."""

import pytest

from benchmarks.shared_device.outcome import median_ratio
from benchmarks.shared_device.three import RATES, SYSTEMS, config, outcomes
from loadtest.slo import Unloaded
from muxmesh.config.schema import MeshConfig

UNLOADED = dict.fromkeys(("full", "cut", "small"), Unloaded(0.1, 0.0, 0.02))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_serves_three_models_with_the_same_memory(system: str) -> None:
    units = MeshConfig.model_validate(config(system)).units
    assert [model.name for unit in units for model in unit.models] == ["full", "cut", "small"]
    assert sum(unit.kv_pool for unit in units) == 768 * 2**20


def test_a_shared_device_serves_more_of_the_popular_model_than_a_third_of_it() -> None:
    found = outcomes(2.1, RATES[2.1][1], UNLOADED, seeds=(19,))  # about the capacity of the device
    assert [one.system for one in found] == list(SYSTEMS)
    assert not any(one.failed for one in found)
    assert median_ratio(found, "adbs", "spatial", "throughput") > 1.2
