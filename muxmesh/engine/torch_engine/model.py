"""A Llama forward pass over the prepared image, on a CPU. Matrix products by torch; attention behind a small seam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import Tensor

from muxmesh.engine.torch_engine.attention_cpu import StepLayout
from muxmesh.models.spec import ModelSpec


class Attention(Protocol):
    """Attention over the pool for one layer of one step."""

    def __call__(self, qkv: Tensor, layer: int, layout: StepLayout) -> Tensor:
        """Rotates, stores K and V, attends. [rows, (heads + 2 kv_heads) * head_dim] → [rows, heads * head_dim]."""


class Llama:
    """The weights of one model and its forward pass. Holds no state of any sequence."""

    def __init__(self, spec: ModelSpec, image: Mapping[str, np.ndarray]) -> None:
        weights = {name: torch.from_numpy(array) for name, array in image.items()}
        self._eps = spec.rms_norm_eps
        self._inner = spec.intermediate_size
        self._embed = weights["embed"]
        self._lm_head = weights.get("lm_head", weights["embed"])
        self._norm = weights["norm"]
        names = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
        self._layers = [tuple(weights[f"{layer}.{name}"] for name in names) for layer in range(spec.num_layers)]

    @torch.inference_mode()
    def logits(self, layout: StepLayout, attention: Attention) -> np.ndarray:
        """Computes the rows of a step; returns f32 logits [len(last_rows), vocab_size]."""
        x = F.embedding(torch.from_numpy(layout.token_ids), self._embed)
        for index, (input_norm, qkv, o, post_norm, gate_up, down) in enumerate(self._layers):
            attended = attention(F.linear(self._normed(x, input_norm), qkv), index, layout)
            x = x + F.linear(attended, o)
            inner = F.linear(self._normed(x, post_norm), gate_up)
            x = x + F.linear(F.silu(inner[:, : self._inner]) * inner[:, self._inner :], down)
        if not len(layout.last_rows):
            return np.empty((0, self._lm_head.shape[0]), dtype=np.float32)
        last = x[torch.from_numpy(layout.last_rows)]
        logits: np.ndarray = F.linear(self._normed(last, self._norm), self._lm_head).numpy()
        return logits

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._eps)


def rope_tables(spec: ModelSpec, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cos and sin of each position and frequency, f32 [num_positions, head_dim / 2] (RoFormer, Su et al., 2021)."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), 1.0 / spec.rope_theta**exponents)
    return angles.cos().numpy(), angles.sin().numpy()
