"""What the workers of `cuda_worker` write into the pool, and attend with. Loads no Triton."""

from __future__ import annotations

import torch

from muxmesh.models.model_spec import SIM_SPEC

SHAPE = SIM_SPEC.kv_shape(16, "float32")
"""Of the model `m` of the unit."""


NUM_HEADS = 2


def random_kv(layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sequence, [tokens, KV heads, head_dim] each: the same in every process."""
    chance = torch.Generator().manual_seed(layer)
    k, v = torch.randn(2, num_tokens, SHAPE.num_kv_heads, SHAPE.head_dim, generator=chance)
    return k, v


def random_q(layer: int) -> torch.Tensor:
    """A query, [1, heads, head_dim]."""
    return torch.randn(1, NUM_HEADS, SHAPE.head_dim, generator=torch.Generator().manual_seed(100 + layer))
