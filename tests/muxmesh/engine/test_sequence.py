"""The record of one sequence: tokens, computed count, blocks and hash chain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.block_hashes import block_hashes
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.types import EngineRequest, Finish, FinishReason, Sampling, SchedulingState, Stopping, blocks_for

BLOCK, ROOT = 8, b"root"
PROMPT = tuple(range(100, 120))


def record(
    blocks: tuple[int, ...] = (3, 1, 2),
    computed: int = 0,
    sampled: tuple[int, ...] = (),
    resume: tuple[int, ...] = (),
    stopping: Stopping | None = None,
) -> SequenceRecord:
    request = EngineRequest(
        "r", "m", PROMPT, Sampling(), stopping or Stopping(40), SchedulingState(0, 0.0), resume_token_ids=resume
    )
    return SequenceRecord(request, BLOCK, ROOT, blocks, computed, sampled)


def test_tokens_are_those_of_the_prompt_then_resumed_then_sampled() -> None:
    sequence = record(computed=21, resume=(50,), sampled=(51, 52))
    assert sequence.tokens(18, 23) == (118, 119, 50, 51, 52)
    assert sequence.output_token_ids == (50, 51, 52)
    assert (sequence.num_tokens, sequence.num_output_tokens) == (23, 3)
    assert (sequence.num_computed_tokens, sequence.num_uncomputed_tokens) == (21, 2)


@pytest.mark.parametrize("computed", [-1, 20, 21])
def test_a_record_needs_a_token_to_compute(computed: int) -> None:
    with pytest.raises(ValueError, match=f"{computed} of 20 tokens are computed"):
        record(computed=computed)


@pytest.mark.parametrize(("sampled", "num_needed"), [((), 3), ((7,) * 4, 3), ((7,) * 5, 4)])
def test_a_record_needs_blocks_for_its_known_tokens(sampled: tuple[int, ...], num_needed: int) -> None:
    record(tuple(range(num_needed)), sampled=sampled)
    with pytest.raises(ValueError, match=f"{num_needed - 1} token blocks, needs {num_needed}"):
        record(tuple(range(num_needed - 1)), sampled=sampled)


def test_advance_moves_the_computed_count_and_appended_tokens_are_not_computed() -> None:
    sequence = record()
    sequence.advance(12)
    assert (sequence.num_computed_tokens, sequence.num_uncomputed_tokens) == (12, 8)
    sequence.advance(8)
    assert sequence.extend((7,)) is None
    assert (sequence.num_computed_tokens, sequence.num_uncomputed_tokens) == (20, 1)


def test_unknown_tokens_cannot_be_computed() -> None:
    sequence = record(computed=15)
    with pytest.raises(AssertionError, match="only known tokens"):
        sequence.advance(6)
    assert sequence.num_computed_tokens == 15


@pytest.mark.parametrize(
    ("num_before", "token", "finish"),
    [
        (0, 0, None),
        (1, 0, Finish(FinishReason.EOS, 0)),
        (0, 9, None),
        (1, 9, Finish(FinishReason.STOP_TOKEN, 9)),
        (2, 50, None),
        (3, 50, Finish(FinishReason.LENGTH)),
        (3, 0, Finish(FinishReason.EOS, 0)),
    ],
)
def test_the_token_that_finishes_a_sequence_is_found(num_before: int, token: int, finish: Finish | None) -> None:
    stopping = Stopping(4, min_new_tokens=2, stop_token_ids=frozenset({9}), eos_token_ids=frozenset({0}))
    sequence = record(sampled=(7,) * num_before, stopping=stopping)
    assert sequence.extend((token,)) == finish == sequence.finish


def test_tokens_after_the_one_that_finishes_a_sequence_are_dropped() -> None:
    sequence = record(stopping=Stopping(9, eos_token_ids=frozenset({0})))
    assert sequence.extend((7, 8)) is None
    assert sequence.extend((5, 0, 6, 0)) == Finish(FinishReason.EOS, 0)
    assert sequence.output_token_ids == (7, 8, 5, 0)


def test_a_finished_sequence_does_not_grow() -> None:
    sequence = record(stopping=Stopping(1))
    assert sequence.extend((7,)) is not None
    with pytest.raises(AssertionError, match="does not grow"):
        sequence.extend((8,))
    assert sequence.output_token_ids == (7,)


def test_resumed_tokens_count_towards_the_length() -> None:
    sequence = record(resume=(50, 51), stopping=Stopping(3))
    assert sequence.extend((7,)) == Finish(FinishReason.LENGTH)


def test_free_slots_are_those_of_the_blocks_beyond_the_known_tokens() -> None:
    sequence = record()
    assert sequence.num_free_slots == 4
    for _ in range(5):
        sequence.extend((7,))
    assert sequence.num_free_slots == -1
    sequence.add_blocks((9,))
    assert (sequence.block_ids, sequence.num_free_slots) == ((3, 1, 2, 9), 7)


@pytest.mark.parametrize(("max_new_tokens", "max_blocks"), [(1, 3), (4, 3), (5, 4), (44, 8)])
def test_the_longest_sequence_is_prompt_and_longest_output(max_new_tokens: int, max_blocks: int) -> None:
    assert record(stopping=Stopping(max_new_tokens)).max_blocks == max_blocks


def test_a_swapped_sequence_has_no_blocks_and_nothing_to_share_until_it_is_swapped_in() -> None:
    sequence = record(computed=17)
    sequence.swap_out()
    assert (sequence.block_ids, sequence.num_shareable_blocks, sequence.num_hashable_blocks) == ((), 0, 2)
    assert sequence.num_computed_tokens == 17
    sequence.swap_in((8, 9, 7), is_exact=True)
    assert (sequence.block_ids, sequence.num_shareable_blocks) == ((8, 9, 7), 2)


def test_kv_from_an_inexact_copy_is_never_shared_again() -> None:
    sequence = record(computed=17)
    for is_exact in (False, True):
        sequence.swap_out()
        sequence.swap_in((8, 9, 7), is_exact=is_exact)
        assert (sequence.num_shareable_blocks, sequence.num_hashable_blocks) == (0, 0)


def test_a_sequence_that_has_blocks_is_not_swapped_in() -> None:
    with pytest.raises(AssertionError, match="swapped out"):
        record().swap_in((8, 9, 7), is_exact=True)


def test_hashes_are_those_of_the_whole_sequence_from_its_root() -> None:
    sequence = record(computed=16)
    assert sequence.block_hashes(0, 2) == block_hashes(PROMPT[:16], BLOCK, ROOT)
    assert sequence.block_hashes(1, 2) == block_hashes(PROMPT[:16], BLOCK, ROOT)[1:]
    assert sequence.block_hashes(0, 2) != block_hashes(PROMPT[:16], BLOCK, b"another root")


def test_only_full_blocks_of_computed_tokens_have_a_hash() -> None:
    sequence = record(computed=15)
    assert sequence.num_hashable_blocks == 1
    with pytest.raises(AssertionError, match="full blocks"):
        sequence.block_hashes(0, 2)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 500), st.booleans()), max_size=30))
def test_the_hash_chain_is_the_same_however_the_sequence_is_computed(steps: list[tuple[int, int, bool]]) -> None:
    """Each step computes up to so many tokens, appends one token, and may read the hashes."""
    sequence = record(tuple(range(20)), stopping=Stopping(1000))
    for num_tokens, token, reads_hashes in steps:
        sequence.advance(min(num_tokens, sequence.num_uncomputed_tokens))
        sequence.extend((token,))
        if reads_hashes:
            num_blocks = sequence.num_hashable_blocks
            computed = sequence.tokens(0, sequence.num_computed_tokens)
            assert sequence.block_hashes(0, num_blocks) == block_hashes(computed, BLOCK, ROOT)
        sequence.add_blocks(tuple(range(blocks_for(sequence.num_tokens, BLOCK) - len(sequence.block_ids))))
        sequence.check_integrity()
    assert 0 <= sequence.num_computed_tokens < sequence.num_tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [("_num_computed_tokens", 99), ("_num_computed_tokens", -1), ("block_ids", (1,)), ("_num_hashed_tokens", 19)],
)
def test_the_integrity_check_finds_a_broken_invariant(field: str, value: object) -> None:
    sequence = record(computed=17)
    sequence.check_integrity()
    setattr(sequence, field, value)
    with pytest.raises(AssertionError):
        sequence.check_integrity()
