"""Sampling on the device, compared with sampling on the host for the same logits."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muxmesh.device.torch_device import open_torch_device
from muxmesh.engine.api import Failed
from muxmesh.engine.native.cuda.sampling import Sampler
from muxmesh.engine.native.cuda.sampling_kernel import SAMPLED, sample_rows
from muxmesh.engine.native.cuda.sampling_outcome import SampledArrays, SamplingOutcome, sampling_outcome
from muxmesh.engine.native.cuda.sampling_plan import plan_sampling, row_parameters, uniforms_ahead
from muxmesh.engine.step import Chunk, PromptScoring, SampledToken, SampleSpec
from muxmesh.engine.token_sampler import _index_at, adjusted, candidates, sample_token, token_logprobs, uniform
from muxmesh.errors import SequenceFailed
from muxmesh.types import Sampling, TokenLogprobs

DEVICE = open_torch_device()
TOLERANCE = 2e-6
"""Of random numbers, and relative of top-p and min-p, on a GPU. In the interpreter the tokens are equal."""


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


def on_device(logits: np.ndarray, specs: list[SampleSpec]) -> list[SampledToken | Failed]:
    outcome = outcome_of(logits, decode_chunks(specs))
    return [outcome.failed.get(job) or outcome.sampled[job] for job in range(len(specs))]


def assert_near(ours: TokenLogprobs, expected: TokenLogprobs) -> None:
    for one, other in zip((ours.chosen, *ours.top), (expected.chosen, *expected.top), strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)


def on_host(logits: np.ndarray, spec: SampleSpec) -> SampledToken | Failed:
    try:
        return sample_token(logits, spec)
    except SequenceFailed as error:
        return Failed(str(error), SequenceFailed)


def assert_same(ours: SampledToken | Failed, logits: np.ndarray, spec: SampleSpec) -> None:
    """Checks that it is what the host samples; on a GPU it may be another token if a boundary is near."""
    expected = on_host(logits, spec)
    if isinstance(ours, Failed) or isinstance(expected, Failed):
        assert ours == expected
        return
    if ours.token_id != expected.token_id:
        assert not DEVICE.is_interpreted, f"{ours.token_id} was sampled, not {expected.token_id}"
        assert ours.token_id in nearly_sampled(logits, spec)
        return
    assert (ours.logprobs is None) == (expected.logprobs is None)
    if ours.logprobs and expected.logprobs:
        assert_near(ours.logprobs, expected.logprobs)


def nearly_sampled(logits: np.ndarray, spec: SampleSpec) -> set[int]:
    """The tokens that the host samples for numbers that are within `TOLERANCE` of those of the spec."""
    sampling, found = spec.sampling, set[int]()
    number = uniform(sampling.seed, spec.sequence_index, spec.output_index)
    for by in itertools.product((-TOLERANCE, 0.0, TOLERANCE), repeat=3):
        near = replace(sampling, top_p=sampling.top_p * (1 + by[0]), min_p=sampling.min_p * (1 + by[1]))
        token_ids, weights = candidates(adjusted(logits, spec), near)
        index = _index_at(weights, min(max(number + by[2], 0.0), float(np.nextafter(1.0, 0.0))))
        found.add(index if token_ids is None else int(token_ids[index]))
    return found


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


@pytest.mark.parametrize("vocab_size", [11, 300, 5000])
def test_rows_of_different_parameters_sample_the_tokens_that_the_host_samples(vocab_size: int) -> None:
    logits = random_logits(vocab_size, len(FILTERS), vocab_size)
    logits[::2] = np.round(logits[::2])  # ties
    specs = [SampleSpec(replace(sampling, seed=5), index) for index, sampling in enumerate(FILTERS)]
    for ours, row, spec in zip(on_device(logits, specs), logits, specs, strict=True):
        assert_same(ours, row, spec)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, top_k=3000),
        Sampling(1.0, top_p=0.7),
        Sampling(50.0, top_k=2500, top_p=0.9),
        Sampling(1.0, min_p=0.999),
        Sampling(1.0, top_p=0.9999999),
    ],
)
def test_more_likely_tokens_than_the_list_holds_are_searched_in_the_whole_row(sampling: Sampling) -> None:
    flat = np.round(random_logits(3, 1, 5000) / 3, 1)  # many ties
    spec = SampleSpec(replace(sampling, seed=9), 2)
    assert_same(on_device(flat, [spec])[0], flat[0], spec)


@st.composite
def sample_specs(draw: st.DrawFn, vocab_size: int) -> SampleSpec:
    """Any spec for which the request is valid."""
    tokens = st.integers(0, vocab_size - 1)
    some = st.lists(tokens, max_size=6, unique=True)
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.0, 1e-5, 0.3, 1.0, 1.7, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, vocab_size, 10_000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1e-6, 0.4, 0.9, 0.99999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.7, 1.0])),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -1.5, 0.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1e-5, 1.3, 100.0])),
        logit_bias=tuple((token, draw(st.floats(-100, 100, width=32))) for token in draw(some)),
        allowed_token_ids=draw(st.one_of(st.none(), some.filter(bool).map(tuple))),
        logprobs=draw(st.sampled_from([None, None, 0, 2])),
    )
    bitmask = draw(st.one_of(st.none(), some))
    return SampleSpec(
        sampling,
        output_index=draw(st.integers(0, 100_000)),
        banned=frozenset(draw(st.one_of(st.just([]), some))),
        sequence_index=draw(st.integers(0, 3)),
        prompt_token_ids=tuple(draw(st.lists(tokens, max_size=8))) if sampling.has_penalties else (),
        output_token_ids=tuple(draw(st.lists(tokens, max_size=8))) if sampling.has_penalties else (),
        token_bitmask=None if bitmask is None else bitmask_of(bitmask, vocab_size),
    )


def bitmask_of(allowed: list[int], vocab_size: int) -> np.ndarray:
    words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


@settings(max_examples=40)
@given(st.data())
def test_any_parameters_sample_what_the_host_samples(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([5, 32, 75]))
    specs = data.draw(st.lists(sample_specs(vocab_size), min_size=1, max_size=3))
    values = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, -0.0, 2.0, -np.inf, 3e38, -3e38]))
    rows = [data.draw(st.lists(values, min_size=vocab_size, max_size=vocab_size)) for _ in specs]
    logits = np.array(rows, dtype=np.float32)
    logits[:, 0] = 1.0  # a maximum that is finite
    for ours, row, spec in zip(on_device(logits, specs), logits, specs, strict=True):
        assert_same(ours, row, spec)


@pytest.mark.parametrize("more", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1e-5}])
def test_logits_at_the_ends_of_their_range_are_sampled_at_the_lowest_temperature(more: dict[str, Any]) -> None:
    most = float(np.finfo(np.float32).max)
    logits = np.array([[-most, most, most / 2, -np.inf, 0.0]], np.float32)
    spec = SampleSpec(Sampling(temperature=1e-5, seed=3, **more), 0, prompt_token_ids=(0, 1))
    assert on_device(logits, [spec]) == [SampledToken(1)]


@pytest.mark.parametrize("damage", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf], [np.nan]])
def test_a_row_that_is_not_finite_fails_its_sequence_and_no_other(damage: list[float]) -> None:
    logits = random_logits(4, 3, 40)
    logits[1] = damage[-1]
    logits[1, 5] = damage[0]
    specs = [SampleSpec(Sampling(temperature, logprobs=1), 3) for temperature in (0.0, 1.0, 0.0)]
    first, second, third = on_device(logits, specs)
    assert isinstance(second, Failed) and second.kind is SequenceFailed
    assert "logits that are not finite after the token at position 7" in second.reason
    for ours, row, spec in ((first, logits[0], specs[0]), (third, logits[2], specs[2])):
        assert_same(ours, row, spec)


def test_a_request_that_bans_every_token_fails() -> None:
    spec = SampleSpec(Sampling(0.0, allowed_token_ids=(1, 2)), 6, banned=frozenset({1, 2}))
    failed, other = on_device(random_logits(5, 2, 30), [spec, SampleSpec(Sampling(0.0), 0)])
    assert failed == Failed("no token may be sampled at output index 6: every logit is -inf", SequenceFailed)
    assert isinstance(other, SampledToken)


def test_prompts_are_scored_beside_samples() -> None:
    logits = random_logits(6, 7, 50)
    chunks = [
        Chunk(1, 0, (4, 5, 6), (0,), SampleSpec(Sampling(0.0, logprobs=4), 0), PromptScoring((5, 6), 2)),
        Chunk(2, 0, (9,), (1,)),
        Chunk(3, 8, (7,), (2,), SampleSpec(Sampling(1.0, seed=2), 0)),
        Chunk(4, 0, (1, 2), (3,), None, PromptScoring((2, 3), 0)),
        Chunk(5, 8, (7,), (4,), SampleSpec(Sampling(0.0, logprobs=0), 0)),
    ]
    outcome = outcome_of(logits, chunks)
    for job_id, row in ((1, 2), (3, 3), (5, 6)):
        spec = next(chunk.sample for chunk in chunks if chunk.job_id == job_id)
        assert spec is not None
        assert_same(outcome.sampled[job_id], logits[row], spec)
    scored = {1: [(0, 5, 2), (1, 6, 2)], 4: [(4, 2, 0), (5, 3, 0)]}
    assert outcome.prompt_logprobs.keys() == scored.keys() and not outcome.failed
    for job_id, expected in scored.items():
        for ours, (row, token, count) in zip(outcome.prompt_logprobs[job_id], expected, strict=True):
            assert_near(ours, token_logprobs(logits[row], token, count))


def test_a_scored_prompt_with_a_row_that_is_not_finite_names_its_position() -> None:
    logits = random_logits(7, 4, 20)
    logits[1, 3] = np.nan
    chunks = [
        Chunk(1, 30, (4, 5, 6), (0,), SampleSpec(Sampling(0.0), 0), PromptScoring((5, 6), 2)),
        Chunk(2, 8, (7,), (2,), SampleSpec(Sampling(0.0, logprobs=1), 0)),
    ]
    outcome = outcome_of(logits, chunks)
    assert "after the token at position 31" in outcome.failed[1].reason
    assert_same(outcome.sampled[2], logits[3], SampleSpec(Sampling(0.0, logprobs=1), 0))


def test_the_most_likely_of_many_rows_are_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxmesh.engine.native.cuda.token_logprobs._ELEMENTS_AT_ONCE", 50)
    logits = np.round(random_logits(8, 5, 20))
    outcome = outcome_of(logits, [Chunk(1, 0, (1, 2, 3, 4, 5), (0,), None, PromptScoring((2, 3, 4, 5), 20))])
    for row, ours in enumerate(outcome.prompt_logprobs[1]):
        assert_near(ours, token_logprobs(logits[row], row + 2, 20))


def test_a_later_step_samples_with_the_random_numbers_of_its_output_index() -> None:
    logits = random_logits(9, 2, 60)
    specs = [SampleSpec(Sampling(1.5, seed=seed), 10, banned=frozenset({3})) for seed in (1, 2)]
    chunks = decode_chunks(specs)
    plan, ahead = plan_sampling(chunks, 60), DEVICE.upload(uniforms_ahead(specs, 3))
    sampler = Sampler(DEVICE, 60, 2)
    uploaded = sampler.upload(plan)
    for step in range(3):
        tokens = sampler.enqueue(DEVICE.upload(logits), uploaded, ahead[step]).token_ids.tolist()
        later = [replace(spec, output_index=10 + step) for spec in specs]
        assert tokens == [sample_token(row, spec).token_id for row, spec in zip(logits, later, strict=True)]


def test_captured_sampling_follows_its_tensors() -> None:
    sampler, specs = Sampler(DEVICE, 40, 2), [SampleSpec(Sampling(2.0, seed=1), 0), SampleSpec(Sampling(0.0), 0)]
    logits, uniforms = DEVICE.upload(random_logits(1, 2, 40)), DEVICE.upload(uniforms_ahead(specs, 1)[0])
    parameters = DEVICE.upload(row_parameters(specs))
    tokens, statuses = (torch.full((2,), 9, device=DEVICE.torch_device) for _ in range(2))
    with DEVICE.compute():
        replay = DEVICE.capture(lambda: sample_rows(logits, parameters, uniforms, tokens, statuses, sampler.likely))
        for seed in (5, 6):
            other = random_logits(seed, 2, 40)
            specs[0] = replace(specs[0], output_index=seed)
            logits.copy_(torch.from_numpy(other))
            uniforms.copy_(torch.from_numpy(uniforms_ahead(specs, 1)[0]))
            replay()
            assert tokens.tolist() == [sample_token(row, s).token_id for row, s in zip(other, specs, strict=True)]
            assert statuses.tolist() == [SAMPLED, SAMPLED]


def test_no_sample_and_no_scored_token_are_a_plan_too() -> None:
    outcome = outcome_of(np.empty((0, 8), dtype=np.float32), [Chunk(1, 0, (5,), (0,))])
    assert not outcome.sampled and not outcome.failed and not outcome.prompt_logprobs


def test_the_parameters_of_a_single_row_may_have_any_stride() -> None:
    """NumPy and torch keep the strides of an array that had more columns before, and a copy to a GPU has them too."""
    logits, device = torch.from_numpy(random_logits(7, 1, 40)), DEVICE.torch_device
    parameters = torch.empty_strided((4, 1), (1, 4), dtype=torch.float64, device=device)
    parameters.copy_(torch.tensor([[0.0], [0.0], [1.0], [0.0]], dtype=torch.float64))
    sampler, uniforms = Sampler(DEVICE, 40, 1), torch.zeros(1, dtype=torch.float64, device=device)
    tokens, statuses = torch.zeros(2, 1, dtype=torch.int64, device=device)
    sample_rows(logits.to(device), parameters, uniforms, tokens, statuses, sampler.likely)
    assert (tokens.item(), statuses.item()) == (logits.argmax().item(), SAMPLED)
