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


class PrefixChain:
    """The hashes of a sequence that grows. Requests share KV only under the same ``salt``."""

    def __init__(self, block_size: int, salt: str) -> None:
        self.hashes: list[bytes] = []
        self._block_size = block_size
        self._last = blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"salt").digest()
        self._rest: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """More tokens; each block that is full now gets its hash."""
        tokens, size = [*self._rest, *token_ids], self._block_size
        for end in range(size, len(tokens) + 1, size):
            block = array("I", tokens[end - size : end]).tobytes()
            self._last = blake2b(self._last + block, digest_size=HASH_BYTES, person=b"block").digest()
            self.hashes.append(self._last)
        self._rest = tokens[len(tokens) // size * size :]


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str) -> tuple[bytes, ...]:
    """One hash for each block that ``token_ids`` fill, in order; see `PrefixChain`."""
    chain = PrefixChain(block_size, salt)
    chain.extend(token_ids)
    return tuple(chain.hashes)


def kv_demand(request: EngineRequest, block_size: int, answer_tokens: int) -> KvDemand:
    """What the request needs of the pool, and what it could find there; ``answer_tokens`` more are taken at first."""
    tokens = (*request.prompt_token_ids, *request.resume_token_ids)
    anew = request.bypass_prefix_cache or request.sampling.prompt_logprobs is not None
    return KvDemand(
        num_tokens=min(request.most_tokens, len(tokens) + answer_tokens),
        most_tokens=request.most_tokens,
        block_hashes=block_hashes(tokens, block_size, request.cache_salt),
        max_cached_tokens=0 if anew else len(tokens) - 1,  # the last one is computed, to draw from it
    )


def chain_of(request: EngineRequest, block_size: int) -> PrefixChain:
    """The chain of a request's tokens, prompt and what is resumed."""
    chain = PrefixChain(block_size, request.cache_salt)
    chain.extend((*request.prompt_token_ids, *request.resume_token_ids))
    return chain


def joined(hashes: Sequence[bytes]) -> bytes:
    """Hashes as they travel: one after the other."""
    return b"".join(hashes)


def split(hashes: bytes) -> tuple[bytes, ...]:
    """The hashes that `joined` put together."""
    return tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
