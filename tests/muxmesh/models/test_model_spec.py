import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_spec import (
    SIM_SPEC,
    KvShape,
    LinearRope,
    Llama3Rope,
    ModelSpec,
    YarnRope,
    read_model_spec,
    spec_from_config,
)
from muxmesh.models.tokenizer import byte_tokenizer
from tests.support.tiny import SHAPES, TinyShape, write_tiny_model

ORIGIN = Path("somewhere/config.json")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


def parse(generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    """The spec of `CONFIG` with ``changes``; None removes a field."""
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    return spec_from_config(ORIGIN, config, generation or {})


def test_the_config_of_a_folder_is_read(tmp_path: Path) -> None:
    spec = read_model_spec(write_tiny_model(tmp_path / "model", TinyShape(tied=False)))
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.hidden_size) == (2, 4, 2, 16, 48)
    assert (spec.vocab_size, spec.context_len, spec.tied_embeddings) == (259, 512, False)
    assert spec.eos_token_ids == {0}


def test_a_generation_config_replaces_the_eos_tokens_of_the_config(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", TinyShape())
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert read_model_spec(folder).eos_token_ids == {4, 5}


def test_a_folder_without_a_config_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"has no config\.json"):
        read_model_spec(tmp_path)


@pytest.mark.parametrize("shape", ["gqa", "untied, wide heads", "mistral", "qwen2", "qwen3"])
def test_the_number_of_parameters_is_that_of_transformers(tmp_path: Path, shape: str) -> None:
    folder = write_tiny_model(tmp_path / "model", SHAPES[shape])
    auto_model: Any = AutoModelForCausalLM
    model = auto_model.from_config(AutoConfig.from_pretrained(folder))
    assert read_model_spec(folder).num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "qkv_bias", "qk_norm"), [("Llama", False, False), ("Qwen2", True, False), ("Qwen3", False, True)]
)
def test_the_architecture_decides_about_biases_and_norms(architecture: str, qkv_bias: bool, qk_norm: bool) -> None:
    spec = parse(architectures=[f"{architecture}ForCausalLM"])
    assert (spec.qkv_bias, spec.qk_norm) == (qkv_bias, qk_norm)


def test_missing_optional_fields_have_the_defaults_of_transformers() -> None:
    spec = parse(num_key_value_heads=None)
    assert (spec.num_kv_heads, spec.head_dim) == (4, 16)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.rope_scaling) == (10_000.0, 1e-6, None)
    assert spec.tied_embeddings is False and spec.eos_token_ids == frozenset()


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}}, 1e6),
    ],
)
def test_rope_theta_is_read_from_rope_parameters_first(changes: dict[str, Any], theta: float) -> None:
    assert parse(**changes).rope_theta == theta


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_scaling_is_read_in_its_older_and_newer_form(field: str, kind: str) -> None:
    assert parse(**{field: {kind: "linear", "factor": 4.0}}).rope_scaling == LinearRope(4.0)


def test_llama3_scaling_is_read() -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert parse(rope_parameters=rope).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 64)


def yarn(config: dict[str, Any] | None = None, **fields: Any) -> YarnRope:
    scaling = parse(rope_scaling={"rope_type": "yarn", "factor": 4.0, **fields}, **(config or {})).rope_scaling
    assert isinstance(scaling, YarnRope)
    return scaling


def test_yarn_scaling_has_the_defaults_of_the_paper() -> None:
    scaling = yarn()
    assert (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32, 1, True)
    assert scaling.attention_factor == pytest.approx(0.1 * 1.3862943611 + 1)


def test_the_original_context_of_yarn_is_that_of_its_own_fields_first() -> None:
    top_level = {"original_max_position_embeddings": 128}
    assert yarn(top_level, original_max_position_embeddings=64).original_context_len == 64
    assert yarn(top_level).original_context_len == 128
    assert yarn().original_context_len == 512


def test_a_missing_yarn_factor_is_the_ratio_of_the_contexts() -> None:
    assert yarn(factor=None, original_max_position_embeddings=128).factor == 4.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0}, 0.7),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * 1.3862943611 + 1) / (0.1 * 1.3862943611 + 1)),
        ({"mscale": 2.0}, 0.1 * 1.3862943611 + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_the_attention_factor_of_yarn(fields: dict[str, Any], expected: float) -> None:
    assert yarn(**fields).attention_factor == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "context_len"),
    [
        ({"sliding_window": 100}, 100),
        ({"sliding_window": 1000}, 512),
        ({"sliding_window": 100, "use_sliding_window": False}, 512),
        ({"sliding_window": 0}, 512),
    ],
)
def test_the_context_ends_at_a_sliding_window(changes: dict[str, Any], context_len: int) -> None:
    assert parse(**changes).context_len == context_len


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, {}, {7}),
        ({"eos_token_id": [7, 8, 7]}, {}, {7, 8}),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, {9}),
        ({"eos_token_id": 7}, {"eos_token_id": None}, set()),
        ({}, {"temperature": 0.5}, set()),
    ],
)
def test_eos_tokens(config: dict[str, Any], generation: dict[str, Any], expected: set[int]) -> None:
    assert parse(generation, **config).eos_token_ids == expected


@pytest.mark.parametrize("eos", [-1, 10**6, [0, -1]])
@pytest.mark.parametrize("in_generation_config", [False, True])
def test_an_eos_token_outside_the_vocabulary_is_refused(eos: object, in_generation_config: bool) -> None:
    generation, config = ({"eos_token_id": eos}, {}) if in_generation_config else ({}, {"eos_token_id": eos})
    with pytest.raises(ModelUnsupported, match=r"eos_token_id: is (-1|1000000); from 0 to 99 is needed"):
        parse(generation, **config)


