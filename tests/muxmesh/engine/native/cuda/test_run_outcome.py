"""The tokens and failures of a run of decode steps, without a device."""

import numpy as np
import pytest

from muxmesh.engine.native.cuda.run_outcome import plain_outcome, run_outcome
from muxmesh.engine.native.cuda.sampling_kernel import NOT_FINITE, SAMPLED
from muxmesh.engine.native.cuda.sampling_outcome import SampledArrays
from muxmesh.engine.step import Chunk, SampledToken, SampleSpec
from muxmesh.types import Candidate, Sampling, TokenLogprobs

NONE = np.empty(0)


def decode(job_id: int, start: int, output_index: int, logprobs: int | None = None) -> Chunk:
    return Chunk(job_id, start, (1,), (0,), SampleSpec(Sampling(logprobs=logprobs), output_index))


CHUNKS = [decode(3, 40, 8), decode(1, 7, 2)]


def arrays(
    token_ids: list[int], can_sample: tuple[bool, bool] = (True, True), is_finite: tuple[bool, bool] = (True, True)
) -> SampledArrays:
    return SampledArrays(np.array(token_ids), np.array(can_sample), np.array(is_finite), NONE, NONE, NONE, NONE)


def tokens(*token_ids: int) -> tuple[SampledToken, ...]:
    return tuple(map(SampledToken, token_ids))


def test_each_sequence_has_a_token_of_every_step_in_order() -> None:
    sampled, failed = run_outcome(CHUNKS, [arrays([5, 6]), arrays([7, 8]), arrays([9, 10])])
    assert sampled == {3: tokens(5, 7, 9), 1: tokens(6, 8, 10)} and failed == {}


def test_a_sequence_that_fails_in_a_later_step_keeps_its_tokens_and_names_the_position_of_that_step() -> None:
    steps = [arrays([5, 6]), arrays([7, -1], is_finite=(True, False)), arrays([9, 2**40], is_finite=(True, False))]
    sampled, failed = run_outcome(CHUNKS, steps)
    assert sampled == {3: tokens(5, 7, 9), 1: tokens(6)}
    assert failed.keys() == {1} and "after the token at position 8;" in failed[1].reason


def test_a_sequence_without_a_token_to_sample_names_the_output_index_of_that_step_and_has_no_later_token() -> None:
    sampled, failed = run_outcome(CHUNKS, [arrays([5, 6]), arrays([7, 0], can_sample=(True, False)), arrays([9, 10])])
    assert sampled == {3: tokens(5, 7, 9), 1: tokens(6)}
    assert failed.keys() == {1} and "no token may be sampled at output index 3:" in failed[1].reason


def test_a_sequence_that_fails_in_the_first_step_has_no_tokens() -> None:
    sampled, failed = run_outcome(CHUNKS, [arrays([0, 6], is_finite=(False, True)), arrays([0, 8])])
    assert sampled == {1: tokens(6, 8)} and failed.keys() == {3}


def test_log_probabilities_are_those_of_the_step() -> None:
    def step(token_id: int, logprob: float) -> SampledArrays:
        yes = np.array([True])
        return SampledArrays(
            np.array([token_id]), yes, yes, np.array([logprob]), np.array([2]), np.array([[4]]), np.array([[-0.1]])
        )

    sampled, _ = run_outcome([decode(1, 7, 2, logprobs=1)], [step(5, -2.0), step(6, -3.0)])
    top = (Candidate(4, -0.1, 1),)
    assert sampled[1] == (
        SampledToken(5, TokenLogprobs(Candidate(5, -2.0, 2), top)),
        SampledToken(6, TokenLogprobs(Candidate(6, -3.0, 2), top)),
    )


@pytest.mark.parametrize("damaged_step", [None, 0, 1])
def test_plainly_sampled_steps_have_the_outcome_of_a_run(damaged_step: int | None) -> None:
    token_ids, statuses = np.array([[5, 6], [7, 8]]), np.full((2, 2), SAMPLED)
    if damaged_step is not None:
        statuses[damaged_step, 1] = NOT_FINITE
    finite = [(True, damaged_step != step) for step in range(2)]
    steps = [arrays(of_step, is_ok, is_ok) for of_step, is_ok in zip(token_ids.tolist(), finite, strict=True)]
    assert plain_outcome(CHUNKS, token_ids, statuses) == run_outcome(CHUNKS, steps)
