"""Workloads of the paper's size, and what systems and ablations change."""

from dataclasses import replace

from benchmarks.muxserve import scale_cases
from benchmarks.muxserve.cases import UnitCase
from benchmarks.muxserve.constants import read_constants
from benchmarks.muxserve.estimators import Estimators, cluster_of
from tests.benchmarks.muxserve.miniature import model, profile

UNIT = UnitCase("u", 1, (model("a"), model("b", decode_share=40)))


def test_the_synthetic_workload_has_nineteen_models_on_32_devices() -> None:
    workload = scale_cases.synthetic(1.0, 0.5, 60.0)
    assert [round(one.rate, 2) for one in workload.loads[:3]] == [20.0, 10.0, 6.67]
    assert sum(workload.spatial_devices.values()) == 32
    units = scale_cases.spatial_units(workload, read_constants())
    assert [unit.models[0].num_requests for unit in units[:2]] == [1200, 600]


def test_temporal_serves_the_same_units_with_the_whole_device() -> None:
    (unit,) = scale_cases.temporal_units([UNIT], read_constants())
    assert (unit.name, unit.mode, unit.strict_order) == ("u", "temporal", True)
    assert {one.decode_share for one in unit.models} == {100}


def test_share_variants_have_the_planned_shares_first_and_none_twice() -> None:
    variants = scale_cases.share_variants(UNIT)
    assert [tuple(one.decode_share for one in unit.models) for unit in variants] == [
        (50, 40), (30, 30), (40, 40), (50, 50), (100, 100),
    ]  # fmt: skip


def test_variants_change_shares_or_the_slo() -> None:
    unit = replace(UNIT, slo_scale=4.0)
    found = scale_cases.variants(unit)
    assert unit in found
    assert len(set(found)) == len(found)
    assert {one.slo_scale for one in found} == set(scale_cases.SLO_SCALES_TRIED)
    assert scale_cases.phases_together(unit) in found


def test_a_longer_unit_has_more_requests() -> None:
    assert [one.num_requests for one in scale_cases.lasting(UNIT, 30.0).models] == [30, 30]


def test_the_pool_has_every_model_alone() -> None:
    workload = scale_cases.synthetic(1.0, 0.5, 1.0)
    constants = read_constants()
    estimators = Estimators(profile(), constants, cluster_of(constants))
    pool = scale_cases.pool_of_units(workload, estimators, constants, 1, 1)
    assert {unit.models[0].name for unit in pool if len(unit.models) == 1} == {one.name for one in workload.loads}
    assert any(len(unit.models) > 1 for unit in pool)


def test_ablations_change_shares_and_sequences() -> None:
    together = scale_cases.phases_together(UNIT)
    assert {(one.prefill_share, one.decode_share) for one in together.models} == {(60, 60)}
    tokens = 100 + 51
    pool = 2 * 10 * tokens * 2 * 2 * 32 * 32 * 128
    assert [one.max_num_seqs for one in scale_cases.static_pool(UNIT, pool).models] == [10, 10]
