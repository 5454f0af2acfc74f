"""Names for the beginnings of sequences: what makes two token blocks hold the same KV. Pure.

The hash of a full block covers every token up to its end and the salt, so equal hashes mean equal KV (as in vLLM's
automatic prefix caching). A cryptographic hash, since a collision would give one tenant another's KV.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from muxmesh.types import EngineRequest, KvDemand

HASH_BYTES = 16


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str) -> tuple[bytes, ...]:
    """One hash for each block that ``token_ids`` fill, in order. Requests share KV only under the same ``salt``."""
    before = blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"salt").digest()
    hashes = []
    for end in range(block_size, len(token_ids) + 1, block_size):
        tokens = array("I", token_ids[end - block_size : end]).tobytes()
        before = blake2b(before + tokens, digest_size=HASH_BYTES, person=b"block").digest()
        hashes.append(before)
    return tuple(hashes)


def kv_demand(request: EngineRequest, block_size: int) -> KvDemand:
    """What the request needs of the pool, and what it could find there."""
    tokens = (*request.prompt_token_ids, *request.resume_token_ids)
    anew = request.bypass_prefix_cache or request.sampling.prompt_logprobs is not None
    return KvDemand(
        num_tokens=len(request.prompt_token_ids) + request.stopping.max_new_tokens,
        block_hashes=block_hashes(tokens, block_size, request.cache_salt),
        max_cached_tokens=0 if anew else len(tokens) - 1,  # the last one is computed, to draw from it
    )


def computed_hashes(request: EngineRequest, token_ids: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """Of the full blocks of a sequence: the request's tokens, then ``token_ids``."""
    tokens = (*request.prompt_token_ids, *request.resume_token_ids, *token_ids)
    return block_hashes(tokens, block_size, request.cache_salt)


def joined(hashes: Sequence[bytes]) -> bytes:
    """Hashes as they travel: one after the other."""
    return b"".join(hashes)


def split(hashes: bytes) -> tuple[bytes, ...]:
    """The hashes that `joined` put together."""
    return tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
