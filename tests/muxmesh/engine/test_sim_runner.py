"""The tokens, lengths and step times of the sim engine."""

from statistics import fmean

import numpy as np
import pytest

from muxmesh.config.model_config import SimProfile
from muxmesh.engine.sim_runner import SimRunner, sim_step_cost
from muxmesh.engine.step import Chunk, SampleSpec, Step
from muxmesh.types import Sampling

EOS, CAP = 7, 2000


def length(profile: SimProfile, last_of_prompt: int, seed: int = 0, banned: frozenset[int] = frozenset()) -> int:
    """Tokens of an output until it ends by itself, the last one included."""
    runner, token = SimRunner(profile, range(35, 93), EOS), last_of_prompt
    for index in range(CAP):
        spec = SampleSpec(Sampling(seed=seed), index, banned)
        outcome = runner.run(Step((Chunk(1, index, (token,), (), spec),)))
        token = outcome.sampled[1][0].token_id
        if token == EOS:
            return index + 1
    return CAP


def test_outputs_of_equal_lengths_end_at_that_length() -> None:
    assert {length(SimProfile(output_tokens=5), prompt) for prompt in range(100)} == {5}
    assert length(SimProfile(), 3) == CAP


def test_geometric_lengths_have_their_mean_and_are_reproducible() -> None:
    profile = SimProfile(output_tokens=30, output_lengths="geometric")
    lengths = [length(profile, prompt % 160, seed=prompt) for prompt in range(800)]
    assert fmean(lengths) == pytest.approx(30, rel=0.15)
    assert sum(one > 60 for one in lengths) / len(lengths) == pytest.approx(0.131, abs=0.04)  # (1 - 1/30) ** 60
    assert len({one for one in lengths if one > 60}) > 30, "long outputs end at different lengths"
    assert [length(profile, prompt, seed=prompt) for prompt in range(50)] == lengths[:50]
    assert [length(profile, prompt, seed=1) for prompt in range(50)] != lengths[:50]


def test_a_banned_end_token_is_not_sampled() -> None:
    profile = SimProfile(output_tokens=1, output_lengths="geometric")
    assert length(profile, 3) == 1
    assert length(profile, 3, banned=frozenset({EOS})) == CAP


def sample(
    spec: SampleSpec, last: int = 40, profile: SimProfile | None = None, token_ids: range = range(35, 93)
) -> int:
    """The token that is sampled after the token ``last``."""
    runner = SimRunner(profile or SimProfile(), token_ids, EOS)
    return runner.run(Step((Chunk(1, 0, (last,), (), spec),))).sampled[1][0].token_id


def test_a_token_depends_on_the_token_before_it_the_index_and_the_seed() -> None:
    specs = [SampleSpec(Sampling(seed=seed), index) for seed in range(4) for index in range(4)]
    tokens = [sample(spec, last) for spec in specs for last in range(4)]
    assert tokens == [sample(spec, last) for spec in specs for last in range(4)]
    assert len(set(tokens)) > 30 and set(tokens) <= set(range(35, 93))


def test_greedy_sampling_has_no_seed() -> None:
    assert len({sample(SampleSpec(Sampling(temperature=0.0, seed=seed), 3)) for seed in range(20)}) == 1


def mask(*tokens: int) -> np.ndarray:
    words = np.zeros(9, dtype=np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        (SampleSpec(Sampling(allowed_token_ids=(40, 41)), 0), {40, 41}),
        (SampleSpec(Sampling(allowed_token_ids=(40, 41)), 0, frozenset({40})), {41}),
        (SampleSpec(Sampling(), 0, token_bitmask=mask(50, 64)), {50, 64}),
        (SampleSpec(Sampling(), 0, frozenset({50}), token_bitmask=mask(50, 64)), {64}),
        (SampleSpec(Sampling(), 0, token_bitmask=mask(3, 200)), {3, 200}),
    ],
    ids=["allowed", "allowed and not banned", "in the bitmask", "in the bitmask and not banned", "outside its tokens"],
)
def test_only_tokens_that_may_be_sampled_are_sampled(spec: SampleSpec, tokens: set[int]) -> None:
    profile = SimProfile(output_tokens=1)  # every output would end at its first token
    assert {sample(spec, last, profile) for last in range(50)} == tokens


def test_only_chunks_with_a_sample_have_a_token_and_no_kv_is_written() -> None:
    chunks = (Chunk(1, 0, (40, 41), ()), Chunk(2, 0, (40,), (), SampleSpec(Sampling(), 0)))
    outcome = SimRunner(SimProfile(), range(35, 93), EOS).run(Step(chunks))
    assert (set(outcome.sampled), outcome.kv_bytes_written) == ({2}, 0)


def test_a_step_takes_as_long_as_the_profile_says() -> None:
    slept_s: list[float] = []
    profile = SimProfile(base_s=1.0, per_token_s=0.1, per_context_s=0.01)
    SimRunner(profile, range(35, 93), EOS, slept_s.append).run(Step((Chunk(1, 20, (40, 41), ()),)))
    assert slept_s == [pytest.approx(1.0 + 0.1 * 2 + 0.01 * (20 + 21))]
    assert sim_step_cost(profile).step_s(2, 41) == slept_s[0]


def test_a_profile_without_times_does_not_sleep() -> None:
    slept_s: list[float] = []
    SimRunner(SimProfile(), range(35, 93), EOS, slept_s.append).run(Step((Chunk(1, 0, (40,), ()),)))
    assert slept_s == []
