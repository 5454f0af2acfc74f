"""Architecture and sizes of a model, read from the configs in its folder.

Rejects every model that no engine here computes, and names the field. Reads no weights and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from muxmesh.errors import ModelUnsupported
from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import described, read_json_object
from muxmesh.quoting import named

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
HEAD_DIMS = range(16, 257, 2)
_MAX_SIZE = 1 << 24
"""Of vocabulary, hidden and intermediate size: above every known model, and no product of sizes is out of bounds."""
_MAX_LAYERS = 1 << 12
_MAX_HEADS = 1 << 12
_MAX_CONTEXT = (1 << 31) - 1
_MAX_THETA = 1e15
_MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Position interpolation (Chen et al., 2023): every angle is divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """The scaling of Llama 3.1: only wavelengths that are long relative to the original context are stretched."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_len: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    """YaRN (Peng et al., 2023). ``attention_factor`` multiplies cos and sin."""

    factor: float
    original_context_len: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


RopeScaling = LinearRope | Llama3Rope | YarnRope


@dataclass(frozen=True, slots=True)
class KvShape:
    """Shape of one model's KV: all that the pool knows of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype_bytes: int
    is_bfloat16: bool = False
    """Elements of 2 bytes are bfloat16, not float16."""

    @property
    def kv_block_bytes(self) -> int:
        """K and V of one head of one layer for ``block_size`` tokens."""
        return 2 * self.block_size * self.head_dim * self.dtype_bytes

    @property
    def token_block_bytes(self) -> int:
        """The KV blocks of all layers and heads for ``block_size`` tokens of one sequence."""
        return self.num_layers * self.num_kv_heads * self.kv_block_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers and heads."""
        return self.token_block_bytes // self.block_size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and constants of a decoder-only transformer of the Llama family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    context_len: int
    tied_embeddings: bool
    eos_token_ids: frozenset[int]
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    """The Q, K and V projections have a bias (Qwen2)."""
    qk_norm: bool = False
    """Each head of Q and K is normalized before the rotation (Qwen3)."""

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied embedding matrix counts once."""
        q, kv, hidden = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.hidden_size
        layer = hidden * (2 * q + 2 * kv) + 3 * hidden * self.intermediate_size + 2 * hidden
        layer += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return self.num_layers * layer + self.vocab_size * hidden * (1 if self.tied_embeddings else 2) + hidden

    def ended_by(self, eos_token_id: int | None) -> ModelSpec:
        """The spec with one more token that ends an output, if it is one of the vocabulary."""
        if eos_token_id is None or eos_token_id >= self.vocab_size:
            return self
        return replace(self, eos_token_ids=self.eos_token_ids | {eos_token_id})

    def kv_shape(self, block_size: int, dtype: str) -> KvShape:
        """KV shape for ``block_size`` tokens per block; ``dtype`` is a key of `DTYPE_BYTES`."""
        return KvShape(
            self.num_layers, self.num_kv_heads, self.head_dim, block_size, DTYPE_BYTES[dtype], dtype == "bfloat16"
        )


SIM_SPEC = ModelSpec(
    architecture="sim",
    vocab_size=259,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=128,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    context_len=8192,
    tied_embeddings=True,
    eos_token_ids=frozenset({0}),
)
"""The spec of a sim model without a folder. Its vocabulary is that of `tokenizer.byte_tokenizer`."""


def read_model_spec(folder: Path) -> ModelSpec:
    """Reads ``config.json`` and ``generation_config.json``. Raises ModelUnsupported, which names the field."""
    config = read_json_object(folder / "config.json")
    if config is None:
        raise ModelUnsupported(f"{folder}: has no config.json; a model folder in Hugging Face style is needed")
    generation = folder / "generation_config.json"
    return spec_from_config(folder / "config.json", config, read_json_object(generation) or {}, generation)


def spec_from_config(
    origin: Path, config: Mapping[str, Any], generation: Mapping[str, Any], generation_origin: Path | None = None
) -> ModelSpec:
    """Builds the spec from the two configs of a Hugging Face model.

    Raises ModelUnsupported, which names the field and ``origin`` or ``generation_origin``.
    """
    fields = FileFields(origin, config)
    architecture = _architecture(fields)
    rope = _rope(fields)
    _refuse_variants(fields, rope)
    num_heads, hidden_size = fields.needed_integer("num_attention_heads", 1, _MAX_HEADS), _size(fields, "hidden_size")
    vocab_size = _size(fields, "vocab_size")
    for name in ("bos_token_id", "pad_token_id"):  # -1 is "none" in older files
        fields.integer(name, -1, vocab_size - 1)
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=fields.needed_integer("num_hidden_layers", 1, _MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", 1, _MAX_HEADS) or num_heads,
        head_dim=fields.integer("head_dim", 1, _MAX_SIZE) or hidden_size // num_heads,
        intermediate_size=_size(fields, "intermediate_size"),
        rope_theta=rope.number("rope_theta", 1.0, _MAX_THETA)
        or fields.number("rope_theta", 1.0, _MAX_THETA)
        or 10_000.0,
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0) or 1e-6,
        context_len=_context_len(fields),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=_eos_token_ids(fields, FileFields(generation_origin or origin, generation), vocab_size),
        rope_scaling=_rope_scaling(fields, rope),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
    )
    _check_heads(fields, spec)
    return spec


