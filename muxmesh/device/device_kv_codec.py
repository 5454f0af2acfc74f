"""int8 for KV on the device: the rules of `muxmesh.device.kv_codec` for the layout of units on GPUs, by torch.

K and V of a KV block are both [block_size, head_dim] there. The bytes are K's scales, K, V's scales, V for each group
of token blocks, as many as `kv_codec.encoded_bytes` returns. Enqueues only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from muxmesh.models.model_spec import KvShape

_LARGEST = 127.0
_ELEMENTS_AT_ONCE = 1 << 22
"""K or V that is converted to f32 at once: 16 MiB for each temporary tensor."""


def encode_group(blocks: Tensor, shape: KvShape, num_tokens: int) -> Tensor:
    """Returns the bytes (uint8) of a group of token blocks whose first ``num_tokens`` slots hold tokens.

    blocks: [count, layers * heads, 2, block_size, head_dim], of the KV dtype.
    """
    count, heads = blocks.shape[:2]
    past_end = count * shape.block_size - num_tokens
    parts = []
    for part, over in ((0, (0, 2)), (1, (3,))):
        data = torch.empty_like(blocks[:, :, part], dtype=torch.int8, memory_format=torch.contiguous_format)
        scales = torch.empty(_scale_shape(part, count, shape), dtype=torch.float32, device=blocks.device)
        for some in _head_ranges(count, heads, shape):
            values = blocks[:, some, part].float()
            if past_end:  # slots that no token was written to may hold anything
                values[-1, :, -past_end:] = 0
            scale = values.abs().amax(dim=over, keepdim=True) / _LARGEST
            scale = torch.where(scale == 0, 1.0, scale)
            scales[:, some] = scale
            # NaN and infinities decode to arbitrary values.
            data[:, some] = (values / scale).round().nan_to_num().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        parts += [scales.flatten().view(torch.uint8), data.flatten().view(torch.uint8)]
    return torch.cat(parts)


def decode_group(data: Tensor, shape: KvShape, count: int, dtype: torch.dtype) -> Tensor:
    """Returns ``count`` token blocks [count, layers * heads, 2, block_size, head_dim] of ``dtype`` from their bytes."""
    heads = shape.num_layers * shape.num_kv_heads
    blocks = torch.empty((count, heads, 2, shape.block_size, shape.head_dim), dtype=dtype, device=data.device)
    first = 0
    for part in (0, 1):
        scale_shape = _scale_shape(part, count, shape)
        num_scale_bytes = torch.float32.itemsize * math.prod(scale_shape)
        num_bytes = count * heads * shape.block_size * shape.head_dim
        scales = _aligned(data[first : first + num_scale_bytes]).view(torch.float32).view(scale_shape)
        first += num_scale_bytes
        values = data[first : first + num_bytes].view(torch.int8).view(count, heads, shape.block_size, shape.head_dim)
        first += num_bytes
        for some in _head_ranges(count, heads, shape):
            blocks[:, some, part] = (values[:, some].float() * scales[:, some]).to(dtype)
    return blocks


def _scale_shape(part: int, count: int, shape: KvShape) -> tuple[int, int, int, int]:
    """Of K (``part`` 0), one scale for each channel; of V, one for each token."""
    heads = shape.num_layers * shape.num_kv_heads
    return (1, heads, 1, shape.head_dim) if part == 0 else (count, heads, shape.block_size, 1)


def _aligned(data: Tensor) -> Tensor:
    """A view as f32 needs an address that is a multiple of 4."""
    return data if data.storage_offset() % 4 == 0 else data.clone()


def _head_ranges(count: int, heads: int, shape: KvShape) -> Iterator[slice]:
    """Ranges of layers * heads of which K or V fits in the temporary tensors."""
    step = max(1, _ELEMENTS_AT_ONCE // (count * shape.block_size * shape.head_dim))
    for first in range(0, heads, step):
        yield slice(first, min(heads, first + step))
