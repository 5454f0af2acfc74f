from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import MeshRuntime, PreparedModel
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.errors import InvalidRequest, ModelNotFound, ModelUnsupported
from muxmesh.models.model_check import check_model
from muxmesh.models.model_spec import SIM_SPEC
from router.served_models import ModelLimits, ServedModels, load_models
from tests.support.pipeline_parts import served_model
from tests.support.tiny import TinyShape, write_tiny_model

TOKEN_BYTES = SIM_SPEC.kv_shape(16, "float32").kv_bytes_per_token


def unit(name: str, *models: dict[str, Any], kv_pool: int = 2**20) -> dict[str, Any]:
    return {"name": name, "kv_pool": kv_pool, "slab": 2**16, "cores": [ord(name[-1])], "models": models}


def runtime(tmp_path: Path, *units: dict[str, Any], folder: Path | None = None) -> MeshRuntime:
    config = MeshConfig.model_validate({"units": units})
    prepared = PreparedModel(folder=folder, image=None, weights_fingerprint="w")
    return MeshRuntime(
        config=config,
        run_dir=tmp_path,
        cache_dir=tmp_path,
        redis_url="unix:///nowhere",
        prepared={unit.name: dict.fromkeys((model.name for model in unit.models), prepared) for unit in config.units},
    )


def sim(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "engine": "sim", **fields}


def test_every_model_of_the_mesh_is_served_with_the_units_that_have_it(tmp_path: Path) -> None:
    served = load_models(runtime(tmp_path, unit("u0", sim("m"), sim("n")), unit("u1", sim("n"), sim("o"))))
    assert {model.name: model.units for model in served} == {"m": ("u0",), "n": ("u0", "u1"), "o": ("u1",)}
    assert served.find("m").text.has_chat_template
    assert served.find("m").spec == SIM_SPEC


def test_the_limits_are_those_of_the_model_and_its_context(tmp_path: Path) -> None:
    mesh = runtime(tmp_path, unit("u0", sim("m"), sim("n", max_model_len=64, default_max_new_tokens=7)))
    served = load_models(mesh)
    pool_tokens = 2**20 // TOKEN_BYTES
    assert served.find("m").limits == ModelLimits(SIM_SPEC.context_len, pool_tokens, 512, frozenset({0}))
    assert served.find("n").limits == ModelLimits(64, pool_tokens, 7, frozenset({0}))


@pytest.mark.parametrize(("setting", "temperature", "most"), [("auto", 0.6, 9), ("ignore", None, 512)])
def test_the_model_s_own_sampling_defaults_apply_unless_they_are_ignored(
    tmp_path: Path, setting: str, temperature: float | None, most: int
) -> None:
    folder = write_tiny_model(tmp_path / "tiny", TinyShape())
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "max_new_tokens": 9}')
    model = sim("m", source="tiny", generation_config=setting)
    served = load_models(runtime(tmp_path, unit("u0", model), folder=folder)).find("m")
    assert served.sampling_defaults.temperature == temperature
    assert served.limits.default_max_new_tokens == most


@pytest.mark.parametrize(
    ("generation", "eos_token", "expected"),
    [
        ('{"eos_token_id": 1}', "<|pad|>", {1, 2}),
        ('{"eos_token_id": null}', "<|pad|>", {2}),
        ('{"eos_token_id": [0, 1]}', "<|eos|>", {0, 1}),
        ('{"eos_token_id": 1}', "<past the vocabulary>", {1}),
    ],
)
def test_an_output_ends_with_the_tokens_of_the_configs_and_that_of_the_tokenizer(
    tmp_path: Path, generation: str, eos_token: str, expected: set[int]
) -> None:
    folder = write_tiny_model(tmp_path / "tiny", TinyShape())
    (folder / "generation_config.json").write_text(generation)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    served = load_models(runtime(tmp_path, unit("u0", sim("m", source="tiny")), folder=folder)).find("m")
    assert served.limits.eos_token_ids == served.spec.eos_token_ids == expected
    assert check_model(folder).spec.eos_token_ids == expected


def test_the_capacity_of_a_model_is_that_of_its_smallest_pool(tmp_path: Path) -> None:
    units = [
        unit("u0", sim("m"), kv_pool=2**22),
        unit("u1", sim("m"), kv_pool=2**20),
        unit("u2", sim("m"), kv_pool=2**21),
    ]
    assert load_models(runtime(tmp_path, *units)).find("m").limits.capacity_tokens == 2**20 // TOKEN_BYTES


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_only_whole_token_blocks_of_a_slab_count_as_capacity(block_size: int) -> None:
    model = ModelConfig.model_validate(sim("m", block_size=block_size))
    block_bytes = SIM_SPEC.kv_shape(block_size, "float32").token_block_bytes
    small = UnitConfig(kv_pool=2**20, slab=3 * block_bytes - 1, models=(model,))
    num_slabs = 2**20 // (3 * block_bytes - 1)
    assert ModelLimits.of(model, SIM_SPEC, [(small, model)]).capacity_tokens == num_slabs * 2 * block_size


def test_a_folder_without_a_tokenizer_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1,'
        '"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 32}'
    )
    mesh = runtime(tmp_path, unit("u0", sim("m", source=str(tmp_path))), folder=tmp_path)
    with pytest.raises(ModelUnsupported, match=r"has no tokenizer\.json"):
        load_models(mesh)


def test_models_come_and_go() -> None:
    served = ServedModels()
    with pytest.raises(ModelNotFound, match=r"^model: 'b' is not served; served: $"):
        served.find("b")
    served.add(served_model("b"))
    served.add(served_model("a"))
    assert [model.name for model in served] == ["b", "a"]
    served.remove("b")
    with pytest.raises(ModelNotFound, match=r"^model: 'b' is not served; served: a$"):
        served.find("b")
    with pytest.raises(ModelNotFound, match=r"^model: 'b' is not served; served: a$"):
        served.remove("b")


def test_an_empty_name_is_the_only_model() -> None:
    served = ServedModels()
    with pytest.raises(ModelNotFound, match=r"^model: '' is not served"):
        served.find("")
    served.add(served_model("a"))
    assert served.find("").name == "a"
    served.add(served_model("b"))
    with pytest.raises(InvalidRequest, match=r"^model: is needed, because the mesh serves several; one of: a, b$"):
        served.find("")


@pytest.mark.parametrize("name", ["", "unknown"])
def test_an_error_lists_twenty_names_at_most(name: str) -> None:
    served = ServedModels()
    for index in range(30):
        served.add(served_model(f"m{index:02}"))
    listed = ", ".join(f"m{index:02}" for index in range(20))
    with pytest.raises((InvalidRequest, ModelNotFound), match=f": {listed} and 10 others$"):
        served.find(name)


def test_a_model_that_is_added_again_replaces_the_one_of_its_name() -> None:
    served = ServedModels()
    served.add(served_model("m", max_model_len=10))
    running = served.find("m")
    served.add(served_model("m", max_model_len=20))
    assert [model.limits.max_model_len for model in served] == [20]
    assert running.limits.max_model_len == 10, "a request that runs keeps the model that it started with"


def test_the_error_for_an_unknown_model_lists_the_served_ones_in_order() -> None:
    served = ServedModels()
    for name in ("c", "a", "b"):
        served.add(served_model(name))
    with pytest.raises(ModelNotFound, match=r"^model: 'x' is not served; served: a, b, c$"):
        served.find("x")
