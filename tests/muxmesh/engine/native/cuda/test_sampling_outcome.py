"""Tokens, log-probabilities and failures by job, from the array that a device computes for a plan."""

import numpy as np

from muxmesh.engine.native.cuda.sampling_outcome import SampledArrays, sampling_outcome
from muxmesh.engine.native.cuda.sampling_plan import plan_sampling
from muxmesh.engine.step import Chunk, PromptScoring, SampledToken, SampleSpec
from muxmesh.errors import SequenceFailed
from muxmesh.types import Candidate, Sampling, TokenLogprobs

VOCAB_SIZE = 50
CHUNKS = [
    Chunk(7, 20, (4, 5, 6), (0,), SampleSpec(Sampling(logprobs=1), 4), PromptScoring((5, 6), 2)),
    Chunk(2, 0, (9,), (1,)),
    Chunk(3, 8, (7,), (2,), SampleSpec(Sampling(), 11)),
]
"""Logit rows: three of job 7, one of job 3. Scored tokens: two of the prompt of job 7, and the one that it samples."""


def arrays(can_sample: tuple[int, int] = (1, 1), is_finite: tuple[int, int, int, int] = (1, 1, 1, 1)) -> SampledArrays:
    """What a device computes for `CHUNKS` whose samples are the tokens 30 and 31."""
    logprobs, top_logprobs = np.array([-1.5, -2.5, -3.5]), np.array([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6])
    parts = [[30, 31], can_sample, is_finite, logprobs.view(np.int64), [5, 6, 7], range(10, 16)]
    packed = np.concatenate([np.array(part, dtype=np.int64) for part in (*parts, top_logprobs.view(np.int64))])
    return SampledArrays.unpack(plan_sampling(CHUNKS, VOCAB_SIZE), packed, VOCAB_SIZE)


PROMPT_LOGPROBS = (
    TokenLogprobs(Candidate(5, -1.5, 5), (Candidate(10, -0.1, 1), Candidate(11, -0.2, 2))),
    TokenLogprobs(Candidate(6, -2.5, 6), (Candidate(12, -0.3, 1), Candidate(13, -0.4, 2))),
)
SAMPLED_LOGPROBS = TokenLogprobs(Candidate(30, -3.5, 7), (Candidate(14, -0.5, 1),))


def test_unpacked_arrays_have_the_shapes_of_the_plan() -> None:
    unpacked = arrays(is_finite=(1, 1, 0, 1))
    assert unpacked.token_ids.tolist() == [30, 31]
    assert (unpacked.can_sample.tolist(), unpacked.is_finite.tolist()) == ([True, True], [True, True, False, True])
    assert (unpacked.logprobs.tolist(), unpacked.ranks.tolist()) == ([-1.5, -2.5, -3.5], [5, 6, 7])
    assert unpacked.top_ids.tolist() == [[10, 11], [12, 13], [14, 15]]
    assert unpacked.top_logprobs.tolist() == [[-0.1, -0.2], [-0.3, -0.4], [-0.5, -0.6]]


def test_a_vocabulary_smaller_than_the_candidates_bounds_them() -> None:
    chunk = Chunk(1, 8, (7,), (2,), SampleSpec(Sampling(logprobs=20), 0))
    numbers = np.array([-0.5, -0.9, -0.5]).view(np.int64).tolist()
    packed = np.array([1, 1, 1, numbers[0], 1, 1, 0, numbers[2], numbers[1]], dtype=np.int64)
    unpacked = SampledArrays.unpack(plan_sampling([chunk], 2), packed, 2)
    top = (Candidate(1, -0.5, 1), Candidate(0, -0.9, 2))
    expected = {1: SampledToken(1, TokenLogprobs(Candidate(1, -0.5, 1), top))}
    assert sampling_outcome([chunk], unpacked).sampled == expected


def test_each_job_has_its_tokens_and_as_many_candidates_as_it_requests() -> None:
    outcome = sampling_outcome(CHUNKS, arrays())
    assert outcome.sampled == {7: SampledToken(30, SAMPLED_LOGPROBS), 3: SampledToken(31)}
    assert outcome.prompt_logprobs == {7: PROMPT_LOGPROBS} and not outcome.failed


def test_a_job_with_a_row_that_is_not_finite_has_neither_token_nor_log_probabilities() -> None:
    outcome = sampling_outcome(CHUNKS, arrays(is_finite=(1, 0, 1, 1)))
    assert outcome.sampled == {3: SampledToken(31)} and outcome.prompt_logprobs == {}
    assert outcome.failed.keys() == {7} and outcome.failed[7].kind is SequenceFailed
    assert "after the token at position 21;" in outcome.failed[7].reason


def test_a_job_without_a_token_to_sample_keeps_the_log_probabilities_of_its_prompt() -> None:
    outcome = sampling_outcome(CHUNKS, arrays(can_sample=(0, 1)))
    assert outcome.sampled == {3: SampledToken(31)} and outcome.prompt_logprobs == {7: PROMPT_LOGPROBS}
    assert outcome.failed.keys() == {7}
    assert "no token may be sampled at output index 4:" in outcome.failed[7].reason


def test_a_failed_job_does_not_shift_the_values_of_the_jobs_after_it() -> None:
    chunks = [CHUNKS[0], Chunk(3, 8, (7,), (2,), SampleSpec(Sampling(logprobs=0), 11))]
    parts = [[30, 31], [1, 1], [0, 1, 1, 1], np.array([-1.0, -2.0, -3.0, -4.0]).view(np.int64), [5, 6, 7, 8]]
    packed = np.concatenate([np.array(part, dtype=np.int64) for part in (*parts, [0] * 8, [0] * 8)])
    outcome = sampling_outcome(chunks, SampledArrays.unpack(plan_sampling(chunks, VOCAB_SIZE), packed, VOCAB_SIZE))
    assert outcome.sampled == {3: SampledToken(31, TokenLogprobs(Candidate(31, -4.0, 8)))}
