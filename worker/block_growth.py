"""When a growing sequence requests more token blocks, and how many. Pure.

Shared by decode workers and the simulator. Knows counts only: no lease, no block id, no call to kvstore.
"""

from __future__ import annotations

from muxmesh.types import blocks_for

AHEAD_TOKENS = 64
"""A sequence requests more blocks when it has fewer free slots than this. A slot holds the KV of one token."""
CLAIM_TOKENS = 8
"""A sequence with no more free slots than this claims blocks that the pool does not have from others that follow it."""
CLAIM_RETRY_S = 0.02
"""Interval at which it asks for them while the other one frees its blocks."""
GROWTH_TOKENS = 128
"""Slots requested at a time. If the pool does not have them, the request is halved, down to one block."""


class BlockGrowth:
    """Owns the threshold of free slots below which one sequence requests blocks.

    The request is made ahead of need, so that no decode step waits for kvstore.
    """

    def __init__(self, block_size: int, max_blocks: int) -> None:
        """``max_blocks``: token blocks of the longest possible sequence."""
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._threshold = AHEAD_TOKENS

    def blocks_to_request(self, num_blocks: int, num_free_slots: int) -> int:
        """Returns how many blocks a sequence that has ``num_blocks`` requests now, or 0.

        ``num_free_slots``: tokens that its blocks hold beyond the known ones; negative if the last known token has no
        slot.
        """
        if num_free_slots >= self._threshold:
            return 0
        return max(0, min(blocks_for(GROWTH_TOKENS, self._block_size), self._max_blocks - num_blocks))

    def tokens_until_request(self, num_blocks: int, num_free_slots: int) -> int | None:
        """Returns after how many more tokens `blocks_to_request` is positive; None if never."""
        return None if num_blocks >= self._max_blocks else max(0, num_free_slots - self._threshold + 1)

    @staticmethod
    def smaller_request(num_blocks: int) -> int:
        """Returns how many blocks to request after the pool did not have ``num_blocks``; 0 if it has not even one."""
        return num_blocks // 2

    @staticmethod
    def is_claim(num_free_slots: int) -> bool:
        """Whether a sequence that the pool has no block for claims those of another one."""
        return num_free_slots <= CLAIM_TOKENS

    def on_granted(self) -> None:
        """Resets the threshold: the sequence has more blocks, or others."""
        self._threshold = AHEAD_TOKENS

    def on_pool_full(self, num_free_slots: int) -> bool:
        """The pool has not even one block. Returns True if the sequence has no free slot left and is to be pre-empted.

        Otherwise it requests again when half of its free slots are used; other sequences may end until then.
        """
        self._threshold = -(-num_free_slots // 2)
        return num_free_slots <= 0
