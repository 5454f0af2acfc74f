"""Writes tiny GGUF files in the layout of llama.cpp, from seeded random models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
_ARCHS = {
    "llama": ("Llama", gguf.MODEL_ARCH.LLAMA),
    "qwen2": ("Qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": ("Qwen3", gguf.MODEL_ARCH.QWEN3),
}


@dataclass(frozen=True)
class TinyGguf:
    """The parameters of a tiny file. ``more`` gets the writer and may add or replace fields and tensors."""

    architecture: str = "llama"
    quantization: Type = Type.F32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 64
    inner: int = 96
    tied: bool = True
    pre: str | None = "smollm"
    merges: tuple[str, ...] = ("h e", "l l")
    claimed_architecture: str | None = None
    """The architecture in the header, if it differs from that of the weights."""
    more: Callable[[Any], None] = field(default=lambda writer: None)


def write_gguf(path: Path, tiny: TinyGguf | None = None) -> Any:
    """Writes the file; returns the transformers model with the dequantized weights of the file."""
    tiny = tiny or TinyGguf()
    name, arch = _ARCHS[tiny.architecture]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(TOKENS), hidden_size=tiny.hidden, intermediate_size=tiny.inner, num_hidden_layers=2,
        num_attention_heads=tiny.heads, num_key_value_heads=tiny.kv_heads, head_dim=tiny.head_dim,
        max_position_embeddings=128, tie_word_embeddings=tiny.tied, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config)
    writer = gguf.GGUFWriter(path, tiny.claimed_architecture or tiny.architecture)
    _write_fields(writer, tiny)
    tiny.more(writer)
    names = gguf.TensorNameMap(arch, 2)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data = torch.randn_like(parameter) * 0.3
        stored = names.get_name(parameter_name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        parameter.data = _add(writer, stored, parameter_name, parameter.data.numpy(), tiny)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def _add(writer: Any, stored: str, name: str, values: np.ndarray, tiny: TinyGguf) -> Any:
    """Stores one tensor as llama.cpp does; returns the values that an import must reproduce."""
    kind = tiny.quantization if values.ndim == 2 else Type.F32
    permuted = values
    for part, heads in (("q_proj", tiny.heads), ("k_proj", tiny.kv_heads)):
        if part in name and tiny.architecture == "llama":
            permuted = values.reshape(heads, 2, tiny.head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
    packed = _quantized(np.ascontiguousarray(permuted), kind)
    writer.add_tensor(stored, packed, raw_dtype=kind)
    read = gguf.dequantize(packed, kind)
    for part, heads in (("q_proj", tiny.heads), ("k_proj", tiny.kv_heads)):
        if part in name and tiny.architecture == "llama":
            read = read.reshape(heads, tiny.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
    exact = kind in {Type.F32, Type.BF16}
    return torch.from_numpy(np.ascontiguousarray(read if exact else read.astype(np.float16).astype(np.float32)))


def _quantized(values: np.ndarray, kind: Type) -> np.ndarray:
    try:
        packed: np.ndarray = gguf.quantize(values, kind)
    except NotImplementedError:  # the package only reads this type; random bytes with small scales are valid
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        packed = np.random.default_rng(values.size).integers(0, 0x2C, shape, dtype=np.uint8)
    return packed


def _write_fields(writer: Any, tiny: TinyGguf) -> None:
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(tiny.hidden)
    writer.add_feed_forward_length(tiny.inner)
    writer.add_head_count(tiny.heads)
    writer.add_head_count_kv(tiny.kv_heads)
    writer.add_key_length(tiny.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(tiny.head_dim)
    writer.add_tokenizer_model("gpt2")
    if tiny.pre is not None:
        writer.add_tokenizer_pre(tiny.pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(tiny.merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
