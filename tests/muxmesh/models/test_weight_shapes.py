from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.safetensors_folder import FolderWeights
from muxmesh.models.weight_shapes import check_weights, expected_weights
from tests.support.tiny import SHAPES, write_tiny_model

ORIGIN = Path("model")
EXPECTED = {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize("shape", ["gqa", "untied, wide heads", "mistral", "qwen2", "qwen3"])
def test_the_weights_are_those_that_transformers_writes(tmp_path: Path, shape: str) -> None:
    folder = write_tiny_model(tmp_path / "model", SHAPES[shape])
    expected = expected_weights(read_model_spec(folder))
    auto_model: Any = AutoModelForCausalLM
    model = auto_model.from_config(AutoConfig.from_pretrained(folder))
    assert expected == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected == FolderWeights(folder).shapes()


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"a": (2, 3)}, "model: weight b is missing"),
        ({}, "model: weight a is missing"),
        ({"a": (3, 2), "b": (4,)}, r"model: weight a has shape \(3, 2\), but the config requires \(2, 3\)"),
        ({**EXPECTED, "c": (1,), "d\n": (1,)}, r"model: 2 weights are not part of a supported model: c, \.\.\."),
    ],
)
def test_a_weight_that_is_not_as_expected_is_named(found: dict[str, tuple[int, ...]], problem: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"^{problem}$"):
        check_weights(ORIGIN, found, EXPECTED)


def test_some_weights_may_be_there_though_they_are_not_read() -> None:
    more = {"lm_head.weight": (2, 3), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    check_weights(ORIGIN, {**EXPECTED, **more}, EXPECTED)
