from muxmesh.engine.api import Failed
from muxmesh.engine.native.cuda.logit_passes import joined_outcome, logit_passes
from muxmesh.engine.native.cuda.sampling_outcome import SamplingOutcome
from muxmesh.engine.step import Chunk, PromptScoring, SampledToken, SampleSpec
from muxmesh.types import Candidate, Sampling, TokenLogprobs

SAMPLE = SampleSpec(Sampling(), 0)
SCORED = Chunk(1, 10, tuple(range(100, 109)), (3, 4), SAMPLE, PromptScoring(tuple(range(101, 109)), 2))


def logprobs(*tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(Candidate(token, -1.0, 1)) for token in tokens)


def test_a_step_whose_logits_fit_is_one_pass_of_its_own_chunks() -> None:
    chunks = [Chunk(2, 5, (7,), (0,), SAMPLE), Chunk(3, 0, (7, 8, 9), (1,)), SCORED]
    assert logit_passes(chunks, 10) == [chunks]
    assert logit_passes([chunks[1]], 1) == [[chunks[1]]], "rows without logits do not count"


def test_a_long_scored_chunk_is_divided_and_samples_in_the_last_pass() -> None:
    decode = Chunk(2, 5, (7,), (0,), SAMPLE)
    passes = logit_passes([decode, SCORED, replace_job(decode, 3)], 4)
    assert [[chunk.num_logit_rows for chunk in chunks] for chunks in passes] == [[1], [4], [4], [1, 1]]
    parts = [chunk for chunks in passes for chunk in chunks if chunk.job_id == 1]
    assert sum((part.token_ids for part in parts), ()) == SCORED.token_ids
    assert [part.start for part in parts] == [10, 14, 18]
    assert [part.scoring and part.scoring.next_token_ids for part in parts] == [
        (101, 102, 103, 104),
        (105, 106, 107, 108),
        (),
    ]
    assert [part.sample for part in parts] == [None, None, SAMPLE]


def replace_job(chunk: Chunk, job_id: int) -> Chunk:
    return Chunk(job_id, chunk.start, chunk.token_ids, chunk.block_ids, chunk.sample)


def test_the_outcomes_of_passes_are_joined_in_order() -> None:
    first = SamplingOutcome({2: SampledToken(9)}, {1: logprobs(101, 102)}, {})
    second = SamplingOutcome({1: SampledToken(8)}, {1: logprobs(103)}, {})
    joined = joined_outcome([first, second])
    assert joined == SamplingOutcome({2: SampledToken(9), 1: SampledToken(8)}, {1: logprobs(101, 102, 103)}, {})


def test_a_sequence_that_fails_in_one_pass_has_neither_token_nor_log_probabilities() -> None:
    early, late = Failed("position 11"), Failed("position 15")
    passes = [
        SamplingOutcome({2: SampledToken(9)}, {3: logprobs(7)}, {1: early}),
        SamplingOutcome({1: SampledToken(8), 3: SampledToken(4)}, {1: logprobs(103)}, {1: late}),
    ]
    joined = joined_outcome(passes)
    assert joined == SamplingOutcome({2: SampledToken(9), 3: SampledToken(4)}, {3: logprobs(7)}, {1: early})
