"""When an answer asks for more token blocks, and for how many. Pure."""

from __future__ import annotations

AHEAD_TOKENS = 64
"""More is asked for when the blocks have room for fewer tokens than this."""
GROWTH_TOKENS = 128
"""How much is asked for at a time; if the pool has not so much, half of it, and so on down to one block."""
