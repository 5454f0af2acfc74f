"""Hashes of token blocks: two blocks with the same hash hold the same KV. Pure.

The hash of a full block covers every token up to its end and the chain's root, as in vLLM's automatic prefix caching.
The root covers everything else that decides the values in the block: the weights, the dtypes of weights and KV, the
layout of a block and the rotary embedding (`KvIdentity`), and the tenant and its salt. So a model that was loaded again
with other weights, re-quantized, or is served by another engine never finds blocks of the one before it. The hash is a
cryptographic one, since a collision would give one tenant another tenant's KV.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from hashlib import blake2b

from muxmesh.types import EngineRequest, KvDemand

HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class KvIdentity:
    """What the KV of a model depends on beside the tokens.

    ``weights`` is a fingerprint of their values, ``layout`` names how a token block is laid out, ``rope`` the rotary
    embedding with its parameters.
    """

    weights: str
    weight_dtype: str
    kv_dtype: str
    layout: str
    rope: str

    def root(self, tenant: str = "", cache_salt: str = "") -> bytes:
        """Root of the hash chains of one tenant's sequences: they share KV only under equal roots."""
        digest = blake2b(digest_size=HASH_BYTES, person=b"root")
        for part in (*astuple(self), tenant, cache_salt):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()


class BlockHashChain:
    """The hashes of the full blocks of a sequence that grows."""

    def __init__(self, block_size: int, root: bytes) -> None:
        self.hashes: list[bytes] = []
        self._block_size = block_size
        self._last = root
        self._rest: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Appends tokens; hashes each block that is full now."""
        tokens, size = [*self._rest, *token_ids], self._block_size
        for end in range(size, len(tokens) + 1, size):
            block = array("I", tokens[end - size : end]).tobytes()
            self._last = blake2b(self._last + block, digest_size=HASH_BYTES, person=b"block").digest()
            self.hashes.append(self._last)
        self._rest = tokens[len(tokens) // size * size :]


def block_hashes(token_ids: Sequence[int], block_size: int, root: bytes) -> tuple[bytes, ...]:
    """One hash for each block that ``token_ids`` fill, in order; see `BlockHashChain`."""
    chain = BlockHashChain(block_size, root)
    chain.extend(token_ids)
    return tuple(chain.hashes)


def kv_demand(request: EngineRequest, identity: KvIdentity, block_size: int, output_tokens: int) -> KvDemand:
    """What ``request`` needs of the KV pool and may find in its prefix cache.

    ``output_tokens``: tokens of the output for which blocks are reserved at first.
    """
    tokens = (*request.prompt_token_ids, *request.resume_token_ids)
    compute_all = request.bypass_prefix_cache or request.sampling.prompt_logprobs is not None
    hashes = block_hashes(tokens, block_size, identity.root(request.tenant, request.cache_salt))
    return demand_for(len(tokens), request.max_tokens, output_tokens, hashes, use_cache=not compute_all)


def demand_for(
    num_known_tokens: int, max_tokens: int, output_tokens: int, hashes: tuple[bytes, ...], use_cache: bool = True
) -> KvDemand:
    """The demand of a request with so many known tokens. The last one is always computed, to sample from it."""
    return KvDemand(
        num_tokens=min(max_tokens, num_known_tokens + output_tokens),
        max_tokens=max_tokens,
        block_hashes=hashes,
        max_cached_tokens=num_known_tokens - 1 if use_cache else 0,
    )


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    """Hashes as they travel: one after the other."""
    return b"".join(hashes)


def split_hashes(hashes: bytes) -> tuple[bytes, ...]:
    """The hashes that `join_hashes` put together."""
    return tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
