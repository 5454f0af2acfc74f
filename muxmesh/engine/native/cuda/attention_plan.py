"""How attention is divided among the programs of a GPU: tile sizes, splits of the context, tiles of prompt chunks.

Pure arithmetic on the host: everything here depends on shapes, lengths and the kind of device, never on a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from muxmesh.engine.native.cuda.kv_layout import KvLayout

_SPLIT_OVERHEAD_TOKENS = 64
"""What starting a program and merging its result costs, as the tokens that it could have read meanwhile."""
_MOST_WAVES = 4
"""A split makes at most about this many waves of programs: smaller programs end closer together."""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Sizes that one kernel is compiled for: ``queries`` x ``keys`` scores at a time; warps; depth of the pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By bytes of an element of q: the largest head size, the tile for it. A loop keeps num_stages // 2 tiles of K and V:
# the ids of their token blocks are loaded as far ahead again.
_DECODE_EXACT = ((128, TileConfig(16, 32, 8, 3)), (256, TileConfig(16, 16, 8, 3)))
_DECODE = {  # by whether the device has the shared memory of Hopper
    False: ((64, TileConfig(16, 128, 4, 5)), (128, TileConfig(16, 64, 4, 5)), (256, TileConfig(16, 32, 4, 5))),
    True: ((64, TileConfig(16, 128, 4, 7)), (128, TileConfig(16, 64, 4, 7)), (256, TileConfig(16, 32, 4, 7))),
}
_PREFILL_EXACT = ((64, TileConfig(32, 32, 8, 3)), (128, TileConfig(16, 32, 8, 3)), (256, TileConfig(16, 16, 8, 3)))
_PREFILL = {  # by whether the device has the shared memory and the matrix instructions of Hopper
    False: ((64, TileConfig(128, 64, 8, 3)), (128, TileConfig(64, 64, 8, 3)), (256, TileConfig(64, 32, 8, 3))),
    True: ((128, TileConfig(128, 64, 8, 3)), (256, TileConfig(128, 32, 8, 3))),
}


def decode_config(element_bytes: int, head_dim: int, group: int, capability: tuple[int, int]) -> TileConfig:
    """Returns the tile of decode attention: one row of one KV head, so ``group`` queries, padded for the tensor cores.

    ``element_bytes``: of q, 4 for f32. ``capability``: see `prefill_config`.
    """
    table = _DECODE_EXACT if element_bytes == 4 else _DECODE[_is_like_hopper(capability)]
    return _with_group(_first_fit(table, head_dim), group)


def prefill_config(element_bytes: int, head_dim: int, group: int, capability: tuple[int, int]) -> TileConfig:
    """Returns the tile of prefill attention: ``queries // group`` rows of a chunk, all queries of one KV head.

    ``capability``: compute capability of the device.
    """
    table = _PREFILL_EXACT if element_bytes == 4 else _PREFILL[_is_like_hopper(capability)]
    return _with_group(_first_fit(table, head_dim), group)


def _is_like_hopper(capability: tuple[int, int]) -> bool:
    """True for 9.x and 10.x, which have as much shared memory; 12.x has as little as 8.6."""
    return capability[0] in (9, 10)


def _first_fit(table: Sequence[tuple[int, TileConfig]], head_dim: int) -> TileConfig:
    return next(config for largest, config in table if head_dim <= largest)


def _with_group(config: TileConfig, group: int) -> TileConfig:
    return replace(config, queries=max(config.queries, next_power_of_2(group)))


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All that the attention kernels of one model on one device depend on, apart from the step."""

    layout: KvLayout
    num_heads: int
    decode: TileConfig
    prefill: TileConfig
    num_slots: int
    """Programs of decode attention that contexts are split for. With deep pipelines one per SM reads fastest."""

    @classmethod
    def of(
        cls, layout: KvLayout, num_heads: int, element_bytes: int, capability: tuple[int, int], num_sms: int
    ) -> AttentionPlan:
        """Returns the plan for q of ``element_bytes`` per element on a device with ``num_sms`` SMs for this process.

        Raises ValueError if KV heads do not divide the heads, or for a head size above 256.
        """
        if num_heads % layout.num_kv_heads:
            raise ValueError(f"{num_heads} heads do not share {layout.num_kv_heads} KV heads evenly")
        if layout.head_dim > 256:
            raise ValueError(f"the head size is {layout.head_dim}, attention takes at most 256")
        group = num_heads // layout.num_kv_heads
        return cls(
            layout=layout,
            num_heads=num_heads,
            decode=decode_config(element_bytes, layout.head_dim, group, capability),
            prefill=prefill_config(element_bytes, layout.head_dim, group, capability),
            num_slots=num_sms * (1 if _is_like_hopper(capability) else 2),
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
        max_tiles = self._tiles(max_blocks)
        return num_splits(num_seqs * self.layout.num_kv_heads, max_tiles, self.decode.keys, self.num_slots)

    def workspace_elements(self, num_seqs: int, max_blocks: int) -> int:
        """Size of a workspace for decode attention of up to ``num_seqs`` sequences, tables up to ``max_blocks`` wide.

        In f32 elements: per split and query, the output and one log-sum-exp.
        """
        programs = num_seqs * self.layout.num_kv_heads
        most = min(programs * self._tiles(max_blocks), _MOST_WAVES * self.num_slots + programs)
        return most * self.group * (self.layout.head_dim + 1)

    def _tiles(self, max_blocks: int) -> int:
        return math.ceil(max_blocks * self.layout.block_size / self.decode.keys)


def num_splits(num_programs: int, max_tiles: int, tile_tokens: int, num_slots: int) -> int:
    """Returns the number of splits with the shortest estimated time, the smallest of equals.

    ``num_programs`` would run without a split, each over ``max_tiles`` tiles of ``tile_tokens`` tokens. Programs run in
    waves of ``num_slots``; a wave lasts as long as its programs.
    """
    most = min(max_tiles, math.ceil(_MOST_WAVES * num_slots / num_programs))

    def cost(splits: int) -> int:
        waves = math.ceil(num_programs * splits / num_slots)
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
