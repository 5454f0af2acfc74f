import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.predictor.rank_correlation import kendall_tau, tau_deviation

PAIRS = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=12)


def tau(left: list[float], right: list[float]) -> float:
    return kendall_tau(np.array(left, float), np.array(right, float))


def tau_of_the_definition(pairs: list[tuple[int, int]]) -> float:
    """(concordant - discordant) / sqrt(pairs untied on the left * pairs untied on the right)."""
    signs = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in combinations(pairs, 2)]
    untied = sum(left != 0 for left, _ in signs) * sum(right != 0 for _, right in signs)
    return sum(left * right for left, right in signs) / untied**0.5 if untied else 0.0


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 1, 1], [3, 2, 1], 0),
        ([1, 2, 3], [5, 5, 5], 0),
        ([1, 2, 2, 3], [1, 2, 3, 3], 4 / 5),
        ([7], [7], 0),
        ([], [], 0),
    ],
)
def test_tau_of_known_sequences(left: list[float], right: list[float], expected: float) -> None:
    assert tau(left, right) == pytest.approx(expected)


@given(PAIRS)
def test_tau_is_that_of_the_definition_with_ties(pairs: list[tuple[int, int]]) -> None:
    left, right = zip(*pairs, strict=True)
    assert tau(list(left), list(right)) == pytest.approx(tau_of_the_definition(pairs), abs=1e-12)


@given(PAIRS)
def test_tau_depends_on_ranks_only_and_is_symmetric(pairs: list[tuple[int, int]]) -> None:
    left, right = np.array(pairs, float).T
    assert kendall_tau(np.exp(left), 3 * right - 7) == pytest.approx(kendall_tau(right, left), abs=1e-12)


def test_the_deviation_of_tau_is_that_of_shuffled_values() -> None:
    rng, values = np.random.default_rng(1), np.arange(16.0)
    taus = [kendall_tau(values, rng.permutation(values)) for _ in range(4000)]
    assert tau_deviation(16) == pytest.approx(np.std(taus), rel=0.05)
    assert tau_deviation(1) == math.inf > tau_deviation(2)
