"""The forward pass on a device of torch: products by torch, what touches the KV pool by Triton kernels.

Enqueues only: never waits for the device and reads nothing back, so that a graph can capture it. Weights and
activations have one dtype; norms, rotation and softmax are computed in f32. Knows no sequences and samples nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from muxmesh.engine.native.cuda.attention import decode_attention, prefill_attention
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan
from muxmesh.engine.native.cuda.device_rows import DeviceRows
from muxmesh.engine.native.cuda.kv_write import write_kv
from muxmesh.engine.native.rope import rope_tables
from muxmesh.models.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, [outputs, inputs] or [outputs]; None for a tensor that the architecture does not have."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class DeviceForward:
    """The forward pass of one model over its weights and the pool, which lie on one device."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        pool: Tensor,
        plan: AttentionPlan,
        num_positions: int,
        workspace: Tensor,
    ) -> None:
        """``weights``: the tensors of an image with packing `rows`, by name (`muxmesh.models.weight_image`).

        ``pool``: the whole pool as elements of the KV dtype. ``num_positions``: the longest sequence. ``workspace``:
        of decode attention, for the most decode rows.
        """
        self._spec = spec
        self._pool = pool
        self._plan = plan
        self._workspace = workspace
        self._layers = [_layer(weights, number) for number in range(spec.num_layers)]
        self._norm = weights["norm"]
        self._lm_head = weights["lm_head"]
        self._embed = self._lm_head if spec.tied_embeddings else weights["embed"]
        cos, sin = (torch.from_numpy(table).to(pool.device) for table in rope_tables(spec, num_positions))
        self._cos, self._sin = cos, sin

    @property
    def own_bytes(self) -> int:
        """Device memory of the rotation tables."""
        return self._cos.nbytes + self._sin.nbytes

    def hidden(self, rows: DeviceRows) -> Tensor:
        """Writes the KV of all rows into the pool. Returns their hidden states before the last norm, [rows, hidden]."""
        x = functional.embedding(rows.token_ids, self._embed)
        cos = self._cos.index_select(0, rows.positions)[:, None]
        sin = self._sin.index_select(0, rows.positions)[:, None]
        for number, layer in enumerate(self._layers):
            attended = self._attention(number, layer, self._normalized(x, layer.input_norm), rows, cos, sin)
            x = x + functional.linear(attended, layer.o)
            gate, up = functional.linear(self._normalized(x, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits of rows of `hidden`, f32 [rows, vocab_size]."""
        return functional.linear(self._normalized(hidden, self._norm), self._lm_head).float()

    def _attention(self, number: int, layer: _Layer, x: Tensor, rows: DeviceRows, cos: Tensor, sin: Tensor) -> Tensor:
        spec, num_rows = self._spec, len(x)
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(num_rows, heads + 2 * kv_heads, spec.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._normalized(q, layer.q_norm), self._normalized(k, layer.k_norm)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        write_kv(self._pool, self._plan.layout, number, k, v, rows.block_ids, rows.positions)
        out = torch.empty_like(q)
        if count := rows.num_decodes:
            decode_attention(
                q[:count], self._pool, self._plan, number, rows.tables[:count], rows.context_lens, out[:count],
                self._workspace,
            )  # fmt: skip
        if rows.tiles is not None:
            prefill_attention(q, self._pool, self._plan, number, rows.tables, rows.tiles, out)
        return out.view(num_rows, heads * spec.head_dim)

    def _normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension; torch computes it in f32."""
        return functional.rms_norm(x, weight.shape, weight, self._spec.rms_norm_eps)


def _layer(weights: Mapping[str, Tensor], number: int) -> _Layer:
    return _Layer(
        input_norm=weights[f"{number}.input_norm"],
        qkv=weights[f"{number}.qkv"],
        qkv_bias=weights.get(f"{number}.qkv_bias"),
        q_norm=weights.get(f"{number}.q_norm"),
        k_norm=weights.get(f"{number}.k_norm"),
        o=weights[f"{number}.o"],
        post_norm=weights[f"{number}.post_norm"],
        gate_up=weights[f"{number}.gate_up"],
        down=weights[f"{number}.down"],
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half-rotation form of RoPE over x [rows, heads, head_dim], in f32; cos, sin [rows, 1, head_dim / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
