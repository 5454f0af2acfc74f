"""When a growing sequence requests more token blocks, and how many. Pure; the simulator uses it too."""

from __future__ import annotations

from muxmesh.types import blocks_for

AHEAD_TOKENS = 64
"""More blocks are requested when fewer slots than this are free."""
GROWTH_TOKENS = 128
"""Slots requested at a time; if the pool has fewer, half of it, and so on down to one block."""


class BlockGrowth:
    """Owns the threshold at which one sequence requests blocks, so that no decode step waits for a call."""

    def __init__(self, block_size: int, max_blocks: int) -> None:
        """``max_blocks``: of the longest possible sequence."""
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._threshold = AHEAD_TOKENS

    def blocks_to_request(self, num_blocks: int, num_free_slots: int) -> int:
        """Blocks that a sequence with ``num_blocks`` requests now; 0: none.

        ``num_free_slots``: tokens that its blocks hold beyond the known ones.
        """
        if num_free_slots >= self._threshold:
            return 0
        return max(0, min(blocks_for(GROWTH_TOKENS, self._block_size), self._max_blocks - num_blocks))

    def tokens_until_request(self, num_blocks: int, num_free_slots: int) -> int | None:
        """Tokens until `blocks_to_request` is positive; None: never."""
        return None if num_blocks >= self._max_blocks else max(0, num_free_slots - self._threshold + 1)

    @staticmethod
    def smaller_request(num_blocks: int) -> int:
        """What to request after the pool did not have ``num_blocks``; 0: the pool is full."""
        return num_blocks // 2

    def on_granted(self) -> None:
        """The request was granted, or the sequence has other blocks."""
        self._threshold = AHEAD_TOKENS

    def on_pool_full(self, num_free_slots: int) -> bool:
        """The pool has not even one block. True: the sequence cannot go on, and has to be pre-empted.

        False: it requests again when half of its free slots are used; other sequences may end until then.
        """
        self._threshold = -(-num_free_slots // 2)
        return num_free_slots <= 0
