"""How attention is divided among the programs of a GPU: tile sizes, splits of the context, tiles of prompt chunks.

Pure arithmetic on the host: everything here depends on shapes, lengths and the kind of device, never on a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.engine.native.cuda.kv_layout import KvLayout

_CTAS_PER_SM = 2
"""Programs of decode attention that one SM runs at a time: enough loads in flight to hide the latency of memory."""
_SPLIT_OVERHEAD_TOKENS = 64
"""What starting a program and merging its result costs, as the tokens that it could have read meanwhile."""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Sizes that one kernel is compiled for: ``queries`` x ``keys`` scores at a time; warps; depth of the pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def decode_config(element_bytes: int, head_dim: int, group: int, capability: tuple[int, int]) -> TileConfig:
    """Returns the tile of decode attention: one row of one KV head, so ``group`` queries, padded for the tensor cores.

    ``element_bytes``: of q, 4 for f32. ``capability``: compute capability of the device.
    """
    queries = max(16, next_power_of_2(group))
    if element_bytes == 4:
        return TileConfig(queries, 32 if head_dim <= 128 else 16, num_warps=4, num_stages=2)
    if head_dim > 128:
        return TileConfig(queries, 32, num_warps=4, num_stages=3)
    return TileConfig(queries, 64, num_warps=4, num_stages=3 if capability >= (9, 0) else 2)


def prefill_config(element_bytes: int, head_dim: int, group: int, capability: tuple[int, int]) -> TileConfig:
    """Returns the tile of prefill attention: ``queries // group`` rows of a chunk, all queries of one KV head."""
    if element_bytes == 4:
        return TileConfig(max(16, next_power_of_2(group)), 32 if head_dim <= 64 else 16, num_warps=4, num_stages=1)
    queries = max(64, next_power_of_2(group))
    if head_dim > 128:
        return TileConfig(queries, 32, num_warps=4, num_stages=2)
    return TileConfig(queries, 64, num_warps=4, num_stages=3 if capability >= (9, 0) else 2)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All that the attention kernels of one model on one device depend on, apart from the step."""

    layout: KvLayout
    num_heads: int
    decode: TileConfig
    prefill: TileConfig
    num_sms: int

    @classmethod
    def of(
        cls, layout: KvLayout, num_heads: int, element_bytes: int, capability: tuple[int, int], num_sms: int
    ) -> AttentionPlan:
        """Returns the plan for q of ``element_bytes`` per element on a device with ``num_sms`` SMs for this process.

        Raises ValueError if KV heads do not divide the heads.
        """
        if num_heads % layout.num_kv_heads:
            raise ValueError(f"{num_heads} heads do not share {layout.num_kv_heads} KV heads evenly")
        group = num_heads // layout.num_kv_heads
        return cls(
            layout=layout,
            num_heads=num_heads,
            decode=decode_config(element_bytes, layout.head_dim, group, capability),
            prefill=prefill_config(element_bytes, layout.head_dim, group, capability),
            num_sms=num_sms,
        )

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.layout.num_kv_heads

    @property
    def rows_per_tile(self) -> int:
        """Most rows of one tile of prefill attention."""
        return self.prefill.queries // self.group

    def num_splits(self, num_seqs: int, max_blocks: int) -> int:
        """Into how many ranges decode attention splits the contexts of ``num_seqs`` sequences.

        Depends on shapes only: ``max_blocks`` is the width of the tables, whatever the contexts are.
        """
        max_tiles = math.ceil(max_blocks * self.layout.block_size / self.decode.keys)
        return num_splits(num_seqs * self.layout.num_kv_heads, max_tiles, self.decode.keys, self.num_sms)

    def workspace_elements(self, num_seqs: int, max_blocks: int) -> int:
        """Size of the workspace of decode attention, f32: per split and query, the output and one log-sum-exp."""
        splits = self.num_splits(num_seqs, max_blocks)
        return num_seqs * self.num_heads * splits * (self.layout.head_dim + 1) if splits > 1 else 0


def num_splits(num_programs: int, max_tiles: int, tile_tokens: int, num_sms: int) -> int:
    """Returns the number of splits with the shortest estimated time, the smallest of equals.

    ``num_programs`` would run without a split, each over ``max_tiles`` tiles of ``tile_tokens`` tokens. Programs run in
    waves that fill the device; a wave lasts as long as its programs.
    """
    slots = num_sms * _CTAS_PER_SM
    most = min(max_tiles, max(1, math.ceil(slots / num_programs)))

    def cost(splits: int) -> float:
        waves = math.ceil(num_programs * splits / slots)
        overhead = _SPLIT_OVERHEAD_TOKENS if splits > 1 else 0
        return waves * (math.ceil(max_tiles / splits) * tile_tokens + overhead)

    return min(range(1, most + 1), key=cost)


def prefill_tiles(
    plan: AttentionPlan, starts: Sequence[int], lengths: Sequence[int], positions: Sequence[int]
) -> np.ndarray:
    """Cuts the chunks of a step into tiles of at most ``plan.rows_per_tile`` rows, the longest contexts first.

    Chunk ``i`` is the rows [starts[i], starts[i] + lengths[i]) of the step and begins at position ``positions[i]`` of
    its sequence, whose blocks are row ``i`` of the tables. Returns int32 [tiles, 4]: first row, number of rows, row of
    the tables, position of the first row.
    """
    tiles = []
    for sequence, (start, length, position) in enumerate(zip(starts, lengths, positions, strict=True)):
        for offset in range(0, length, plan.rows_per_tile):
            rows = min(plan.rows_per_tile, length - offset)
            tiles.append((start + offset, rows, sequence, position + offset))
    tiles.sort(key=lambda tile: tile[3] + tile[1], reverse=True)
    return np.array(tiles, dtype=np.int32).reshape(-1, 4)


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of 2 that is at least ``number``, which is positive."""
    return 1 << (number - 1).bit_length()
