import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.weight_image import ensure_image, map_image
from tests.support.tiny import TinyShape, write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", TinyShape(tied=False))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""


def test_sizes_are_read(folder: Path) -> None:
    spec = read_model_spec(folder)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.hidden_size) == (2, 4, 2, 16, 48)
    assert (spec.vocab_size, spec.context_len, spec.tied_embeddings) == (259, 512, False)
    assert spec.eos_token_ids == {0}
    assert spec.kv_shape(16, "float32").kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_several_eos_tokens_of_the_generation_config_win(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert read_model_spec(folder).eos_token_ids == {4, 5}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope type longrope is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act other than silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "field hidden_size is missing"),
    ],
)
def test_what_is_not_supported_is_named(folder: Path, changes: dict[str, Any], named: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelUnsupported, match=named):
        read_model_spec(folder)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"has no config\.json"):
        read_model_spec(tmp_path)


def test_the_image_holds_every_weight_once_and_is_made_once(folder: Path, tmp_path: Path) -> None:
    spec = read_model_spec(folder)
    path = ensure_image(folder, spec, "rows", tmp_path, no_progress)
    made_at = path.stat().st_mtime_ns
    assert ensure_image(folder, spec, "rows", tmp_path, no_progress) == path
    assert path.stat().st_mtime_ns == made_at
    image, source = map_image(path), load_file(folder / "model.safetensors")
    assert sum(length for _, length in image.parts.values()) == sum(array.size for array in source.values())
    assert spec.num_parameters == sum(array.size for array in source.values())
    gate_up = np.concatenate([source[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert np.array_equal(image.get("1.gate_up"), gate_up)
    assert np.array_equal(image.get("lm_head"), source["lm_head.weight"])


def test_changed_weights_are_another_image(folder: Path, tmp_path: Path) -> None:
    spec = read_model_spec(folder)
    first = ensure_image(folder, spec, "rows", tmp_path, no_progress)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, folder / "model.safetensors")
    second = ensure_image(folder, spec, "rows", tmp_path, no_progress)
    assert first != second
    assert np.array_equal(map_image(second).get("norm"), map_image(first).get("norm") * 2)


def test_sharded_half_precision_weights_give_the_same_image(folder: Path, tmp_path: Path) -> None:
    spec, weights = read_model_spec(folder), load_file(folder / "model.safetensors")
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    save_file(halves, folder / "model.safetensors")
    whole = map_image(ensure_image(folder, spec, "rows", tmp_path, no_progress))
    (folder / "model.safetensors").unlink()
    names = sorted(halves)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: halves[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = map_image(ensure_image(folder, spec, "rows", tmp_path, no_progress))
    assert whole.parts == sharded.parts
    assert all(np.array_equal(whole.get(name), sharded.get(name)) for name in whole.parts)


def test_weights_that_do_not_fit_the_config_are_named(folder: Path, tmp_path: Path) -> None:
    change_config(folder, intermediate_size=100)
    with pytest.raises(
        ModelUnsupported, match=r"gate_proj\.weight has shape \(96, 48\), config\.json says \(100, 48\)"
    ):
        ensure_image(folder, read_model_spec(folder), "rows", tmp_path, no_progress)


def test_a_missing_weight_is_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelUnsupported, match=r"weight model\.norm\.weight is missing"):
        ensure_image(folder, read_model_spec(folder), "rows", tmp_path, no_progress)
