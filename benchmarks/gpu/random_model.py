"""Models of the Llama family with random weights, written in seconds as folders in Hugging Face style.

The weights are random and the sizes are real, so speed and exactness can be measured where nothing can be downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from muxmesh.models.model_spec import ModelSpec, spec_from_config
from muxmesh.models.tokenizer import byte_tokenizer
from muxmesh.models.weight_shapes import expected_weights

SAFETENSORS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Sizes of a Llama model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_len: int = 8192
    tied: bool = True
    seed: int = 0

    def config(self, dtype: str) -> dict[str, object]:
        """Content of config.json. No id ends an output but one that a random model hardly samples."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim, "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context_len, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied, "bos_token_id": 1, "eos_token_id": 0, "torch_dtype": dtype,
        }  # fmt: skip

    def spec(self) -> ModelSpec:
        """The spec that the product reads from the config."""
        return spec_from_config(Path("config.json"), self.config("bfloat16"), {})


TINY = RandomModel(
    num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, vocab_size=259,
    context_len=512, tied=False,
)  # fmt: skip
SMALL = RandomModel(
    num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536, vocab_size=49152,
    tied=False,
)  # fmt: skip
"""The sizes of SmolLM2-135M, but with a matrix of its own for the logits: tied, a random model repeats its tokens."""
HALF_BILLION = RandomModel(
    num_layers=24, hidden_size=1024, num_heads=16, num_kv_heads=4, head_dim=64, intermediate_size=4096, vocab_size=65536
)
"""About 0.45 billion parameters."""
BILLION = RandomModel(
    num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64, intermediate_size=8192,
    vocab_size=128_256, context_len=16_384,
)  # fmt: skip
"""The sizes of Llama-3.2-1B."""


def write_random_model(folder: Path, model: RandomModel, dtype: str, device: str = "cpu") -> Path:
    """Writes config, weights of ``dtype`` and the byte tokenizer. ``device`` of torch makes the random numbers.

    Matrices have a standard deviation that keeps the rows' size from layer to layer, so greedy tokens differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config(dtype), indent=1))
    chance = torch.Generator(device).manual_seed(model.seed)
    tensors = {name: _random(shape, chance, device, dtype) for name, shape in expected_weights(model.spec()).items()}
    save_file(tensors, folder / SAFETENSORS, {"format": "pt"})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _random(shape: tuple[int, ...], chance: torch.Generator, device: str, dtype: str) -> torch.Tensor:
    values = torch.randn(shape, generator=chance, device=device)
    values = 1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
    return values.to(getattr(torch, dtype)).cpu()
