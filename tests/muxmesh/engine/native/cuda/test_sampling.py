"""Sampling on the device, compared with sampling on the host for the same logits."""

from dataclasses import replace

import numpy as np
import pytest

from muxmesh.device.torch_device import open_torch_device
from muxmesh.engine.api import Failed
from muxmesh.engine.native.cuda.sampling import Sampler
from muxmesh.engine.native.cuda.sampling_plan import (
    SampledArrays,
    SamplingOutcome,
    plan_sampling,
    sampling_outcome,
)
from muxmesh.engine.step import Chunk, SampledToken, SampleSpec
from muxmesh.engine.token_sampler import sample_token
from muxmesh.errors import SequenceFailed
from muxmesh.types import Sampling, TokenLogprobs

DEVICE = open_torch_device()


def random_logits(seed: int, rows: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab_size)).astype(np.float32)


def decode_chunks(specs: list[SampleSpec]) -> list[Chunk]:
    return [Chunk(job_id, 7, (1,), (0,), spec) for job_id, spec in enumerate(specs)]


def outcome_of(logits: np.ndarray, chunks: list[Chunk]) -> SamplingOutcome:
    """What the device samples and scores."""
    vocab_size = logits.shape[1]
    plan = plan_sampling(chunks, vocab_size)
    sampler = Sampler(DEVICE, vocab_size, max(1, len(plan.sample_rows)))
    given_logits = DEVICE.upload(logits)
    with np.errstate(over="ignore"):  # of the interpreter
        result = sampler.enqueue(given_logits, sampler.upload(plan))
    assert np.array_equal(given_logits.cpu().numpy(), logits, equal_nan=True), "the logits stay unchanged"
    return sampling_outcome(chunks, SampledArrays.unpack(plan, DEVICE.download(result.packed)(), vocab_size))


def on_host(logits: np.ndarray, spec: SampleSpec) -> SampledToken | Failed:
    try:
        return sample_token(logits, spec)
    except SequenceFailed as error:
        return Failed(str(error), SequenceFailed)


def on_device(logits: np.ndarray, specs: list[SampleSpec]) -> list[SampledToken | Failed]:
    outcome = outcome_of(logits, decode_chunks(specs))
    return [outcome.failed.get(job) or outcome.sampled[job] for job in range(len(specs))]


def assert_near(ours: TokenLogprobs, expected: TokenLogprobs) -> None:
    for one, other in zip((ours.chosen, *ours.top), (expected.chosen, *expected.top), strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)


def assert_equal(ours: SampledToken | Failed, expected: SampledToken | Failed) -> None:
    if isinstance(ours, Failed) or isinstance(expected, Failed):
        assert ours == expected
        return
    assert ours.token_id == expected.token_id
    assert (ours.logprobs is None) == (expected.logprobs is None)
    if ours.logprobs and expected.logprobs:
        assert_near(ours.logprobs, expected.logprobs)


FILTERS = [
    Sampling(0.0),
    Sampling(0.7),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=40),
    Sampling(2.0, top_p=0.9),
    Sampling(0.3, top_p=1e-6),
    Sampling(1.0, min_p=0.05),
    Sampling(1.5, top_k=40, top_p=0.8, min_p=0.02),
]


@pytest.mark.parametrize("vocab_size", [11, 300, 9000])
def test_rows_of_different_parameters_sample_the_tokens_that_the_host_samples(vocab_size: int) -> None:
    logits = random_logits(vocab_size, len(FILTERS), vocab_size)
    logits[::2] = np.round(logits[::2])  # ties
    specs = [SampleSpec(replace(sampling, seed=5), index) for index, sampling in enumerate(FILTERS)]
    for ours, row, spec in zip(on_device(logits, specs), logits, specs, strict=True):
        assert_equal(ours, on_host(row, spec))
