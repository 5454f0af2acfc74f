"""What a model is, read from its folder. Refuses by name what no engine here computes. No weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxmesh.errors import ModelUnsupported

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
DTYPE_BYTES = {"float32": 4}


@dataclass(frozen=True, slots=True)
class KvShape:
    """Shape of one model's KV: what the pool needs to know of a model."""

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
        """All KV blocks of ``block_size`` tokens of one sequence."""
        return self.num_layers * self.num_kv_heads * self.kv_block_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of one token."""
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

    def kv_shape(self, block_size: int, dtype: str) -> KvShape:
        """Shape of this model's KV for a block size and a dtype of `DTYPE_BYTES`."""
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


def read_model_spec(folder: Path) -> ModelSpec:
    """Reads ``config.json`` and ``generation_config.json``; raises ModelUnsupported naming what does not fit."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelUnsupported(f"{folder}: has no config.json; a model folder in Hugging Face style is needed")
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelUnsupported(
            f"{folder}: architecture {architecture} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _refuse_variants(folder, config)
    try:
        num_heads = int(config["num_attention_heads"])
        return ModelSpec(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
            intermediate_size=int(config["intermediate_size"]),
            rope_theta=_rope_theta(config),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            context_len=int(config["max_position_embeddings"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=_eos_token_ids(folder, config),
        )
    except KeyError as error:
        raise ModelUnsupported(f"{folder}/config.json: field {error.args[0]} is missing") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelUnsupported(f"{path}: not JSON: {error}") from error
    return content


def _refuse_variants(folder: Path, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    refused = {
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "quantization_config": bool(config.get("quantization_config")),
        "hidden_act other than silu": config.get("hidden_act", "silu") != "silu",
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "partial_rotary_factor": float(config.get("partial_rotary_factor") or 1.0) != 1.0,
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ModelUnsupported(f"{folder}/config.json: not supported: {', '.join(found)}")


def _rope_theta(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    generation = _read_json(folder / "generation_config.json") or {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset({int(eos)})
