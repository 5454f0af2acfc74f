"""The config of a GGUF file of the Llama family, in the form of ``config.json``: sizes, constants and rope scaling.

Knows no tokenizer, and of the weights only the rope factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from muxmesh.errors import ModelUnsupported
from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import described
from muxmesh.quoting import named

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Class of each supported architecture in transformers."""
_ROPE_DEFAULTS = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": -1.0, "yarn_log_multiplier": 0.0}
"""Fields of rope scaling that no engine implements. A file with another value than the default is rejected."""
_MAX_SIZE = 1 << 24
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""Parameters of every Llama 3.1 and 3.2. A GGUF file holds only the factors that are computed from them."""


def config_of_gguf(fields: FileFields, name: str, tensors: list[Any]) -> dict[str, Any]:
    """The content of ``config.json``. ``name`` is the architecture, a key of `ARCHITECTURES`.

    Raises ModelUnsupported, which names the field, for a variant that no engine computes.
    """

    def size(key: str) -> int:
        return fields.needed_integer(f"{name}.{key}", 1, _MAX_SIZE)

    heads, hidden = size("attention.head_count"), size("embedding_length")
    head_dim = fields.integer(f"{name}.attention.key_length", 1, _MAX_SIZE) or hidden // heads
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": len(fields.values["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer(f"{name}.attention.head_count_kv", 1, heads) or heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.needed_integer(f"{name}.context_length", 1, (1 << 31) - 1),
        "rms_norm_eps": round(fields.needed_number(f"{name}.attention.layer_norm_rms_epsilon", 0.0, 1.0), 10),
        "rope_theta": fields.number(f"{name}.rope.freq_base", 1.0, 1e15) or 10_000.0,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in tensors),
        "bos_token_id": fields.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.values.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
    }
    _refuse_variants(fields, name, head_dim)
    scaling, llama3 = _rope_scaling(fields, name), _llama3_scaling(fields.origin, tensors, config)
    if scaling and llama3:
        raise ModelUnsupported(f"{fields.origin}: has both rope scaling {scaling['rope_type']} and {ROPE_FACTORS}")
    if scaling := scaling or llama3:
        config["rope_scaling"] = scaling
    return config


def _refuse_variants(fields: FileFields, name: str, head_dim: int) -> None:
    rotated = fields.integer(f"{name}.rope.dimension_count", 0, _MAX_SIZE)
    if rotated is not None and rotated != head_dim:
        raise fields.refuse(
            f"{name}.rope.dimension_count", f"rope rotates {rotated} of {head_dim} dimensions, which is not supported"
        )
    if fields.integer(f"{name}.expert_count", 0, _MAX_SIZE):
        raise fields.refuse(f"{name}.expert_count", "is a mixture of experts, which is not supported")


def _rope_scaling(fields: FileFields, name: str) -> dict[str, Any] | None:
    prefix = f"{name}.rope.scaling."
    for key, default in _ROPE_DEFAULTS.items():
        value = fields.values.get(prefix + key, default)
        if value != default:
            raise fields.refuse(prefix + key, f"{key} is {described(value)}, not supported")
    old = fields.number(f"{name}.rope.scale_linear", 0.0, 1e6) or 1.0  # files without a scaling type
    kind = fields.text(f"{prefix}type") or ("none" if old == 1.0 else "linear")
    if kind == "none":
        return None
    if kind not in {"linear", "yarn"}:
        raise fields.refuse(
            f"{prefix}type", f"rope scaling {named(kind)} is not supported; supported: none, linear, yarn"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.number(f"{prefix}factor", 0.0, 1e6) or old}
    for key, hf_key in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if prefix + key in fields.values:
            scaling[hf_key] = fields.values[prefix + key]
    return scaling


def _llama3_scaling(path: Path, tensors: list[Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """The Llama 3 scaling behind stored rope factors, or None without factors.

    Recomputes the factors and compares: raises ModelUnsupported if they differ from those in the file.
    """
    stored = next((tensor for tensor in tensors if tensor.name == ROPE_FACTORS), None)
    if stored is None:
        return None
    factors = np.asarray(stored.data, dtype=np.float64).reshape(-1)
    pairs = config["head_dim"] // 2
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(pairs) / pairs)
    factor = float(factors.max())
    if not (0.0 < factor < 1e6 and np.isfinite(factors).all()):
        raise ModelUnsupported(f"{path}: {ROPE_FACTORS} has values that are no factors")
    smooth = np.clip((_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelUnsupported(f"{path}: {ROPE_FACTORS} differ from those of Llama 3, which is not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
