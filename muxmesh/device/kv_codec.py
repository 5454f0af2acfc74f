"""Encodes a sequence's KV as bytes outside the pool, exactly (`raw`) or quantized (`int8`). In host memory only.

int8 is symmetric. As in KIVI (Liu et al., ICML'24), K has one scale for each channel, because a few channels are large
in every token, and V has one scale for each token. The scales of K apply to a group of at least `GROUP_TOKENS` tokens,
or to the whole sequence if it is shorter. Decoded int8 differs slightly from the original, so it is never shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from muxmesh.device.kv_view import KvView
from muxmesh.models.model_spec import KvShape
from muxmesh.types import KvFormat, blocks_for

GROUP_TOKENS = 128
_LARGEST = 127.0
_SCALE_BYTES = 4


class Sink(Protocol):
    """Receives the bytes of a copy, in order."""

    def write(self, piece: np.ndarray) -> None:
        """Appends the bytes of ``piece``, which is contiguous, of any dtype and shape."""


class Source(Protocol):
    """Supplies the bytes of a copy, in order."""

    def read_into(self, piece: np.ndarray) -> None:
        """Fills ``piece``, which is contiguous, with the next bytes."""

    def skip(self, num_bytes: int) -> None:
        """Skips the next ``num_bytes`` bytes."""


def encoded_bytes(shape: KvShape, num_tokens: int, kv_format: KvFormat) -> int:
    """Returns the bytes of a copy of ``num_tokens`` tokens. `raw` copies whole token blocks."""
    num_blocks = blocks_for(num_tokens, shape.block_size)
    if kv_format == "raw":
        return num_blocks * shape.token_block_bytes
    heads = shape.num_layers * shape.num_kv_heads
    scales = len(list(groups(shape, num_tokens))) * shape.head_dim + num_blocks * shape.block_size
    return num_blocks * shape.token_block_bytes // shape.dtype_bytes + heads * scales * _SCALE_BYTES


def encode(view: KvView, block_ids: Sequence[int], num_tokens: int, kv_format: KvFormat, sink: Sink) -> None:
    """Writes the KV of the first ``num_tokens`` tokens of the sequence whose token blocks are ``block_ids``."""
    blocks = _blocks(view, block_ids[: blocks_for(num_tokens, view.shape.block_size)])
    if kv_format == "raw":
        for block in blocks:
            sink.write(block)
        return
    for first, end in groups(view.shape, num_tokens):
        data = np.stack(blocks[first:end])
        key, value = _keys(data, view.shape), _values(data, view.shape)
        past_end = end * view.shape.block_size - num_tokens
        if past_end > 0:  # slots that no token was written to may hold anything
            key[-1, :, :, -past_end:] = 0
            value[-1, :, -past_end:] = 0
        with np.errstate(invalid="ignore"):  # a value that is not finite decodes to an arbitrary one
            for part, over in ((key, (0, 3)), (value, (3,))):
                scale = np.abs(part).max(axis=over, keepdims=True) / np.float32(_LARGEST)
                scale[scale == 0] = 1
                sink.write(scale)
                sink.write(np.rint(part / scale).astype(np.int8))


def decode(
    view: KvView, block_ids: Sequence[int], num_tokens: int, kv_format: KvFormat, source: Source, first_block: int = 0
) -> None:
    """Reads what `encode` wrote, into the sequence's token blocks from index ``first_block`` on."""
    shape = view.shape
    blocks = _blocks(view, block_ids[: blocks_for(num_tokens, shape.block_size)])
    if kv_format == "raw":
        source.skip(first_block * shape.token_block_bytes)
        for block in blocks[first_block:]:
            source.read_into(block)
        return
    heads, dim, size = shape.num_layers * shape.num_kv_heads, shape.head_dim, shape.block_size
    for first, end in groups(shape, num_tokens):
        count = end - first
        for part, (scale_shape, piece_shape) in enumerate(
            (
                ((1, heads, dim, 1), (count, heads, dim, size)),
                ((count, heads, size, 1), (count, heads, size, dim)),
            )
        ):
            scale, piece = np.empty(scale_shape, np.float32), np.empty(piece_shape, np.int8)
            source.read_into(scale)
            source.read_into(piece)
            restored = piece * scale
            for index in range(max(first, first_block), end):
                blocks[index].reshape(heads, 2, -1)[:, part] = restored[index - first].reshape(heads, -1)


def groups(shape: KvShape, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of token block indices that share the scales of K. The last range includes the remainder."""
    num_blocks, per_group = blocks_for(num_tokens, shape.block_size), GROUP_TOKENS // shape.block_size
    last = max(0, num_tokens // GROUP_TOKENS - 1)
    for group in range(last + 1):
        yield group * per_group, num_blocks if group == last else (group + 1) * per_group


def _blocks(view: KvView, block_ids: Sequence[int]) -> list[np.ndarray]:
    """Views of the token blocks in the pool."""
    count = view.shape.token_block_bytes // view.pool.itemsize
    return [view.pool[offset : offset + count] for offset in view.block_offsets(block_ids)]


def _keys(data: np.ndarray, shape: KvShape) -> np.ndarray:
    """[blocks, layers * heads, head_dim, block_size], a view of stacked token blocks."""
    heads = shape.num_layers * shape.num_kv_heads
    return data.reshape(len(data), heads, 2, shape.head_dim, shape.block_size)[:, :, 0]


def _values(data: np.ndarray, shape: KvShape) -> np.ndarray:
    """[blocks, layers * heads, block_size, head_dim], a view of stacked token blocks."""
    heads = shape.num_layers * shape.num_kv_heads
    return data.reshape(len(data), heads, 2, shape.block_size, shape.head_dim)[:, :, 1]
