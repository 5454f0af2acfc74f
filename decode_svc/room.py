"""When an answer asks for more token blocks, and for how many. Pure."""

from __future__ import annotations

from muxmesh.types import blocks_for

AHEAD_TOKENS = 64
"""More is asked for when the blocks have room for fewer tokens than this."""
GROWTH_TOKENS = 128
"""How much is asked for at a time; if the pool has not so much, half of it, and so on down to one block."""


def blocks_to_ask(num_blocks: int, most_blocks: int, block_size: int) -> int:
    """How many a sequence with ``num_blocks`` asks for, if it never needs more than ``most_blocks``."""
    return min(blocks_for(GROWTH_TOKENS, block_size), most_blocks - num_blocks)


def ask_again_below(room: int) -> int:
    """With room for so many tokens, and none to be had: when to ask again; somebody may end meanwhile."""
    return -(-room // 2)
