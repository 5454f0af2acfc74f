"""Logits in the steps of a run with penalties, bit for bit those of the host's sampler."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from muxmesh.device.torch_device import open_torch_device
from muxmesh.engine.native.cuda.sampling import Sampler
from muxmesh.engine.native.cuda.sampling_plan import plan_sampling
from muxmesh.engine.step import Chunk, SampleSpec
from muxmesh.engine.token_sampler import adjusted
from muxmesh.types import Sampling

DEVICE, VOCAB_SIZE = open_torch_device(), 40
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8).map(tuple)


@st.composite
def specs(draw: st.DrawFn) -> SampleSpec:
    sampling = Sampling(
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5, 1e-5, 1e-40])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7, -1.1])),
        presence_penalty=draw(st.sampled_from([0.0, -1.5, 0.3])),
        logit_bias=draw(st.sampled_from([(), ((3, 2.5),)])),
    )
    if not sampling.has_penalties:
        return SampleSpec(sampling, 0, banned=draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=3)))
    return SampleSpec(sampling, 0, prompt_token_ids=draw(TOKENS), output_token_ids=draw(TOKENS))


@settings(max_examples=60, deadline=None)
@given(st.lists(specs(), min_size=1, max_size=4), st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_logits_are_penalized_for_the_tokens_of_the_run_as_on_the_host(
    of_samples: list[SampleSpec], seeds: list[int]
) -> None:
    sampler = Sampler(DEVICE, VOCAB_SIZE, len(of_samples))
    chunks = [Chunk(job, 7, (1,), (0,), spec) for job, spec in enumerate(of_samples)]
    uploaded = sampler.upload(plan_sampling(chunks, VOCAB_SIZE))
    penalties = sampler.run_penalties(uploaded)
    assert (penalties is not None) == any(spec.sampling.has_penalties for spec in of_samples)
    if penalties is None or uploaded.edits is None:
        return
    for seed in seeds:
        chance = np.random.default_rng(seed)
        logits = chance.normal(0, 3, (len(of_samples), VOCAB_SIZE)).astype(np.float32)
        got = DEVICE.upload(logits.copy())
        uploaded.edits.bias_and_mask(got)
        penalties.penalize(got)
        expected = [adjusted(row, spec) for row, spec in zip(logits, of_samples, strict=True)]
        assert np.array_equal(got.cpu().numpy(), np.stack(expected))
        sampled = chance.integers(0, VOCAB_SIZE, len(of_samples))
        penalties.count(DEVICE.upload(sampled))
        of_samples = [
            replace(spec, output_token_ids=(*spec.output_token_ids, int(token)))
            if spec.sampling.has_penalties
            else spec
            for spec, token in zip(of_samples, sampled, strict=True)
        ]


def test_what_a_failed_sample_has_in_place_of_a_token_harms_no_other_sample() -> None:
    sampler = Sampler(DEVICE, VOCAB_SIZE, 2)
    spec = SampleSpec(Sampling(presence_penalty=1.0), 0)
    penalties = sampler.run_penalties(
        sampler.upload(plan_sampling([Chunk(job, 7, (1,), (0,), spec) for job in (0, 1)], VOCAB_SIZE))
    )
    assert penalties is not None
    for nothing in (-1, VOCAB_SIZE, 2**40):
        penalties.count(DEVICE.upload(np.array([nothing, 6])))
    logits = DEVICE.upload(np.zeros((2, VOCAB_SIZE), dtype=np.float32))
    penalties.penalize(logits)
    assert logits[1].tolist() == [-1.0 if token == 6 else 0.0 for token in range(VOCAB_SIZE)]
