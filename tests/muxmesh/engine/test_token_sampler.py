"""Sampling, compared with the logits processors of transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from muxmesh.engine.step import SampleSpec
from muxmesh.engine.token_sampler import _index_at, adjusted, candidates, sample_token, token_logprobs, uniform
from muxmesh.types import Sampling


def random_logits(seed: int, size: int = 3000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    scores: Any = warpers(torch.LongTensor([[0]]), torch.DoubleTensor(logits.astype(np.float64))[None])
    probabilities: np.ndarray = torch.softmax(scores, -1)[0].numpy()
    return probabilities


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 40, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.9999, 1.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(int(temperature * 100) + top_k)
    token_ids, weights = candidates(logits, Sampling(temperature, top_k, top_p))
    ours = np.zeros(len(logits))
    ours[slice(None) if token_ids is None else token_ids] = weights / weights.sum(dtype=np.float64)
    assert np.abs(ours - reference(logits, temperature, top_k, top_p)).max() < 1e-6


def test_top_k_keeps_ties() -> None:
    token_ids, _ = candidates(np.array([1.0, 2.0, 2.0, 0.0], dtype=np.float32), Sampling(1.0, top_k=1))
    assert token_ids is not None and token_ids.tolist() == [1, 2]


def test_a_tiny_top_p_keeps_the_most_likely_token() -> None:
    token_ids, _ = candidates(random_logits(1), Sampling(1.0, top_p=1e-6))
    assert token_ids is not None and token_ids.tolist() == [int(np.argmax(random_logits(1)))]


def test_greedy_sampling_takes_the_most_likely_token_and_the_first_of_equals() -> None:
    assert (
        sample_token(np.array([1.0, 3.0, 3.0], dtype=np.float32), SampleSpec(Sampling(temperature=0.0), 0)).token_id
        == 1
    )


def test_a_banned_token_is_never_sampled() -> None:
    greedy = SampleSpec(Sampling(temperature=0.0), 0, frozenset({1}))
    assert sample_token(np.array([1.0, 3.0, 2.0], dtype=np.float32), greedy).token_id == 2
    for index in range(50):
        spec = SampleSpec(Sampling(5.0, seed=3), index, frozenset({0, 2}))
        assert sample_token(np.array([9.0, 0.0, 9.0], dtype=np.float32), spec).token_id == 1


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    logits = random_logits(5)
    spec = SampleSpec(Sampling(1.0, seed=11), 4)
    assert sample_token(logits.copy(), spec) == sample_token(logits.copy(), spec)
    assert len({uniform(seed, 0, index) for seed in range(20) for index in range(20)}) == 400
    assert uniform(2**64 - 1, 0, 0) == uniform(-1, 0, 0) != uniform(-1, 1, 0)


def test_sampled_tokens_follow_their_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    sampled = [sample_token(logits.copy(), SampleSpec(Sampling(1.0, seed=1), index)).token_id for index in range(4000)]
    shares = np.bincount(sampled, minlength=3) / 4000
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.03


PROMPT, OUTPUT = (5, 9, 9, 40), (7, 9, 7, 7)


def test_min_p_is_that_of_transformers() -> None:
    logits = random_logits(8)
    scores: Any = MinPLogitsWarper(0.05)(torch.LongTensor([[0]]), torch.tensor(logits / 0.8)[None])
    expected = torch.softmax(scores, -1)[0].numpy()
    token_ids, weights = candidates(logits, Sampling(0.8, min_p=0.05))
    ours = np.zeros(len(logits))
    ours[token_ids] = weights / weights.sum()
    assert np.abs(ours - expected).max() < 1e-6


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(9)
    expected: Any = RepetitionPenaltyLogitsProcessor(1.3)(
        torch.LongTensor([[*PROMPT, *OUTPUT]]), torch.tensor(logits)[None].clone()
    )
    spec = SampleSpec(Sampling(repetition_penalty=1.3), 4, prompt_token_ids=PROMPT, output_token_ids=OUTPUT)
    assert np.abs(adjusted(logits, spec) - expected[0].numpy()).max() < 1e-6


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = random_logits(10)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    changed = adjusted(logits, SampleSpec(sampling, 4, prompt_token_ids=PROMPT, output_token_ids=OUTPUT)) - logits
    expected = np.zeros(len(logits))
    expected[7], expected[9] = -0.5 - 0.25 * 3, -0.5 - 0.25
    assert np.abs(changed - expected).max() < 1e-5


def test_bias_and_allowed_tokens_decide_what_is_sampled_and_leave_the_logits() -> None:
    logits = np.array([1.0, 3.0, 2.0, 0.0], dtype=np.float32)
    assert sample_token(logits, SampleSpec(Sampling(0.0, logit_bias=((3, 5.0),)), 0)).token_id == 3
    assert sample_token(logits, SampleSpec(Sampling(0.0, allowed_token_ids=(0, 2)), 0)).token_id == 2
    assert logits.tolist() == [1.0, 3.0, 2.0, 0.0]


def test_log_probabilities_are_those_of_the_unchanged_logits() -> None:
    logits = random_logits(11)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    order = np.argsort(-expected, kind="stable")
    sampling = Sampling(0.0, logprobs=3, logit_bias=((17, 100.0),), repetition_penalty=1.5)
    sampled = sample_token(logits, SampleSpec(sampling, 1, prompt_token_ids=PROMPT, output_token_ids=OUTPUT))
    assert sampled.token_id == 17 and sampled.logprobs is not None
    assert abs(sampled.logprobs.chosen.logprob - expected[17]) < 1e-6
    assert sampled.logprobs.chosen.rank == order.tolist().index(17) + 1
    assert [top.token_id for top in sampled.logprobs.top] == order[:3].tolist()
    assert [top.rank for top in sampled.logprobs.top] == [1, 2, 3]
    assert np.abs(np.array([top.logprob for top in sampled.logprobs.top]) - expected[order[:3]]).max() < 1e-6


def bitmask(allowed: set[int], size: int) -> np.ndarray:
    words = np.zeros(-(-size // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


@pytest.mark.parametrize("size", [31, 32, 33, 3000])
def test_only_tokens_of_the_bitmask_remain(size: int) -> None:
    logits = random_logits(12, size)
    allowed = {0, 7, size - 1}
    changed = adjusted(logits, SampleSpec(Sampling(), 0, token_bitmask=bitmask(allowed, size)))
    assert set(np.flatnonzero(np.isfinite(changed)).tolist()) == allowed
    assert np.array_equal(changed[sorted(allowed)], logits[sorted(allowed)])


def test_bitmask_banned_and_allowed_tokens_apply_together() -> None:
    logits = random_logits(13, 64)
    spec = SampleSpec(
        Sampling(0.0, allowed_token_ids=(1, 2, 3)), 0, frozenset({2}), token_bitmask=bitmask({2, 3, 40}, 64)
    )
    assert sample_token(logits, spec).token_id == 3
    assert np.isfinite(logits).all(), "the logits stay unchanged"


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.1, 1 / 3, 1.0]), min_size=1, max_size=600).filter(any),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0, exclude_max=True), st.just(float(np.nextafter(1.0, 0.0)))),
)
def test_a_token_of_weight_zero_is_never_sampled(weights: list[float], fraction: float) -> None:
    as_f32 = np.array(weights, dtype=np.float32)
    index = _index_at(as_f32, fraction)
    assert as_f32[index] > 0
    sums = np.cumsum(as_f32, dtype=np.float64) / as_f32.sum(dtype=np.float64)
    assert sums[index] >= fraction - 1e-6
    assert index == 0 or sums[index - 1] <= fraction + 1e-6


def test_rounding_at_the_end_of_the_vocabulary_does_not_reach_a_banned_token() -> None:
    generator, largest = np.random.default_rng(0), float(np.nextafter(1.0, 0.0))
    for _ in range(50):
        weights = np.concatenate([generator.random(250), np.zeros(6)]).astype(np.float32)
        assert weights[_index_at(weights, largest)] > 0


@pytest.mark.parametrize("num_candidates", [0, 1, 5])
def test_candidates_are_as_many_as_requested_and_equals_are_in_the_order_of_their_ids(num_candidates: int) -> None:
    logits = np.array([1.0, 2.0, 2.0, 0.0, 2.0], dtype=np.float32)
    found = token_logprobs(logits, 3, num_candidates)
    assert [top.token_id for top in found.top] == [1, 2, 4, 0, 3][:num_candidates]
    assert found.chosen.rank == 5


def test_without_a_change_the_logits_are_not_copied() -> None:
    logits = random_logits(14)
    assert adjusted(logits, SampleSpec(Sampling(top_k=3, temperature=0.5), 0)) is logits
    assert adjusted(logits, SampleSpec(Sampling(), 0, banned=frozenset({1}))) is not logits


@pytest.mark.parametrize("more", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1e-5}])
def test_logits_at_the_ends_of_their_range_are_sampled_at_the_lowest_temperature(more: dict[str, Any]) -> None:
    most = float(np.finfo(np.float32).max)
    logits = np.array([-most, most, most / 2, -np.inf, 0.0], np.float32)
    spec = SampleSpec(Sampling(temperature=1e-5, seed=3, **more), 0, prompt_token_ids=(0, 1))
    assert sample_token(logits, spec).token_id == 1
