"""Architecture and sizes of a model, read from the configs in its folder.

Rejects every model that no engine here computes, and names the field. Reads no weights and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_files import read_json_object

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPE_BYTES = {"float32": 4}
HEAD_DIMS = range(16, 257, 2)
_POSITIVE_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "context_len",
)  # fmt: skip


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

    def kv_shape(self, block_size: int, dtype: str) -> KvShape:
        """KV shape for ``block_size`` tokens per block; ``dtype`` is a key of `DTYPE_BYTES`."""
        return KvShape(self.num_layers, self.num_kv_heads, self.head_dim, block_size, DTYPE_BYTES[dtype])


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
    return spec_from_config(folder / "config.json", config, read_json_object(folder / "generation_config.json") or {})


def spec_from_config(origin: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec:
    """Builds the spec from the two configs of a Hugging Face model. Raises ModelUnsupported, which names ``origin``."""
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelUnsupported(
            f"{origin}: architecture {architecture} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    try:
        _refuse_variants(origin, config)
        num_heads = int(config["num_attention_heads"])
        spec = ModelSpec(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
            intermediate_size=int(config["intermediate_size"]),
            rope_theta=float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            context_len=_context_len(config),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=_eos_token_ids(config, generation),
            rope_scaling=_rope_scaling(origin, config),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
        )
    except KeyError as error:
        raise ModelUnsupported(f"{origin}: field {error.args[0]} is missing") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelUnsupported(f"{origin}: a field has a wrong type: {error}") from error
    _check_sizes(origin, spec)
    return spec


def _refuse_variants(origin: Path, config: Mapping[str, Any]) -> None:
    refused = {
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "quantization_config": bool(config.get("quantization_config")),
        "hidden_act other than silu": config.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor": float(_rope(config).get("partial_rotary_factor") or 1.0) != 1.0
        or float(config.get("partial_rotary_factor") or 1.0) != 1.0,
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ModelUnsupported(f"{origin}: not supported: {', '.join(found)}")


def _check_sizes(origin: Path, spec: ModelSpec) -> None:
    for name in _POSITIVE_SIZES:
        if getattr(spec, name) < 1:
            raise ModelUnsupported(f"{origin}: {name} is {getattr(spec, name)}; at least 1 is needed")
    if spec.head_dim not in HEAD_DIMS:
        raise ModelUnsupported(
            f"{origin}: head_dim is {spec.head_dim}; supported: even numbers from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        )
    if spec.num_heads % spec.num_kv_heads:
        raise ModelUnsupported(
            f"{origin}: num_attention_heads ({spec.num_heads}) is not a multiple of num_key_value_heads "
            f"({spec.num_kv_heads})"
        )
    for token_id in sorted(spec.eos_token_ids):
        if not 0 <= token_id < spec.vocab_size:
            raise ModelUnsupported(
                f"{origin}: eos_token_id is {token_id}, which is no token; the model has {spec.vocab_size} (vocab_size)"
            )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope fields. Newer configs keep all of them in ``rope_parameters``."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_scaling(origin: Path, config: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = int(
        rope.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(float(rope["factor"]))
    if kind == "llama3":
        return Llama3Rope(
            float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original
        )
    if kind == "yarn":
        factor = float(rope.get("factor") or int(config["max_position_embeddings"]) / original)
        return YarnRope(
            factor=factor,
            original_context_len=original,
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            attention_factor=_yarn_attention_factor(factor, rope),
            truncate=bool(rope.get("truncate", True)),
        )
    raise ModelUnsupported(f"{origin}: rope type {kind} is not supported; supported: default, linear, llama3, yarn")


def _yarn_attention_factor(factor: float, rope: dict[str, Any]) -> float:
    """Attention factor of YaRN, section 3.4: 0.1 ln(factor) + 1. With both ``mscale`` fields, the ratio of two such."""

    def scaled(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled(float(rope["mscale"])) / scaled(float(rope["mscale_all_dim"]))
    return scaled(1.0)


def _context_len(config: Mapping[str, Any]) -> int:
    """Number of positions that are computed exactly. Up to a sliding window, windowed attention is full attention."""
    length = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        return min(length, int(window))
    return length


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        return frozenset()
    return frozenset(int(token_id) for token_id in (eos if isinstance(eos, list) else [eos]))
