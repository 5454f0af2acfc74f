"""API keys: random secrets of 192 bits, of which only the SHA-256 is kept.

A secret of that size cannot be guessed, so the hash needs neither salt nor many rounds.
"""

from __future__ import annotations

import hashlib
import random

API_KEY_PREFIX = "mm-"
_KEY_BITS = 192


def new_api_key(rng: random.Random) -> str:
    """A new key. ``rng`` must be one for secrets, such as `random.SystemRandom`."""
    return f"{API_KEY_PREFIX}{rng.getrandbits(_KEY_BITS):0{_KEY_BITS // 4}x}"


def hash_of_api_key(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
