"""When a sequence requests token blocks. The numbers are those of `AHEAD_TOKENS` and `GROWTH_TOKENS`: 64 and 128."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.block_growth import BlockGrowth


@pytest.mark.parametrize(("num_free_slots", "num_requested"), [(200, 0), (64, 0), (63, 8), (0, 8), (-1, 8)])
def test_blocks_are_requested_when_fewer_than_64_slots_are_free(num_free_slots: int, num_requested: int) -> None:
    assert BlockGrowth(block_size=16, max_blocks=100).blocks_to_request(10, num_free_slots) == num_requested


@pytest.mark.parametrize(("block_size", "num_requested"), [(8, 16), (16, 8), (32, 4)])
def test_a_request_is_for_128_slots(block_size: int, num_requested: int) -> None:
    assert BlockGrowth(block_size, max_blocks=100).blocks_to_request(1, 0) == num_requested


@pytest.mark.parametrize(("num_blocks", "num_requested"), [(3, 5), (7, 1), (8, 0), (9, 0)])
def test_a_sequence_never_requests_more_than_its_longest_output_needs(num_blocks: int, num_requested: int) -> None:
    assert BlockGrowth(16, max_blocks=8).blocks_to_request(num_blocks, 0) == num_requested


def test_a_request_that_the_pool_cannot_fill_is_halved_down_to_one_block() -> None:
    requests = [8]
    while requests[-1]:
        requests.append(BlockGrowth.smaller_request(requests[-1]))
    assert requests == [8, 4, 2, 1, 0]


def test_with_a_full_pool_a_sequence_requests_again_when_half_of_its_slots_are_used() -> None:
    growth = BlockGrowth(16, max_blocks=100)
    assert growth.on_pool_full(40) is False
    assert growth.blocks_to_request(10, 20) == 0
    assert growth.blocks_to_request(10, 19) == 8
    assert growth.on_pool_full(19) is False
    assert [growth.blocks_to_request(10, num_free) for num_free in (10, 9)] == [0, 8]


@pytest.mark.parametrize(("num_free_slots", "is_preempted"), [(1, False), (0, True), (-1, True)])
def test_a_sequence_without_free_slots_in_a_full_pool_is_pre_empted(num_free_slots: int, is_preempted: bool) -> None:
    assert BlockGrowth(16, max_blocks=100).on_pool_full(num_free_slots) is is_preempted


def test_granted_blocks_restore_the_threshold() -> None:
    growth = BlockGrowth(16, max_blocks=100)
    growth.on_pool_full(10)
    assert growth.blocks_to_request(10, 63) == 0
    growth.on_granted()
    assert growth.blocks_to_request(10, 63) == 8


@given(
    block_size=st.sampled_from([8, 16, 32]),
    max_blocks=st.integers(1, 40),
    num_blocks=st.integers(1, 40),
    num_free_slots=st.integers(-1, 300),
    slots_at_full=st.none() | st.integers(1, 64),
)
def test_tokens_until_the_next_request_are_exact(
    block_size: int, max_blocks: int, num_blocks: int, num_free_slots: int, slots_at_full: int | None
) -> None:
    growth = BlockGrowth(block_size, max_blocks)
    if slots_at_full is not None:
        growth.on_pool_full(slots_at_full)
    num_tokens = growth.tokens_until_request(num_blocks, num_free_slots)
    if num_tokens is None:
        assert all(growth.blocks_to_request(num_blocks, num_free) == 0 for num_free in range(-1, num_free_slots))
    else:
        assert growth.blocks_to_request(num_blocks, num_free_slots - num_tokens) > 0
        assert num_tokens == 0 or growth.blocks_to_request(num_blocks, num_free_slots - num_tokens + 1) == 0