def _architecture(fields: FileFields) -> str:
    given = fields.values.get("architectures")
    if given is not None and not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise fields.refuse("architectures", f"is {described(given)}; must be a list of names")
    architecture = str((given or ["(none)"])[0])
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise fields.refuse(
            "architectures",
            f"architecture {named(architecture)} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}",
        )
    return architecture


def _size(fields: FileFields, name: str) -> int:
    return fields.needed_integer(name, 1, _MAX_SIZE)


def _refuse_variants(fields: FileFields, rope: FileFields) -> None:
    rotated = rope.number("partial_rotary_factor", 0.0, 1.0) or 1.0
    refused = {
        "attention_bias": fields.flag("attention_bias", False),
        "mlp_bias": fields.flag("mlp_bias", False),
        "quantization_config": bool(fields.values.get("quantization_config")),
        "hidden_act other than silu": (fields.text("hidden_act") or "silu") != "silu",
        "partial_rotary_factor": rotated != 1.0 or (fields.number("partial_rotary_factor", 0.0, 1.0) or 1.0) != 1.0,
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ModelUnsupported(f"{fields.origin}: not supported: {', '.join(found)}")


def _check_heads(fields: FileFields, spec: ModelSpec) -> None:
    if spec.head_dim not in HEAD_DIMS:
        raise fields.refuse(
            "head_dim", f"is {spec.head_dim}; supported: even numbers from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        )
    if spec.num_heads % spec.num_kv_heads:
        raise fields.refuse(
            "num_attention_heads",
            f"num_attention_heads ({spec.num_heads}) is not a multiple of num_key_value_heads ({spec.num_kv_heads})",
        )


def _rope(fields: FileFields) -> FileFields:
    """The rope fields. Newer configs keep all of them in ``rope_parameters``."""
    newer = fields.inner("rope_parameters")
    rope = newer if newer.values else fields.inner("rope_scaling")
    for name, value in rope.values.items():
        if isinstance(value, dict) and value:
            raise rope.refuse(name, "parameters for each type of layer are not supported; give one set for all layers")
    return rope


def _rope_scaling(fields: FileFields, rope: FileFields) -> RopeScaling | None:
    kind = rope.text("rope_type") or rope.text("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(_factor(rope))
    original = (
        rope.integer("original_max_position_embeddings", 1, _MAX_CONTEXT)
        or fields.integer("original_max_position_embeddings", 1, _MAX_CONTEXT)
        or fields.needed_integer("max_position_embeddings", 1, _MAX_CONTEXT)
    )
    if kind == "llama3":
        low = rope.needed_number("low_freq_factor", 0.0, _MAX_FACTOR)
        return Llama3Rope(_factor(rope), low, rope.needed_number("high_freq_factor", low, _MAX_FACTOR), original)
    if kind == "yarn":
        if rope.values.get("factor") is None:
            factor = fields.needed_integer("max_position_embeddings", 1, _MAX_CONTEXT) / original
        else:
            factor = _factor(rope)
        beta_slow = rope.number("beta_slow", 0.0, _MAX_FACTOR) or 1.0
        return YarnRope(
            factor=factor,
            original_context_len=original,
            beta_fast=rope.number("beta_fast", beta_slow, _MAX_FACTOR, or_equal=True) or 32.0,
            beta_slow=beta_slow,
            attention_factor=_yarn_attention_factor(factor, rope),
            truncate=rope.flag("truncate", True),
        )
    raise rope.refuse(
        "rope_type",
        f"rope type {named(kind)} is not supported; supported: default, linear, llama3, yarn",
    )


def _factor(rope: FileFields) -> float:
    return rope.needed_number("factor", 0.0, _MAX_FACTOR)


def _yarn_attention_factor(factor: float, rope: FileFields) -> float:
    """Attention factor of YaRN, section 3.4: 0.1 ln(factor) + 1. With both ``mscale`` fields, the ratio of two such."""

    def scaled(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = rope.number("attention_factor", 0.0, _MAX_FACTOR)
    if given is not None:
        return given
    mscale, all_dim = (rope.number(name, 0.0, _MAX_FACTOR, or_equal=True) for name in ("mscale", "mscale_all_dim"))
    if mscale and all_dim:
        return scaled(mscale) / scaled(all_dim)
    return scaled(1.0)


def _context_len(fields: FileFields) -> int:
    """Number of positions that are computed exactly. Up to a sliding window, windowed attention is full attention."""
    length = fields.needed_integer("max_position_embeddings", 1, _MAX_CONTEXT)
    window = fields.integer("sliding_window", 0, _MAX_CONTEXT)
    if window and fields.flag("use_sliding_window", True):
        return min(length, window)
    return length


def _eos_token_ids(config: FileFields, generation: FileFields, vocab_size: int) -> frozenset[int]:
    """Those of the generation config, even if they are null there, else those of the config."""
    of_config = config.integers("eos_token_id", 0, vocab_size - 1)
    of_generation = generation.integers("eos_token_id", 0, vocab_size - 1)
    return frozenset((of_generation if "eos_token_id" in generation.values else of_config) or ())
