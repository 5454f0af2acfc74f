"""Converts a GGUF file of the Llama family into a Hugging Face style folder: weights, configs, tokenizer.

transformers loads the folder, which makes it the reference for exactness. Quantized weights become f16, whose rounding
error is far below that of the quantization; f32 and bf16 weights become f32. Knows no cache and no download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from muxmesh.errors import ModelUnsupported
from muxmesh.models.chat_template import ChatTemplate
from muxmesh.models.file_fields import FileFields
from muxmesh.models.gguf_config import ARCHITECTURES, ROPE_FACTORS, config_of_gguf
from muxmesh.models.gguf_header import check_gguf_header
from muxmesh.models.gguf_tokenizer import build_tokenizer, check_tokenizer, eos_token_ids
from muxmesh.models.model_files import described
from muxmesh.models.model_spec import ModelSpec, spec_from_config
from muxmesh.models.safetensors_folder import write_safetensors
from muxmesh.models.tokenizer import refusing_tokenizer
from muxmesh.models.weight_shapes import check_weights, expected_weights
from muxmesh.quoting import named

CONVERSION_VERSION = 3
"""Part of the names of converted folders. Raise it with every change of what `import_gguf` writes."""

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_KEPT_IN_F32 = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)
_LAYER_NAME_PARTS = 4


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file with a supported header. ``config`` is the content of ``config.json`` after the conversion."""

    path: Path
    fields: dict[str, Any]
    tensors: list[Any]
    config: dict[str, Any]
    spec: ModelSpec
    chat_template: ChatTemplate | None

    @property
    def tensor_types(self) -> list[str]:
        """Names of the tensor types in the file, as GGUF calls them, sorted."""
        return sorted({tensor.tensor_type.name for tensor in self.tensors})


def read_gguf(path: Path) -> GgufModel:
    """Reads and checks the header; maps the weights. Raises ModelUnsupported, which names the field or the tensor."""
    check_gguf_header(path)
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelUnsupported(f"{path}: not a GGUF file, or damaged: {error}") from error
    found = FileFields(path, fields)
    architecture = found.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise found.refuse(
            "general.architecture",
            f"architecture {named(str(architecture))} is not supported; supported: {', '.join(ARCHITECTURES)}",
        )
    if (parts := found.integer("split.count", 0, 1 << 16) or 0) > 1:
        raise found.refuse("split.count", f"is one of {parts} parts; merge them into one file")
    check_tokenizer(found)
    for tensor in reader.tensors:
        _check_tensor(path, tensor, architecture)
    config = config_of_gguf(found, architecture, reader.tensors)
    spec = spec_from_config(path, config, {"eos_token_id": eos_token_ids(fields)})
    shapes = {tensor.name: _shape(tensor) for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    check_weights(path, shapes, {_gguf_name(name): shape for name, shape in expected_weights(spec).items()})
    with refusing_tokenizer(path):
        build_tokenizer(fields)
    return GgufModel(path, fields, list(reader.tensors), config, spec, _chat_template(found))


def import_gguf(gguf: Path, folder: Path, progress: Callable[[int, int], None], with_weights: bool = True) -> None:
    """Writes the new ``folder`` from the file ``gguf``; ``progress`` gets (tensors done, tensors in total).

    Without ``with_weights`` it has configs and tokenizer only. Raises ModelUnsupported; after an error in the weights
    the folder is incomplete.
    """
    model = read_gguf(gguf)
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", model.config)
    eos = eos_token_ids(model.fields)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {})
    _write_tokenizer(folder, model.fields)
    if not with_weights:
        return
    kept = [tensor for tensor in model.tensors if tensor.name != ROPE_FACTORS]
    shapes = {_hf_name(tensor.name): (_dtype(tensor), _shape(tensor)) for tensor in kept}

    def values() -> Iterator[np.ndarray]:
        for done, tensor in enumerate(kept):
            with np.errstate(all="ignore"):  # what overflows is refused below
                weights = dequantize(tensor.data, tensor.tensor_type).astype(_dtype(tensor))
            if not np.isfinite(weights).all():
                raise ModelUnsupported(
                    f"{gguf.name}: tensor {named(tensor.name)} contains NaN or infinity; the file is damaged"
                )
            yield _unpermuted(tensor.name, weights, model.config)
            progress(done + 1, len(kept))

    write_safetensors(folder / "model.safetensors", shapes, values())


def _dtype(tensor: Any) -> np.dtype[Any]:
    return np.dtype(np.float32 if tensor.tensor_type in _KEPT_IN_F32 else np.float16)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _check_tensor(path: Path, tensor: Any, architecture: str) -> None:
    """Raises ModelUnsupported for a tensor that the architecture does not have, or of a type that cannot be read."""
    if not _is_known(tensor.name.split("."), architecture):
        raise ModelUnsupported(
            f"{path.name}: tensor {named(tensor.name)} is not part of a supported {architecture} model"
        )
    try:
        with np.errstate(all="ignore"):
            dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelUnsupported(
            f"{path.name}: tensor {named(tensor.name)} has type {tensor.tensor_type.name}, which is not supported"
        ) from error


def _is_known(parts: list[str], architecture: str) -> bool:
    if parts[0] != "blk" or len(parts) != _LAYER_NAME_PARTS:
        return ".".join(parts) == ROPE_FACTORS or (parts[0] in _GLOBAL_TENSORS and parts[1:] == ["weight"])
    _, _, name, kind = parts
    if kind == "bias":
        return architecture == "qwen2" and name in {"attn_q", "attn_k", "attn_v"}
    if name in {"attn_q_norm", "attn_k_norm"} and architecture != "qwen3":
        return False
    return kind == "weight" and name in _LAYER_TENSORS


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.{parts[3]}"
    return f"{_GLOBAL_TENSORS[parts[0]]}.{parts[1]}"


def _unpermuted(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Undoes llama.cpp's permutation of the Q and K rows of a Llama; other architectures are not permuted.

    llama.cpp stores the two rows of each rotated pair side by side. Hugging Face stores all first rows of a head, then
    all second rows.
    """
    if config["model_type"] != "llama" or not (".attn_q." in name or ".attn_k." in name):
        return values
    heads = config["num_attention_heads"] if ".attn_q." in name else config["num_key_value_heads"]
    rows, *columns = values.shape
    paired = values.reshape(heads, rows // heads // 2, 2, *columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(values.shape))


def _gguf_name(name: str) -> str:
    """The inverse of `_hf_name`."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{next(ours for ours, theirs in _GLOBAL_TENSORS.items() if theirs == stem)}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{next(ours for ours, theirs in _LAYER_TENSORS.items() if theirs == part)}.{kind}"


def _chat_template(fields: FileFields) -> ChatTemplate | None:
    source = fields.values.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        return ChatTemplate("", {}, f"tokenizer.chat_template is {described(source)}; must be a string")
    return ChatTemplate(source, _named_tokens(fields.values))


def _named_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return {f"{name}_token": tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    build_tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": fields.get("tokenizer.chat_template"),
            **_named_tokens(fields),
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False))
