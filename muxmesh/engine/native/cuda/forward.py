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
from muxmesh.engine.native.cuda.row_kernels import HeadNorms, rotate_and_write, silu_and_multiply
from muxmesh.engine.native.rope import rope_tables
from muxmesh.models.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, [outputs, inputs] or [outputs]; None for a tensor that the architecture does not have."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: HeadNorms | None
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
        self._layers = [_layer(weights, number, spec) for number in range(spec.num_layers)]
        self._norm = weights["norm"]
        self._lm_head = weights["lm_head"]
        self._embed = self._lm_head if spec.tied_embeddings else weights["embed"]
        cos, sin = (torch.from_numpy(table).to(pool.device) for table in rope_tables(spec, num_positions))
        self._cos, self._sin = cos, sin

    def hidden(self, rows: DeviceRows) -> Tensor:
        """Writes the KV of all rows into the pool. Returns their hidden states before the last norm, [rows, hidden]."""
        x = functional.embedding(rows.token_ids, self._embed)
        for number, layer in enumerate(self._layers):
            x.addmm_(self._attention(number, layer, self._normalized(x, layer.input_norm), rows), layer.o.t())
            gate_up = functional.linear(self._normalized(x, layer.post_norm), layer.gate_up)
            gated = torch.empty((len(x), self._spec.intermediate_size), dtype=x.dtype, device=x.device)
            silu_and_multiply(gate_up, gated)
            x.addmm_(gated, layer.down.t())
        return x

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Writes the logits of rows of `hidden` to ``out``, f32 [rows, vocab_size]."""
        out.copy_(functional.linear(self._normalized(hidden, self._norm), self._lm_head))

    def _attention(self, number: int, layer: _Layer, x: Tensor, rows: DeviceRows) -> Tensor:
        """Writes the KV of a layer and attends to it. Returns [rows, heads * head_dim]."""
        spec, num_rows = self._spec, len(x)
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias)
        q = torch.empty((num_rows, spec.num_heads, spec.head_dim), dtype=x.dtype, device=x.device)
        rotate_and_write(
            qkv.view(num_rows, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim), layer.head_norms,
            self._cos, self._sin, rows.positions, rows.block_ids, self._pool, self._plan.layout, number, q,
        )  # fmt: skip
        out = torch.empty_like(q)
        if count := rows.num_decodes:
            decode_attention(
                q[:count], self._pool, self._plan, number, rows.tables[:count], rows.context_lens, out[:count],
                self._workspace,
            )  # fmt: skip
        if rows.tiles is not None:
            prefill_attention(q, self._pool, self._plan, number, rows.tables, rows.tiles, out)
        return out.view(num_rows, spec.num_heads * spec.head_dim)

    def _normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension; torch computes it in f32."""
        return functional.rms_norm(x, weight.shape, weight, self._spec.rms_norm_eps)


def _layer(weights: Mapping[str, Tensor], number: int, spec: ModelSpec) -> _Layer:
    norms = None
    if spec.qk_norm:
        norms = HeadNorms(weights[f"{number}.q_norm"], weights[f"{number}.k_norm"], spec.rms_norm_eps)
    return _Layer(
        input_norm=weights[f"{number}.input_norm"],
        qkv=weights[f"{number}.qkv"],
        qkv_bias=weights.get(f"{number}.qkv_bias"),
        head_norms=norms,
        o=weights[f"{number}.o"],
        post_norm=weights[f"{number}.post_norm"],
        gate_up=weights[f"{number}.gate_up"],
        down=weights[f"{number}.down"],
    )
