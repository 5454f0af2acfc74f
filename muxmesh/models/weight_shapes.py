"""The weights that a model of the supported architectures has, with their names and shapes. Reads no files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_spec import ModelSpec
from muxmesh.quoting import named

Shapes = Mapping[str, tuple[int, ...]]


def expected_weights(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by its name in a folder in Hugging Face style."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    rows = {"q": spec.num_heads * spec.head_dim, "k": spec.num_kv_heads * spec.head_dim}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes |= {f"{attention}{part}_proj.weight": (size, hidden) for part, size in rows.items()}
        if spec.qkv_bias:
            shapes |= {f"{attention}{part}_proj.bias": (size,) for part, size in rows.items()}
        if spec.qk_norm:
            shapes |= {f"{attention}{part}_norm.weight": (spec.head_dim,) for part in "qk"}
        shapes[f"{attention}o_proj.weight"] = (hidden, rows["q"])
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def check_weights(origin: Path, found: Shapes, expected: Shapes) -> None:
    """Raises ModelUnsupported for the first weight that is missing, superfluous or of another shape.

    Ignoring a weight would change the output. Rotary frequencies are computed from the config, and files of tied models
    may repeat the embedding as `lm_head.weight`: these may be there.
    """
    for name, shape in expected.items():
        if name not in found:
            raise ModelUnsupported(f"{origin}: weight {name} is missing")
        if found[name] != shape:
            raise ModelUnsupported(f"{origin}: weight {name} has shape {found[name]}, but the config requires {shape}")
    unknown = sorted(name for name in found.keys() - expected.keys() if not _may_be_there(name))
    if unknown:
        raise ModelUnsupported(
            f"{origin}: {len(unknown)} weights are not part of a supported model: {named(unknown[0])}, ..."
        )


def _may_be_there(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
