"""What is uploaded to sample on the device."""

import numpy as np

from muxmesh.engine.native.cuda.sampling_plan import uniforms_ahead
from muxmesh.engine.step import SampleSpec
from muxmesh.engine.token_sampler import uniform
from muxmesh.types import Sampling


def test_the_random_numbers_of_a_run_of_steps_are_those_of_the_host_and_0_for_greedy_sampling() -> None:
    specs = [
        SampleSpec(Sampling(seed=-7), 3),
        SampleSpec(Sampling(temperature=0.0, seed=5), 0),
        SampleSpec(Sampling(seed=2**63), 900, sequence_index=4),
    ]
    expected = [[uniform(-7, 0, 3 + step), 0.0, uniform(2**63, 4, 900 + step)] for step in range(5)]
    assert uniforms_ahead(specs, 5).tolist() == expected
    assert uniforms_ahead(specs[1:2], 3).tolist() == [[0.0]] * 3
    assert np.shape(uniforms_ahead([], 2)) == (2, 0)
