"""Hash chains over token blocks: blocks with equal hashes hold equal KV. Pure.

The hash of a full block covers the root of the chain and all tokens up to the end of the block, as in vLLM's automatic
prefix caching. The root covers everything else that determines the KV: the model identity (weights, dtypes of weights
and KV, block layout, rotary embedding), the tenant and the cache salt. A model with other weights, another quantization
or another engine therefore never matches blocks of an earlier one. The hash is cryptographic, because a collision would
expose the KV of one tenant to another.
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
    """The model identity: everything but the tokens that the KV of a model depends on.

    ``weights`` is a fingerprint of the weights, ``layout`` describes the layout of a token block, and ``rope`` the
    rotary embedding with its parameters.
    """

    weights: str
    weight_dtype: str
    kv_dtype: str
    layout: str
    rope: str

    @property
    def text(self) -> str:
        """The same for equal identities only. In hexadecimal."""
        return self.root().hex()

    def root(self, tenant: str = "", cache_salt: str = "") -> bytes:
        """Root of the hash chains of one tenant and salt. Sequences share KV only if their roots are equal."""
        digest = blake2b(digest_size=HASH_BYTES, person=b"root")
        for part in (*astuple(self), tenant, cache_salt):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()


class BlockHashChain:
    """Owns the hashes of the full blocks of one growing sequence, and the tokens of its partial last block."""

    def __init__(self, block_size: int, root: bytes) -> None:
        self.hashes: list[bytes] = []
        self._block_size = block_size
        self._last = root
        self._rest: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Appends tokens to the sequence and a hash for each block that they complete."""
        tokens, size = [*self._rest, *token_ids], self._block_size
        for end in range(size, len(tokens) + 1, size):
            block = array("I", tokens[end - size : end]).tobytes()
            self._last = blake2b(self._last + block, digest_size=HASH_BYTES, person=b"block").digest()
            self.hashes.append(self._last)
        self._rest = tokens[len(tokens) // size * size :]


def block_hashes(token_ids: Sequence[int], block_size: int, root: bytes) -> tuple[bytes, ...]:
    """The hashes of the full blocks of ``token_ids``, in order. A partial last block has no hash."""
    chain = BlockHashChain(block_size, root)
    chain.extend(token_ids)
    return tuple(chain.hashes)


def known_hashes(request: EngineRequest, block_size: int, root: bytes) -> tuple[bytes, ...]:
    """The hashes of the full blocks of the known tokens of ``request``: prompt and resumed output."""
    return block_hashes((*request.prompt_token_ids, *request.resume_token_ids), block_size, root)


def kv_demand(request: EngineRequest, hashes: tuple[bytes, ...] | None, output_tokens: int) -> KvDemand:
    """The KV demand of ``request``, which has blocks for ``output_tokens`` of output reserved at admission.

    ``hashes``: see `known_hashes`; None: the model identity is not known. The prefix cache is not used then, nor if the
    request bypasses it or needs log-probabilities of its prompt.
    """
    num_known = len(request.prompt_token_ids) + len(request.resume_token_ids)
    compute_all = hashes is None or request.bypass_prefix_cache or request.sampling.prompt_logprobs is not None
    return demand_for(num_known, request.max_tokens, output_tokens, hashes or (), use_cache=not compute_all)


def demand_for(
    num_known_tokens: int, max_tokens: int, output_tokens: int, hashes: tuple[bytes, ...], use_cache: bool = True
) -> KvDemand:
    """The KV demand of a request with ``num_known_tokens``. The last one is always computed, to sample from it."""
    return KvDemand(
        num_tokens=min(max_tokens, num_known_tokens + output_tokens),
        max_tokens=max_tokens,
        block_hashes=hashes,
        max_cached_tokens=num_known_tokens - 1 if use_cache else 0,
        num_known_tokens=num_known_tokens,
    )


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    """Concatenates hashes for the wire."""
    return b"".join(hashes)


def split_hashes(hashes: bytes) -> tuple[bytes, ...]:
    """Splits what `join_hashes` concatenated."""
    return tuple(hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES))
