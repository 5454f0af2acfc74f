"""The lengths of the sim engine's outputs."""

from statistics import fmean

import pytest

from muxmesh.config.schema import SimProfile
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.engine.step import Chunk, SampleSpec, Step
from muxmesh.types import Sampling

EOS, CAP = 7, 2000


def length(profile: SimProfile, last_of_prompt: int, seed: int = 0, banned: frozenset[int] = frozenset()) -> int:
    """Tokens until the answer ends by itself, the last one included."""
    runner, token = SimRunner(profile, range(35, 93), EOS), last_of_prompt
    for index in range(CAP):
        spec = SampleSpec(Sampling(seed=seed), index, banned)
        outcome = runner.run(Step((Chunk(1, index, (token,), (), spec),)))
        token = outcome.sampled[1].token_id
        if token == EOS:
            return index + 1
    return CAP


def test_equal_lengths() -> None:
    assert {length(SimProfile(output_tokens=5), prompt) for prompt in range(100)} == {5}
    assert length(SimProfile(), 3) == CAP


def test_geometric_lengths_spread_about_their_mean_and_are_the_same_again() -> None:
    profile = SimProfile(output_tokens=30, output_lengths="geometric")
    lengths = [length(profile, prompt % 160, seed=prompt) for prompt in range(800)]
    assert fmean(lengths) == pytest.approx(30, rel=0.15)
    assert sum(one > 60 for one in lengths) / len(lengths) == pytest.approx(0.131, abs=0.04)  # (1 - 1/30) ** 60
    assert len({one for one in lengths if one > 60}) > 30, "those that are long end apart"
    assert [length(profile, prompt, seed=prompt) for prompt in range(50)] == lengths[:50]
    assert [length(profile, prompt, seed=1) for prompt in range(50)] != lengths[:50]


def test_an_end_that_may_not_be_yet_comes_no_sooner_than_it_may() -> None:
    with pytest.raises(ValueError, match="output_lengths: geometric needs output_tokens"):
        SimProfile(output_lengths="geometric")
    profile = SimProfile(output_tokens=1, output_lengths="geometric")
    assert length(profile, 3) == 1
    assert length(profile, 3, banned=frozenset({EOS})) == CAP