@pytest.mark.parametrize("eos", ["end", [[1]], {"id": 1}])
def test_an_eos_token_that_is_no_number_is_refused(eos: object) -> None:
    with pytest.raises(ModelUnsupported, match=r"eos_token_id: is .*; must be a whole number"):
        parse(eos_token_id=eos)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported; supported: Llama"),
        ({"architectures": []}, r"architecture \(none\) is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope type longrope is not supported"),
        ({"attention_bias": True}, "not supported: attention_bias"),
        ({"mlp_bias": True}, "not supported: mlp_bias"),
        ({"attention_bias": True, "mlp_bias": True}, "not supported: attention_bias, mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act other than silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention: parameters for each type of"),
        ({"rope_scaling": {"chunked_attention": {"factor": 2}}}, "rope_scaling.chunked_attention: parameters for"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor: is missing"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers: is 'many'; must be a whole number"),
        ({"rope_scaling": "linear"}, "rope_scaling: is 'linear'; must be an object"),
        ({"num_attention_heads": 0}, "num_attention_heads: is 0; from 1 to 4096 is needed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: is 0; from 1 to 4096 is needed"),
        ({"num_key_value_heads": -2}, "num_key_value_heads: is -2; from 1 to 4096 is needed"),
        ({"head_dim": 17}, "head_dim: is 17; supported: even numbers from 16 to 256"),
        ({"head_dim": 14}, "head_dim: is 14"),
        ({"head_dim": 258}, "head_dim: is 258"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
    ],
)  # fmt: skip
def test_an_unsupported_model_is_rejected_by_field(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelUnsupported, match=problem) as raised:
        parse(**changes)
    assert str(raised.value).startswith("somewhere/config.json: ")


HUGE = 10**30
BAD_NUMBERS = {
    "whole": [-1, 0, 1.5, 8.0, True, "8", [8], {}, HUGE, float("nan"), float("inf"), float("-inf")],
    "real": [-1.0, True, "8", [8], {}, HUGE, 1e400, float("nan"), float("-inf")],
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
CHECKED: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size", "max_position_embeddings"), ("whole", {})
    ),
    "rope_theta": ("real", {}),
    "rms_norm_eps": ("real", {}),
    **{f"rope_scaling.{name}": ("real", LLAMA3) for name in ("factor", "low_freq_factor", "high_freq_factor")},
    "rope_scaling.original_max_position_embeddings": ("whole", LLAMA3),
    **{f"rope_scaling.{name}": ("real", YARN) for name in ("factor", "beta_fast", "beta_slow", "attention_factor")},
    "rope_parameters.rope_theta": ("real", {"rope_type": "default"}),
    "rope_parameters.partial_rotary_factor": ("real", {"rope_type": "default"}),
}  # fmt: skip
"""Each number of a config → its kind, and the other fields of the object that it is in."""


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, (kind, _) in CHECKED.items() for value in BAD_NUMBERS[kind]], ids=str
)
def test_no_number_of_a_file_is_taken_on_trust(path: str, value: Any) -> None:
    outer, _, name = path.rpartition(".")
    changes = {outer: {**CHECKED[path][1], name: value}} if outer else {name: value}
    with pytest.raises(ModelUnsupported, match=rf"^somewhere/config\.json: {path}: is ") as caught:
        parse(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": "false"}, {"attention_bias": 0}, {"hidden_act": 1}, {"architectures": "Llama"},
        {"architectures": [None]}, {"sliding_window": -1}, {"sliding_window": "4k"}, {"use_sliding_window": "no",
        "sliding_window": 8}, {"bos_token_id": 100}, {"bos_token_id": "<s>"}, {"pad_token_id": 100},
        {"rope_scaling": [1]}, {"rope_scaling": {"rope_type": 3}}, {"rope_parameters": True},
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, {"rope_theta": 1.0}, {"head_dim": HUGE},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_another_kind_is_refused_by_name(changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(ModelUnsupported, match=rf"^somewhere/config\.json: {name}[a-z._]*: is ") as caught:
        parse(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [name for name in CONFIG if name not in {"architectures", "num_key_value_heads"}])
def test_every_required_field_is_named_if_it_is_missing(field: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"somewhere/config.json: {field}: is missing"):
        parse(**{field: None})


def test_kv_sizes_count_k_and_v_of_every_layer_and_head() -> None:
    shape = parse().kv_shape(8, "float32")
    assert shape == KvShape(num_layers=2, num_kv_heads=2, head_dim=16, block_size=8, dtype_bytes=4)
    assert shape.kv_block_bytes == 2 * 8 * 16 * 4
    assert shape.token_block_bytes == 2 * 2 * shape.kv_block_bytes
    assert shape.kv_bytes_per_token == shape.token_block_bytes // 8


def test_kv_bytes_per_token_do_not_depend_on_the_block_size() -> None:
    assert len({parse().kv_shape(block_size, "float32").kv_bytes_per_token for block_size in (8, 16, 32)}) == 1


def test_the_sim_spec_fits_the_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == SIM_SPEC.vocab_size
    assert [tokenizer.id_to_token(token_id) for token_id in SIM_SPEC.eos_token_ids] == ["<|eos|>"]


def test_a_written_config_gives_the_same_spec_as_its_fields(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_model_spec(tmp_path) == parse()
