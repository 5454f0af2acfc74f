"""Decode attention alone, on scattered token blocks, against the copy ceiling: from a graph, cold in the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import median_s
from muxmesh.device.kv_view import KvGeometry
from muxmesh.device.torch_device import TorchDevice
from muxmesh.engine.native.cuda.attention import decode_attention
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.models.model_spec import KvShape

BLOCK_SIZE = 16
_BLOCKS_PER_SLAB = 16
_NUM_LAYERS = 4
_COLD_BYTES = 256 << 20
"""What a graph reads at least, so that the cache (50..60 MB) does not hold it until the next replay."""


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """Heads of a model; the pool holds ``pool_tokens`` of `_NUM_LAYERS` layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    pool_tokens: int


class AttentionTimer:
    """A pool of random KV in bf16 and the plan of its kernels."""

    def __init__(self, device: TorchDevice, sizes: AttentionSizes) -> None:
        shape = KvShape(_NUM_LAYERS, sizes.num_kv_heads, sizes.head_dim, BLOCK_SIZE, 2)
        self._device, self._sizes = device, sizes
        layout = KvLayout.of(KvGeometry(shape, _BLOCKS_PER_SLAB * shape.token_block_bytes))
        self.plan = AttentionPlan.of(layout, sizes.num_heads, 2, device.compute_capability, device.num_sms)
        self._num_blocks = sizes.pool_tokens // BLOCK_SIZE
        elements = self._num_blocks * shape.token_block_bytes // 2
        self._pool = torch.empty(elements, dtype=torch.bfloat16, device=device.torch_device).normal_()

    def measure(self, batch: int, context: int, plan: AttentionPlan | None = None) -> dict[str, Any]:
        """Bytes of KV per second of ``batch`` sequences of ``context`` tokens, and microseconds of one layer.

        ``plan``: another than that of the engine.
        """
        plan = plan or self.plan
        sizes, where = self._sizes, self._device.torch_device
        num_bytes = batch * context * sizes.num_kv_heads * 2 * sizes.head_dim * 2
        count = context // BLOCK_SIZE
        num_sets = max(1, min(math.ceil(_COLD_BYTES / num_bytes / _NUM_LAYERS), self._num_blocks // (batch * count)))
        tables = torch.randperm(self._num_blocks, device=where)[: num_sets * batch * count].int()
        tables = tables.view(num_sets, batch, count)
        q = torch.randn(batch, sizes.num_heads, sizes.head_dim, dtype=torch.bfloat16, device=where)
        out = torch.empty_like(q)
        lens = torch.full((batch,), context, dtype=torch.int32, device=where)
        workspace = torch.empty(max(1, plan.workspace_elements(batch, count)), device=where)

        def enqueue() -> None:
            for one in tables:
                self._enqueue_layers(plan, q, one, lens, out, workspace)

        launches = num_sets * _NUM_LAYERS
        seconds = median_s(self._device.capture(enqueue), 10) / launches
        return {"batch": batch, "context": context, "us": 1e6 * seconds, "bytes_s": num_bytes / seconds}

    def _enqueue_layers(
        self, plan: AttentionPlan, q: Tensor, tables: Tensor, lens: Tensor, out: Tensor, workspace: Tensor
    ) -> None:
        for layer in range(_NUM_LAYERS):
            decode_attention(q, self._pool, plan, layer, tables, lens, out, workspace)
