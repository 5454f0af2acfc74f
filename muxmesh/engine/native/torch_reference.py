"""The forward pass in plain torch, on any device of torch: a second `Forward`, which checks `cpu.forward`.

It uses no kernel of this project: it gathers the KV of each sequence and computes attention as two products and a
softmax. It reads and writes the same pool layout as the compiled pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.rope import rope_tables
from muxmesh.engine.native.step_layout import StepLayout
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.weight_image import Image, map_image


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


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a step, for every layer.

    cos, sin [rows, 1, head_dim / 2]. k_indices, v_indices [rows, kv heads, head_dim]: elements of the pool that store K
    and V of layer 0.
    """

    cos: Tensor
    sin: Tensor
    k_indices: Tensor
    v_indices: Tensor


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One chunk of a step.

    kv_indices [blocks, kv heads * KV block]: elements of the pool with the KV of layer 0. length: tokens up to the last
    row. mask [rows, length]: True where a row attends.
    """

    rows: slice
    kv_indices: Tensor
    length: int
    mask: Tensor


class TorchReferenceForward:
    """A `Forward` of torch operations over an image with packing `rows`.

    On the CPU it uses the pool of ``view``. On another device it allocates a pool of the same size there, which only
    this object uses.
    """

    def __init__(
        self, spec: ModelSpec, image: Path, view: KvView, num_positions: int, device: str | torch.device = "cpu"
    ) -> None:
        self._spec = spec
        self._device = torch.device(device)
        self._block_size = view.shape.block_size
        self._kv_block = 2 * self._block_size * spec.head_dim
        if self._device.type == "cpu":
            self._pool = torch.from_numpy(view.pool)
        else:
            self._pool = torch.zeros(view.pool.size, dtype=torch.float32, device=self._device)
        packed = map_image(image)
        self._layers = [self._layer(packed, layer) for layer in range(spec.num_layers)]
        self._norm = self._tensor(packed, "norm")
        self._lm_head = self._tensor(packed, "lm_head")
        self._embed = self._lm_head if spec.tied_embeddings else self._tensor(packed, "embed")
        self._cos, self._sin = (torch.from_numpy(table).to(self._device) for table in rope_tables(spec, num_positions))

    @torch.inference_mode()
    def logits(self, layout: StepLayout) -> np.ndarray:
        spec = self._spec
        rows, sequences = self._rows(layout), self._sequences(layout)
        x = functional.embedding(self._on_device(layout.token_ids), self._embed)
        for number, layer in enumerate(self._layers):
            normed = self._normalized(x, layer.input_norm)
            x = x + functional.linear(self._attention(number, layer, normed, rows, sequences), layer.o)
            gate, up = functional.linear(self._normalized(x, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        if not len(layout.logit_rows):
            return np.empty((0, spec.vocab_size), dtype=np.float32)
        last = self._normalized(x[self._on_device(layout.logit_rows)], self._norm)
        logits: np.ndarray = functional.linear(last, self._lm_head).cpu().numpy()
        return logits

    def _attention(self, number: int, layer: _Layer, x: Tensor, rows: _Rows, sequences: list[_Sequence]) -> Tensor:
        spec, head_dim = self._spec, self._spec.head_dim
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(len(x), heads + 2 * kv_heads, head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._normalized(q, layer.q_norm), self._normalized(k, layer.k_norm)
        q, k = _rotated(q, rows), _rotated(k, rows)
        layer_offset = number * kv_heads * self._kv_block
        self._pool[rows.k_indices + layer_offset] = k
        self._pool[rows.v_indices + layer_offset] = v
        out = torch.empty_like(q)
        for sequence in sequences:
            out[sequence.rows] = self._attend(q[sequence.rows], layer_offset, sequence)
        return out.view(len(x), heads * head_dim)

    def _attend(self, q: Tensor, layer_offset: int, sequence: _Sequence) -> Tensor:
        """Attention of one chunk: q [rows, heads, head_dim] gives the same shape."""
        kv_heads, head_dim, length = self._spec.num_kv_heads, self._spec.head_dim, sequence.length
        kv = self._pool[sequence.kv_indices + layer_offset].view(-1, kv_heads, 2, self._block_size * head_dim)
        k = kv[:, :, 0].view(-1, kv_heads, head_dim, self._block_size).permute(1, 2, 0, 3).reshape(
            kv_heads, head_dim, -1
        )[..., :length]  # fmt: skip
        v = kv[:, :, 1].view(-1, kv_heads, self._block_size, head_dim).transpose(0, 1).reshape(
            kv_heads, -1, head_dim
        )[:, :length]  # fmt: skip
        group = q.shape[1] // kv_heads
        by_head = q.view(len(q), kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        scores = (by_head @ k).view(kv_heads, group, len(q), length) * head_dim**-0.5
        weights = scores.masked_fill(~sequence.mask, -torch.inf).softmax(-1)
        mixed = weights.view(kv_heads, -1, length) @ v
        by_row: Tensor = mixed.view(kv_heads, group, len(q), head_dim).permute(2, 0, 1, 3).reshape(q.shape)
        return by_row

    def _normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._spec.rms_norm_eps) * weight
        return normed

    def _rows(self, layout: StepLayout) -> _Rows:
        head_dim, block_size = self._spec.head_dim, self._block_size
        positions = self._on_device(layout.positions)
        heads = self._kv_block * torch.arange(self._spec.num_kv_heads, device=self._device)[None, :, None]
        base = self._on_device(layout.row_blocks)[:, None, None] + heads
        in_block = (positions % block_size)[:, None, None]
        columns = torch.arange(head_dim, device=self._device)
        return _Rows(
            cos=self._cos[positions][:, None],
            sin=self._sin[positions][:, None],
            k_indices=base + columns * block_size + in_block,
            v_indices=base + block_size * head_dim + in_block * head_dim + columns,
        )

    def _sequences(self, layout: StepLayout) -> list[_Sequence]:
        sequences = []
        layer_elements = torch.arange(self._spec.num_kv_heads * self._kv_block, device=self._device)
        for table, start, count in zip(layout.tables, layout.starts, layout.lengths, strict=True):
            rows = slice(start, start + count)
            positions = self._on_device(layout.positions[rows])
            length = int(layout.positions[rows][-1]) + 1
            blocks = self._on_device(table[: -(-length // self._block_size)])
            mask = torch.arange(length, device=self._device) <= positions[:, None]
            sequences.append(_Sequence(rows, blocks[:, None] + layer_elements, length, mask))
        return sequences

    def _layer(self, image: Image, layer: int) -> _Layer:
        def optional(name: str) -> Tensor | None:
            return self._tensor(image, f"{layer}.{name}") if f"{layer}.{name}" in image.parts else None

        return _Layer(
            input_norm=self._tensor(image, f"{layer}.input_norm"),
            qkv=self._tensor(image, f"{layer}.qkv"),
            qkv_bias=optional("qkv_bias"),
            q_norm=optional("q_norm"),
            k_norm=optional("k_norm"),
            o=self._tensor(image, f"{layer}.o"),
            post_norm=self._tensor(image, f"{layer}.post_norm"),
            gate_up=self._tensor(image, f"{layer}.gate_up"),
            down=self._tensor(image, f"{layer}.down"),
        )

    def _tensor(self, image: Image, name: str) -> Tensor:
        return torch.from_numpy(image.get(name)).to(self._device)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _rotated(x: Tensor, rows: _Rows) -> Tensor:
    """The half-rotation form of RoPE over x [rows, heads, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * rows.cos - b * rows.sin, b * rows.cos + a * rows.sin], dim=-1)
