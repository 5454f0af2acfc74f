"""Cases from files of measured runs."""

import pytest

from benchmarks.muxserve.constants import read_constants
from benchmarks.muxserve.measured_cases import mean_lengths, measured_case, spatial_devices
from muxmesh.errors import ConfigError
from muxmesh.placement.muxserve_files import MeasuredRun, NamedModel, PlacementInput, PublishedPlacement, PublishedUnit
from tests.benchmarks.muxserve.miniature import measured_model

SYNTHETIC = (
    measured_model("llm-1", device="mesh8idx0"),
    measured_model("llm-0", device="mesh8idx0"),
    measured_model("llm-10", "llama-65b", device="mesh4idx1"),
)
TRACED = measured_model(
    "a", tokens_per_s=400.0, throughput=2.0, num_decode_steps=150, mean_decode_batch=10.0, prefill_share=90,
    decode_share=40,
)  # fmt: skip
PLACEMENT = PlacementInput(
    "trace", 1, 8, (NamedModel("a", "llama-7b", 5.0),), 161, 337,
    (PublishedUnit(4, (PublishedPlacement("a", "llama-7b", 4, 90, 40, 7),)),),
)  # fmt: skip


def test_synthetic_rates_fall_with_the_rank_and_units_are_those_of_the_file() -> None:
    case = measured_case(MeasuredRun("muxserve", SYNTHETIC, 1.0, 0.5), "x", None, read_constants())
    assert [(unit.num_devices, [one.name for one in unit.models]) for unit in case.units] == [
        (8, ["llm-0", "llm-1"]),
        (4, ["llm-10"]),
    ]
    assert [one.rate for one in case.units[0].models] == [20.0, 10.0]
    assert (case.units[1].models[0].prefill_share, case.units[1].models[0].decode_share) == (100, 30)


def test_temporal_has_the_whole_device_in_strict_order() -> None:
    case = measured_case(MeasuredRun("temporal", SYNTHETIC, 1.0, 0.5), "x", None, read_constants())
    unit = case.units[0]
    assert (unit.mode, unit.over_subscription, unit.strict_order) == ("temporal", 0, True)
    assert {(one.prefill_share, one.decode_share) for one in unit.models} == {(100, 100)}


def test_a_traced_model_has_the_rate_of_the_plan_and_lengths_from_its_steps() -> None:
    assert mean_lengths(TRACED) == pytest.approx((200 - 151, 151))
    case = measured_case(MeasuredRun("muxserve", (TRACED,)), "x", PLACEMENT, read_constants())
    (model,) = case.units[0].models
    assert (case.units[0].num_devices, model.rate, model.duration_s) == (4, 5.0, 2.0)
    assert (model.prefill_share, model.decode_share) == (90, 40)


def test_a_run_without_rates_asks_for_the_plan() -> None:
    with pytest.raises(ConfigError, match="a: its rate is not known; give the file of the plan with --plan"):
        measured_case(MeasuredRun("muxserve", (TRACED,)), "x", None, read_constants())


def test_spatial_gives_free_devices_to_the_most_loaded_model() -> None:
    models = (
        NamedModel("hot", "llama-7b", 9.0),
        NamedModel("warm", "llama-7b", 4.0),
        NamedModel("big", "llama-65b", 0.1),
    )
    cluster = PlacementInput("trace", 1, 8, models, 161, 337)
    assert spatial_devices(cluster) == {"hot": 2, "warm": 2, "big": 4}
    with pytest.raises(ConfigError, match="spatial needs 6 devices; the cluster has 4"):
        spatial_devices(PlacementInput("trace", 1, 4, models, 161, 337))
