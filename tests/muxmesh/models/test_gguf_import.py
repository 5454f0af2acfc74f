import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import RopeScalingType
from transformers import AutoModelForCausalLM

from muxmesh.errors import ModelUnsupported
from muxmesh.models.gguf_import import import_gguf, read_gguf
from muxmesh.models.model_spec import LinearRope, Llama3Rope, YarnRope, read_model_spec
from tests.support.gguf_files import TOKENS, TinyGguf, write_gguf

BLOCK_OF_32 = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
BLOCK_OF_256 = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS]


def ignore_progress(done: int, total: int) -> None:
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the file is imported to; does not exist yet."""
    return tmp_path / "folder"


def check_logits(origin: Any, folder: Path) -> None:
    imported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        difference = (imported(token_ids).logits - origin(token_ids).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("kind", BLOCK_OF_32, ids=lambda kind: kind.name)
def test_a_quantized_file_has_the_logits_of_its_dequantized_weights(path: Path, folder: Path, kind: Type) -> None:
    origin = write_gguf(path, TinyGguf(quantization=kind))
    import_gguf(path, folder, ignore_progress)
    check_logits(origin, folder)


@pytest.mark.parametrize("kind", BLOCK_OF_256, ids=lambda kind: kind.name)
def test_a_quantization_with_large_blocks_has_the_logits_of_its_weights(path: Path, folder: Path, kind: Type) -> None:
    tiny = TinyGguf(quantization=kind, hidden=256, inner=256, heads=8, kv_heads=8, head_dim=32)
    origin = write_gguf(path, tiny)
    import_gguf(path, folder, ignore_progress)
    check_logits(origin, folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_imported_architecture_has_the_logits_of_its_origin(
    path: Path, folder: Path, architecture: str, tied: bool
) -> None:
    origin = write_gguf(path, TinyGguf(architecture=architecture, tied=tied))
    import_gguf(path, folder, ignore_progress)
    check_logits(origin, folder)
    assert read_model_spec(folder).tied_embeddings is tied


def test_the_spec_of_a_file_is_that_of_the_imported_folder(path: Path, folder: Path) -> None:
    write_gguf(path, TinyGguf(architecture="qwen3", heads=6, kv_heads=3))
    spec = read_gguf(path).spec
    assert (spec.architecture, spec.num_heads, spec.num_kv_heads, spec.head_dim) == ("Qwen3ForCausalLM", 6, 3, 16)
    assert (spec.vocab_size, spec.context_len, spec.rms_norm_eps) == (len(TOKENS), 128, 1e-5)
    import_gguf(path, folder, ignore_progress)
    assert read_model_spec(folder) == spec


def test_tensor_types_are_listed_once_each(path: Path) -> None:
    write_gguf(path, TinyGguf(quantization=Type.Q8_0))
    assert read_gguf(path).tensor_types == ["F32", "Q8_0"]


def test_progress_counts_tensors(path: Path, folder: Path) -> None:
    write_gguf(path)
    reported: list[tuple[int, int]] = []
    import_gguf(path, folder, lambda *counts: reported.append(counts))
    total = len(read_gguf(path).tensors)
    assert reported == [(done, total) for done in range(1, total + 1)]


def without(*fields: str) -> Callable[[Any], None]:
    """A change of a file: removes fields."""

    def remove(writer: Any) -> None:
        for field in fields:
            del writer.kv_data[0][field]

    return remove


def test_missing_optional_fields_have_the_defaults_of_llama_cpp(path: Path) -> None:
    optional = ("attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.dimension_count")
    write_gguf(path, TinyGguf(kv_heads=4, more=without(*(f"llama.{name}" for name in optional))))
    spec = read_gguf(path).spec
    assert (spec.num_kv_heads, spec.head_dim, spec.rope_theta) == (4, 16, 10_000.0)


def without_control_tokens(writer: Any) -> None:
    writer.add_token_types([1] * len(TOKENS))


def without_any_eos(writer: Any) -> None:
    without_control_tokens(writer)
    without("tokenizer.ggml.eos_token_id")(writer)


@pytest.mark.parametrize(
    ("more", "written"),
    [
        (lambda writer: None, {"eos_token_id": [2, 0]}),
        (lambda writer: writer.add_eot_token_id(1), {"eos_token_id": [2, 1, 0]}),
        (without_control_tokens, {"eos_token_id": 2}),
        (without_any_eos, {}),
    ],
    ids=["control tokens", "end of turn", "one", "none"],
)
def test_every_token_that_ends_an_output_is_in_the_generation_config(
    path: Path, folder: Path, more: Callable[[Any], None], written: dict[str, Any]
) -> None:
    write_gguf(path, TinyGguf(more=more))
    import_gguf(path, folder, ignore_progress)
    assert json.loads((folder / "generation_config.json").read_text()) == written
    assert read_model_spec(folder).eos_token_ids == read_gguf(path).spec.eos_token_ids


def yarn(writer: Any) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def test_yarn_scaling_is_read(path: Path) -> None:
    def more(writer: Any) -> None:
        yarn(writer)
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", 24.0)
        writer.add_float32("llama.rope.scaling.yarn_beta_slow", 2.0)

    write_gguf(path, TinyGguf(more=more))
    rope = read_gguf(path).spec.rope_scaling
    assert isinstance(rope, YarnRope)
    assert (rope.factor, rope.original_context_len, rope.beta_fast, rope.beta_slow) == (4.0, 32, 24.0, 2.0)


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_linear_scaling_of_newer_and_older_files_is_read(path: Path, key: str) -> None:
    def linear(writer: Any) -> None:
        if key.endswith("factor"):
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_float32(key, 4.0)

    write_gguf(path, TinyGguf(more=linear))
    assert read_gguf(path).spec.rope_scaling == LinearRope(4.0)


@pytest.mark.parametrize(
    "more",
    [
        lambda writer: writer.add_rope_scaling_type(RopeScalingType.NONE),
        lambda writer: writer.add_float32("llama.rope.scale_linear", 1.0),
        lambda writer: writer.add_rope_scaling_attn_factors(1.0),
    ],
)
def test_scaling_without_effect_is_no_scaling(path: Path, more: Callable[[Any], None]) -> None:
    write_gguf(path, TinyGguf(more=more))
    assert read_gguf(path).spec.rope_scaling is None


def llama3_factors(factor: float) -> np.ndarray:
    """The factors as llama.cpp computes them: wavelengths over 8192 are stretched, those under 2048 are kept."""
    factors = []
    for pair in range(8):
        wavelength = 2 * np.pi * 10_000.0 ** (pair / 8)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def with_rope_factors(factors: np.ndarray) -> Callable[[Any], None]:
    return lambda writer: writer.add_tensor("rope_freqs.weight", factors)


def test_the_rope_factors_of_llama_3_become_its_scaling(path: Path, folder: Path) -> None:
    write_gguf(path, TinyGguf(more=with_rope_factors(llama3_factors(32.0))))
    rope = read_gguf(path).spec.rope_scaling
    assert isinstance(rope, Llama3Rope) and (rope.factor, rope.original_context_len) == (32.0, 8192)
    import_gguf(path, folder, ignore_progress)
    assert read_model_spec(folder).rope_scaling == rope


def yarn_and_factors(writer: Any) -> None:
    yarn(writer)
    with_rope_factors(llama3_factors(32.0))(writer)


def tensor(name: str, values: np.ndarray | None = None) -> Callable[[Any], None]:
    """A change of a file: adds a tensor."""
    return lambda writer: writer.add_tensor(name, np.ones(8, dtype=np.float32) if values is None else values)


UNSUPPORTED = {
    "architecture mamba is not supported; supported: llama, qwen2, qwen3": TinyGguf(claimed_architecture="mamba"),
    "tokenizer gpt2/tekken is not supported; supported: llama, gpt2/gpt-2": TinyGguf(pre="tekken"),
    "tokenizer gpt2/None is not supported": TinyGguf(pre=None),
    "is no tokenizer that `tokenizers` can read: merge 'h x' has a part": TinyGguf(merges=("h x",)),
    "llama.block_count: is 'many'; must be a whole number": TinyGguf(
        more=lambda writer: writer.add_string("llama.block_count", "many")
    ),
    "is one of 3 parts; merge them": TinyGguf(more=lambda writer: writer.add_uint16("split.count", 3)),
    "llama.block_count: is missing": TinyGguf(more=without("llama.block_count")),
    "llama.embedding_length: is missing": TinyGguf(more=without("llama.embedding_length")),
    "tokenizer.ggml.merges: is missing": TinyGguf(more=without("tokenizer.ggml.merges")),
    "attn_factor is 2.0, not supported": TinyGguf(more=lambda writer: writer.add_rope_scaling_attn_factors(2.0)),
    "rope scaling longrope is not supported; supported: none, linear, yarn": TinyGguf(
        more=lambda writer: writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    ),
    "rope rotates 8 of 16 dimensions": TinyGguf(more=lambda writer: writer.add_rope_dimension_count(8)),
    "is a mixture of experts": TinyGguf(more=lambda writer: writer.add_expert_count(8)),
    "rope_freqs.weight differ from those of Llama 3": TinyGguf(
        more=with_rope_factors(np.full(8, 3.0, dtype=np.float32))
    ),
    "has both rope scaling yarn and rope_freqs.weight": TinyGguf(more=yarn_and_factors),
    "num_attention_heads \\(4\\) is not a multiple of num_key_value_heads \\(3\\)": TinyGguf(
        more=lambda writer: writer.add_head_count_kv(3)
    ),
    "tensor blk.0.ffn_up.bias is not part of a supported llama model": TinyGguf(more=tensor("blk.0.ffn_up.bias")),
    "tensor blk.0.attn_q.bias is not part of a supported llama model": TinyGguf(more=tensor("blk.0.attn_q.bias")),
    "tensor blk.0.attn_q_norm.weight is not part of a supported llama": TinyGguf(
        more=tensor("blk.0.attn_q_norm.weight")
    ),
    "tensor blk.0.attn_q.bias is not part of a supported qwen3 model": TinyGguf(
        architecture="qwen3", more=tensor("blk.0.attn_q.bias")
    ),
    "tensor blk.0.ffn_gate_exps.weight is not part of": TinyGguf(more=tensor("blk.0.ffn_gate_exps.weight")),
    "tensor output.bias is not part of": TinyGguf(more=tensor("output.bias")),
    "tensor blk.2.ffn_up.weight has type I32, which is not supported": TinyGguf(
        more=tensor("blk.2.ffn_up.weight", np.ones(8, dtype=np.int32))
    ),
}


@pytest.mark.parametrize(
    ("problem", "tiny"), UNSUPPORTED.items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_unsupported_file_is_rejected_by_field_before_anything_is_written(
    path: Path, folder: Path, problem: str, tiny: TinyGguf
) -> None:
    write_gguf(path, tiny)
    with pytest.raises(ModelUnsupported, match=problem) as raised:
        import_gguf(path, folder, ignore_progress)
    assert "tiny.gguf: " in str(raised.value)
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all", b"GGUF\x03\x00\x00\x00"])
def test_a_damaged_file_is_named(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelUnsupported, match=r"tiny\.gguf: not a GGUF file, or damaged"):
        read_gguf(path)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.99])
def test_a_truncated_file_is_named(path: Path, fraction: float) -> None:
    write_gguf(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ModelUnsupported, match=r"tiny\.gguf: not a GGUF file, or damaged"):
        read_gguf(path)


@pytest.mark.parametrize("kind", [Type.F16, Type.F32, Type.Q8_0, Type.Q4_1], ids=lambda kind: kind.name)
def test_damaged_weights_are_named(path: Path, folder: Path, kind: Type) -> None:
    write_gguf(path, TinyGguf(quantization=kind, hidden=256, inner=256))
    damaged = next(stored for stored in read_gguf(path).tensors if stored.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[damaged.data_offset : damaged.data_offset + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(ModelUnsupported, match=r"tensor blk\.1\.ffn_up\.weight contains NaN or infinity"):
        import_gguf(path, folder, ignore_progress)
