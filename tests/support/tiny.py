"""Writes tiny seeded random models as Hugging Face style folders; transformers writes them and is the reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.cpu.forward import open_cpu_forward
from muxmesh.engine.native.cpu.thread_team import Team
from muxmesh.engine.native.logits_runner import LogitsRunner
from muxmesh.models.model_spec import ModelSpec, read_model_spec
from muxmesh.models.tokenizer import byte_tokenizer, load_text_model
from muxmesh.models.weight_image import ensure_image

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """The parameters of a tiny model."""

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


SHAPES = {
    "gqa": TinyShape(),
    "mha": TinyShape(num_heads=3, num_kv_heads=3, head_dim=16, seed=1),
    "one kv head": TinyShape(num_heads=6, num_kv_heads=1, head_dim=32, num_layers=3, seed=2),
    "untied, wide heads": TinyShape(num_heads=2, num_kv_heads=1, head_dim=64, tied=False, seed=3),
    "odd head size": TinyShape(num_heads=2, num_kv_heads=2, head_dim=26, hidden_size=40, seed=4),
    "head size 80": TinyShape(num_heads=4, num_kv_heads=2, head_dim=80, seed=5),
    "head size 256": TinyShape(num_heads=2, num_kv_heads=1, head_dim=256, seed=6),
    "mistral": TinyShape(architecture="Mistral", seed=7),
    "qwen2": TinyShape(architecture="Qwen2", head_dim=16, hidden_size=64, seed=8),
    "qwen3": TinyShape(architecture="Qwen3", tied=False, seed=9),
    "rope linear": TinyShape(rope={"rope_type": "linear", "factor": 4.0}, seed=10),
    "rope llama3": TinyShape(
        head_dim=64,
        rope={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        seed=11,
    ),
    "rope yarn": TinyShape(
        head_dim=64, rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, seed=12
    ),
    "half precision": TinyShape(dtype="float16", seed=13),
    "bfloat16": TinyShape(dtype="bfloat16", tied=False, seed=14),
}


def write_tiny_model(folder: Path, shape: TinyShape) -> Path:
    """Writes a model with the byte tokenizer. Weights, biases and norms vary enough that greedy tokens differ."""
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
    """Loads the model in transformers in f32 with eager attention."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def greedy_tokens(folder: Path, prompt: str, num_tokens: int) -> list[int]:
    """The greedy output of the reference for a text."""
    prompt_ids = load_text_model(folder).encode(prompt, True)
    generated: Any = reference(folder).generate(
        torch.tensor([prompt_ids]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=2
    )
    return [int(token) for token in generated[0, len(prompt_ids) :]]


def tiny_view(spec: ModelSpec, block_size: int = 16, num_slabs: int = 8) -> KvView:
    """A new pool of four token blocks per slab, filled with NaN, so that a read of unwritten KV shows in the result."""
    shape = spec.kv_shape(block_size, "float32")
    slab_bytes = (
        4 * shape.token_block_bytes + 64
    )  # not a multiple of the token block, so the end of each slab is unused
    return KvView(shape, slab_bytes, np.full(num_slabs * slab_bytes // 4, np.nan, dtype=np.float32))


def tiny_runner(
    folder: Path, cache: Path, block_size: int = 16, num_slabs: int = 8, view: KvView | None = None
) -> tuple[LogitsRunner, ModelSpec]:
    """A loaded runner of the native engine with two threads, over ``view`` or a new pool; and the spec of its model."""
    spec = read_model_spec(folder)
    image = ensure_image(folder, spec, "panels", cache, lambda done, total: None)
    team = Team(2)
    runner = LogitsRunner(
        view or tiny_view(spec, block_size, num_slabs),
        lambda view: open_cpu_forward(spec, image, view, spec.context_len, team),
    )
    runner.load()
    return runner, spec
