"""The hashes of blocks, and the KV demand of a request."""

from array import array
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.block_hashes import (
    HASH_BYTES,
    BlockHashChain,
    KvIdentity,
    block_hashes,
    demand_for,
    join_hashes,
    known_hashes,
    kv_demand,
    split_hashes,
)
from muxmesh.types import EngineRequest, KvDemand, Sampling, SchedulingState, Stopping

IDENTITY = KvIdentity("weights", "float32", "float32", "layout", "rope")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def request(num_prompt: int, **fields: Any) -> EngineRequest:
    prompt = tuple(range(num_prompt))
    sampling = fields.pop("sampling", Sampling())
    return EngineRequest("r", "m", prompt, sampling, Stopping(10), SchedulingState(0, 0.0), **fields)


def demand_of(one: EngineRequest, identity: KvIdentity | None) -> KvDemand:
    """With blocks of 16 tokens, and 4 tokens of output reserved."""
    root = None if identity is None else identity.root(one.tenant, one.cache_salt)
    return kv_demand(one, None if root is None else known_hashes(one, 16, root), 4)


@pytest.mark.parametrize(
    ("num_prompt", "num_blocks", "num_usable"), [(1, 0, 0), (15, 0, 0), (16, 1, 0), (17, 1, 1), (32, 2, 1)]
)
def test_the_last_token_of_a_prompt_is_always_computed(num_prompt: int, num_blocks: int, num_usable: int) -> None:
    demand = demand_of(request(num_prompt), IDENTITY)
    assert (demand.num_tokens, demand.max_tokens) == (num_prompt + 4, num_prompt + 10)
    assert (len(demand.block_hashes), demand.max_cached_tokens // 16) == (num_blocks, num_usable)


def test_the_demand_of_a_resumed_request_includes_its_earlier_output() -> None:
    demand = demand_of(request(20, resume_token_ids=tuple(range(20, 28))), IDENTITY)
    assert (demand.num_tokens, demand.max_tokens) == (30, 30)
    assert demand.block_hashes == block_hashes(range(28), 16, IDENTITY.root())
    assert demand.max_cached_tokens == 27


@pytest.mark.parametrize(
    "fields", [{"bypass_prefix_cache": True}, {"sampling": Sampling(prompt_logprobs=0)}], ids=["bypass", "logprobs"]
)
def test_a_request_that_computes_its_whole_prompt_uses_no_cached_token(fields: dict[str, Any]) -> None:
    demand = demand_of(request(40, **fields), IDENTITY)
    assert demand.max_cached_tokens == 0
    assert len(demand.block_hashes) == 2, "its own blocks are published"


def test_without_the_identity_of_its_model_a_request_uses_and_publishes_no_cached_token() -> None:
    demand = demand_of(request(40), None)
    assert (demand.num_tokens, demand.max_tokens) == (44, 50)
    assert (demand.block_hashes, demand.max_cached_tokens) == ((), 0)


@given(st.integers(1, 500), st.integers(0, 100), st.integers(0, 100))
def test_the_initial_demand_never_exceeds_the_maximum(num_known: int, max_output: int, reserved: int) -> None:
    demand = demand_for(num_known, num_known + max_output, reserved, ())
    assert num_known <= demand.num_tokens <= demand.max_tokens
    assert demand.num_tokens - num_known == min(reserved, max_output)


def test_joined_hashes_are_split_again() -> None:
    hashes = block_hashes(range(100), 16, IDENTITY.root())
    assert split_hashes(join_hashes(hashes)) == hashes
    assert split_hashes(b"") == ()


@pytest.mark.parametrize("field", ["weights", "weight_dtype", "kv_dtype", "layout", "rope"])
def test_another_model_identity_shares_no_hash(field: str) -> None:
    other = replace(IDENTITY, **{field: "another"})
    mine, theirs = (block_hashes(range(64), 16, identity.root()) for identity in (IDENTITY, other))
    assert not set(mine) & set(theirs)


def test_the_root_depends_on_which_field_has_a_value() -> None:
    parts = {KvIdentity("a", "b", "c", "d", "e").root(), KvIdentity("ab", "", "c", "d", "e").root()}
    parts |= {KvIdentity("a", "b", "c", "d", "").root("e"), KvIdentity("b", "a", "c", "d", "e").root()}
    assert len(parts) == 4


def test_tenants_and_salts_have_different_roots() -> None:
    pairs = (("", ""), ("a", ""), ("", "a"), ("a", "b"), ("b", "a"), ("ab", ""))
    roots = [IDENTITY.root(tenant, salt) for tenant, salt in pairs]
    assert len(set(roots)) == len(roots)
    assert IDENTITY.root("a", "b") == IDENTITY.root("a", "b")


def test_the_demand_is_hashed_for_the_tenant_and_its_salt() -> None:
    demand = demand_of(request(40, tenant="t", cache_salt="s"), IDENTITY)
    assert demand.block_hashes == block_hashes(range(40), 16, IDENTITY.root("t", "s"))


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=12), st.sampled_from([1, 4, 16]))
def test_a_chain_that_grows_in_pieces_equals_the_chain_of_the_whole(pieces: list[list[int]], block_size: int) -> None:
    chain = BlockHashChain(block_size, b"root")
    for piece in pieces:
        chain.extend(piece)
    assert tuple(chain.hashes) == block_hashes([token for piece in pieces for token in piece], block_size, b"root")


@given(TOKENS, TOKENS, TOKENS)
def test_two_sequences_share_the_hashes_of_their_common_full_blocks(
    prefix: list[int], left: list[int], right: list[int]
) -> None:
    first, second = (block_hashes(prefix + suffix, 4, b"root") for suffix in (left, right))
    same = [a == b for a, b in zip(prefix + left, prefix + right, strict=False)]
    num_common = same.index(False) if False in same else len(same)
    matches = [a == b for a, b in zip(first, second, strict=False)]
    assert matches == [index < num_common // 4 for index in range(len(matches))]


@given(TOKENS, st.sampled_from([1, 4, 16]))
def test_only_full_blocks_have_a_hash(tokens: list[int], block_size: int) -> None:
    hashes = block_hashes(tokens, block_size, b"root")
    assert len(hashes) == len(tokens) // block_size
    assert all(len(one) == HASH_BYTES for one in hashes)


def test_equal_blocks_at_different_positions_have_different_hashes() -> None:
    assert len(set(block_hashes([7] * 64, 16, b"root"))) == 4


def test_the_hash_of_a_block_covers_the_previous_hash_and_its_tokens() -> None:
    """The kvstore and all workers compute it, so the definition is part of the protocol."""
    first, second = block_hashes(range(8), 4, b"root")
    assert first == blake2b(b"root" + array("I", range(4)).tobytes(), digest_size=16, person=b"block").digest()
    assert second == blake2b(first + array("I", range(4, 8)).tobytes(), digest_size=16, person=b"block").digest()


def test_a_salt_that_spells_a_block_does_not_reach_another_tenants_chain() -> None:
    whole = block_hashes(range(32), 16, IDENTITY.root())
    tokens = b"".join(token.to_bytes(4, "little") for token in range(16, 32))
    salt = (whole[0] + tokens).decode("latin-1")
    assert not set(block_hashes(range(32), 16, IDENTITY.root("", salt))) & set(whole)
