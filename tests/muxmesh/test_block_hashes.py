"""What a request asks of the cache, and what its workers publish."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.block_hashes import (
    BlockHashChain,
    KvIdentity,
    block_hashes,
    join_hashes,
    kv_demand,
    split_hashes,
)
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping

IDENTITY = KvIdentity("weights", "float32", "float32", "layout", "rope")


def request(num_prompt: int, **fields: Any) -> EngineRequest:
    prompt = tuple(range(num_prompt))
    sampling = fields.pop("sampling", Sampling())
    return EngineRequest("r", "m", prompt, sampling, Stopping(10), SchedulingState(0, 0.0), **fields)


@pytest.mark.parametrize(
    ("num_prompt", "blocks", "usable"), [(1, 0, 0), (15, 0, 0), (16, 1, 0), (17, 1, 1), (32, 2, 1)]
)
def test_the_last_token_of_a_prompt_is_always_computed(num_prompt: int, blocks: int, usable: int) -> None:
    demand = kv_demand(request(num_prompt), IDENTITY, 16, 4)
    assert (demand.num_tokens, demand.max_tokens) == (num_prompt + 4, num_prompt + 10)
    assert (len(demand.block_hashes), demand.max_cached_tokens // 16) == (blocks, usable)


def test_what_was_answered_before_a_restart_is_looked_for_too() -> None:
    demand = kv_demand(request(20, resume_token_ids=tuple(range(20, 28))), IDENTITY, 16, 4)
    assert (demand.num_tokens, demand.max_tokens) == (30, 30)
    assert demand.block_hashes == block_hashes(range(28), 16, IDENTITY.root())
    assert demand.max_cached_tokens == 27


def test_nothing_is_taken_from_the_cache_where_every_token_is_to_be_computed() -> None:
    for anew in (request(40, bypass_prefix_cache=True), request(40, sampling=Sampling(prompt_logprobs=0))):
        demand = kv_demand(anew, IDENTITY, 16, 4)
        assert demand.max_cached_tokens == 0
        assert len(demand.block_hashes) == 2, "others may use what it computes"


def test_hashes_travel() -> None:
    hashes = block_hashes(range(100), 16, IDENTITY.root())
    assert split_hashes(join_hashes(hashes)) == hashes
    assert split_hashes(b"") == ()


@pytest.mark.parametrize("field", ["weights", "weight_dtype", "kv_dtype", "layout", "rope"])
def test_kv_that_depends_on_something_else_has_another_hash(field: str) -> None:
    other = replace(IDENTITY, **{field: "another"})
    mine, theirs = (block_hashes(range(64), 16, one.root()) for one in (IDENTITY, other))
    assert not set(mine) & set(theirs)


def test_tenants_and_salts_share_nothing_and_are_not_mixed_up() -> None:
    roots = [IDENTITY.root(*one) for one in (("", ""), ("a", ""), ("", "a"), ("a", "b"), ("b", "a"), ("ab", ""))]
    assert len(set(roots)) == len(roots)
    assert IDENTITY.root("a", "b") == IDENTITY.root("a", "b")


def test_the_demand_is_hashed_for_the_tenant_and_its_salt() -> None:
    demand = kv_demand(request(40, tenant="t", cache_salt="s"), IDENTITY, 16, 4)
    assert demand.block_hashes == block_hashes(range(40), 16, IDENTITY.root("t", "s"))


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=12), st.sampled_from([1, 4, 16]))
def test_a_chain_that_grows_piece_by_piece_is_that_of_the_whole(pieces: list[list[int]], block_size: int) -> None:
    chain = BlockHashChain(block_size, b"root")
    for piece in pieces:
        chain.extend(piece)
    assert tuple(chain.hashes) == block_hashes([token for piece in pieces for token in piece], block_size, b"root")


def test_no_salt_is_a_block() -> None:
    """A salt that spells out a hash and tokens does not get into another tenant's chain."""
    whole = block_hashes(range(32), 16, IDENTITY.root())
    tokens = b"".join(token.to_bytes(4, "little") for token in range(16, 32))
    salt = (whole[0] + tokens).decode("latin-1")
    assert not set(block_hashes(range(32), 16, IDENTITY.root("", salt))) & set(whole)
