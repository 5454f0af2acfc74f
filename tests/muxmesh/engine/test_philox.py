"""Random numbers of many keys at once, against NumPy's generator."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.philox import uniforms
from muxmesh.engine.token_sampler import uniform

WORD = st.integers(0, 2**64 - 1)
KEYS = st.lists(st.tuples(WORD | st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20), st.integers(0, 2**40)))


@given(KEYS)
def test_each_number_is_that_of_the_sampler_on_the_host(keys: list[tuple[int, int, int]]) -> None:
    columns = [np.array([key[i] % 2**64 for key in keys], dtype=np.uint64) for i in range(3)]
    assert uniforms(*columns).tolist() == [uniform(*key) for key in keys]


def test_keys_are_broadcast() -> None:
    seeds, steps = np.array([3, 2**64 - 1], dtype=np.uint64), np.arange(4, dtype=np.uint64)[:, None]
    numbers = uniforms(seeds, np.zeros(2, dtype=np.uint64), steps)
    assert numbers.shape == (4, 2) and numbers.dtype == np.float64
    assert numbers.tolist() == [[uniform(3, 0, step), uniform(-1, 0, step)] for step in range(4)]


def test_numbers_are_uniform() -> None:
    numbers = uniforms(np.array(1, dtype=np.uint64), np.array(0, dtype=np.uint64), np.arange(40_000, dtype=np.uint64))
    counts, _ = np.histogram(numbers, bins=20, range=(0.0, 1.0))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(counts - 2000).max() < 200
