"""Tiny seeded random models in Hugging Face style folders: transformers writes them, and is the reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from muxmesh.engine.kv_view import KvView
from muxmesh.engine.torch_engine.cpu.forward import CpuForward
from muxmesh.engine.torch_engine.cpu.team import Team
from muxmesh.engine.torch_engine.runner import TorchRunner
from muxmesh.models.image import ensure_image
from muxmesh.models.spec import ModelSpec, read_model_spec
from muxmesh.models.tokenizer import byte_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """What differs between the tiny models."""

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    hidden_size: int = 48
    tied: bool = True
    seed: int = 0
    max_position_embeddings: int = 512
    architecture: str = "Llama"
    rope: dict[str, Any] | None = None
    dtype: str = "float32"


def write_tiny_model(folder: Path, shape: TinyShape) -> Path:
    """A model with the byte tokenizer; wide random weights, biases and norms, so that tokens differ."""
    torch.manual_seed(shape.seed)
    more: dict[str, Any] = {"rope_parameters": {"rope_theta": 10_000.0, **shape.rope}} if shape.rope else {}
    config = getattr(transformers, f"{shape.architecture}Config")(
        vocab_size=259,
        hidden_size=shape.hidden_size,
        intermediate_size=96,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=0,
        **more,
    )
    model: Any = getattr(transformers, f"{shape.architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data = torch.randn_like(parameter) * 0.3 + name.endswith("weight")
    model.to(getattr(torch, shape.dtype)).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|eos|>"}))
    return folder


def reference(folder: Path) -> Any:
    """The model in transformers, f32, eager attention."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def tiny_runner(folder: Path, cache: Path, block_size: int = 16, num_slabs: int = 8) -> tuple[TorchRunner, ModelSpec]:
    """A loaded torch runner over a pool of its own, four token blocks to a slab."""
    spec = read_model_spec(folder)
    image = ensure_image(folder, spec, "panels", cache, lambda done, total: None)
    shape = spec.kv_shape(block_size, "float32")
    slab_bytes = 4 * shape.token_block_bytes + 64  # not a multiple: the rest of a slab is left
    # Filled with NaN: a kernel that reads what was not written shows at once.
    pool = np.full(num_slabs * slab_bytes // 4, np.nan, dtype=np.float32)
    team = Team(2)
    view = KvView(pool, shape, slab_bytes)
    runner = TorchRunner(view, lambda view: CpuForward(spec, image, view, spec.context_len, team))
    runner.load()
    return runner, spec
