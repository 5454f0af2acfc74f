"""What a request asks of the cache, and what its workers publish."""

import pytest

from muxmesh.prefix import block_hashes, chain_of, joined, kv_demand, split
from muxmesh.types import EngineRequest, Sampling, Standing, Stopping


def request(num_prompt: int, **fields: object) -> EngineRequest:
    prompt = tuple(range(num_prompt))
    return EngineRequest("r", "m", prompt, fields.pop("sampling", Sampling()), Stopping(10), Standing(0, 0.0), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_prompt", "blocks", "usable"), [(1, 0, 0), (15, 0, 0), (16, 1, 0), (17, 1, 1), (32, 2, 1)]
)
def test_the_last_token_of_a_prompt_is_always_computed(num_prompt: int, blocks: int, usable: int) -> None:
    demand = kv_demand(request(num_prompt), 16, 4)
    assert (demand.num_tokens, demand.most_tokens) == (num_prompt + 4, num_prompt + 10)
    assert (len(demand.block_hashes), demand.max_cached_tokens // 16) == (blocks, usable)


def test_what_was_answered_before_a_restart_is_looked_for_too() -> None:
    demand = kv_demand(request(20, resume_token_ids=tuple(range(20, 28))), 16, 4)
    assert (demand.num_tokens, demand.most_tokens) == (30, 30)
    assert demand.block_hashes == block_hashes(range(28), 16, "")
    assert demand.max_cached_tokens == 27


def test_nothing_is_taken_from_the_cache_where_every_token_is_to_be_computed() -> None:
    for anew in (request(40, bypass_prefix_cache=True), request(40, sampling=Sampling(prompt_logprobs=0))):
        demand = kv_demand(anew, 16, 4)
        assert demand.max_cached_tokens == 0
        assert len(demand.block_hashes) == 2, "others may use what it computes"


def test_a_worker_publishes_prompt_resumed_and_new_tokens_under_the_requests_salt() -> None:
    chain = chain_of(request(20, resume_token_ids=(20, 21), cache_salt="tenant"), 16)
    for token_ids in ((22,), (), range(23, 36), range(36, 40)):
        chain.extend(token_ids)
    assert tuple(chain.hashes) == block_hashes(range(40), 16, "tenant")


def test_hashes_travel() -> None:
    hashes = block_hashes(range(100), 16, "")
    assert split(joined(hashes)) == hashes
    assert split(b"") == ()


def test_no_salt_is_a_block() -> None:
    """A salt that spells out a hash and tokens does not get into another's chain."""
    whole = block_hashes(range(32), 16, "")
    tokens = b"".join(token.to_bytes(4, "little") for token in range(16, 32))
    salt = (whole[0] + tokens).decode("latin-1")
    assert not set(block_hashes(range(32), 16, salt)) & set(whole)
