"""The limits of a model on a unit."""

from dataclasses import replace

import pytest

from kvstore.unit_model import UnitModel
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.models.model_spec import SIM_SPEC
from tests.kvstore.small_unit import SHAPES


def test_without_a_limit_of_its_own_as_many_sequences_are_resident_as_the_batch_holds() -> None:
    model = UnitModel(SHAPES["a"], 3, 512)
    assert model.resident_limit == 3
    assert replace(model, max_resident_seqs=0).resident_limit == 0
    assert replace(model, max_resident_seqs=9).resident_limit == 9


@pytest.mark.parametrize(("max_model_len", "expected"), [(None, SIM_SPEC.context_len), (100, 100)])
def test_the_limits_of_a_model_come_from_its_configuration(max_model_len: int | None, expected: int) -> None:
    model = ModelConfig(
        name="m", engine="sim", block_size=32, max_num_seqs=5, max_model_len=max_model_len, kv_guaranteed=2**20 + 1
    )
    limits = UnitModel.of(UnitConfig(models=(model,), slab=2**20), model, SIM_SPEC)
    assert (limits.max_num_seqs, limits.max_model_len, limits.guaranteed_slabs) == (5, expected, 2)
    assert limits.shape == SIM_SPEC.kv_shape(32, "float32") and limits.kv_need is None


def test_the_need_of_kv_is_the_rate_of_requests_times_the_size_of_a_token_block() -> None:
    model = ModelConfig(name="m", engine="sim", expected_rate=2.5)
    limits = UnitModel.of(UnitConfig(models=(model,)), model, SIM_SPEC)
    assert limits.kv_need == 2.5 * limits.shape.token_block_bytes
