import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.predictor.conformal_bound import FIRST_BOUND, ConformalBound


def miss_rates(bound: ConformalBound, score_at: Callable[[int], float], count: int) -> list[bool]:
    """Observes ``count`` scores; for each, whether it was above the bound of its time."""
    missed = []
    for index in range(count):
        score = score_at(index)
        missed.append(score > bound.bound)
        bound.observe(score, bound.bound)
    return missed


def test_the_first_bound_holds_until_there_are_enough_scores_for_the_level() -> None:
    bound = ConformalBound()
    for _ in range(8):  # of 8 scores, none is the 0.9 quantile of 9
        bound.observe(0.0, bound.bound)
    assert bound.bound == FIRST_BOUND
    for _ in range(8):
        bound.observe(0.0, bound.bound)
    assert bound.bound == 0.0


@pytest.mark.parametrize(("level", "expected"), [(0.9, 88), (0.5, 49)])
def test_the_bound_is_the_conformal_quantile_of_the_scores(level: float, expected: float) -> None:
    bound = ConformalBound(level, first_bound=-1.0)
    for index, score in enumerate(random.Random(1).sample(range(1, 97), 96)):
        # As many miss as should, so that the level stays near its target.
        bound.observe(score, math.inf if index % 10 >= 10 * (1 - level) else -math.inf)
    assert bound.bound == pytest.approx(expected, abs=1)


def through_json(bound: ConformalBound) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(bound.dump()))
    return state


@given(
    st.lists(st.floats(-50, 50), max_size=60), st.lists(st.floats(-50, 50), max_size=20), st.sampled_from([0.5, 0.9])
)
def test_a_loaded_bound_continues_as_the_dumped_one(before: list[float], after: list[float], level: float) -> None:
    first, second = ConformalBound(level), ConformalBound(level)
    for score in before:
        first.observe(score, first.bound)
    second.load(through_json(first))
    for score in after:
        assert second.bound == first.bound
        first.observe(score, first.bound)
        second.observe(score, second.bound)
    assert second.dump() == first.dump()


@pytest.mark.parametrize(
    "change",
    [
        {"bound": 3.0},
        {"scores": [1.0] * 7, "bound": 1.0},
        {"scores": ["x"]},
        {"scores": [math.nan] * 9},
        {"level": 1.5},
        {"level": None},
        {"since_solved": None},
    ],
    ids=str,
)
def test_a_state_that_no_bound_has_is_rejected(change: dict[str, Any]) -> None:
    """Above all a bound of fewer scores than observing waits for."""
    with pytest.raises((ValueError, TypeError)):
        ConformalBound().load(through_json(ConformalBound()) | change)


def test_scores_are_the_latest_ones_oldest_first() -> None:
    bound = ConformalBound()
    miss_rates(bound, float, 600)
    assert bound.scores == [float(score) for score in range(600 - 512, 600)]


def test_a_score_counts_as_missed_by_the_bound_that_was_in_use_when_it_was_predicted() -> None:
    rng = random.Random(3)
    scores = [rng.gauss(0, 1) for _ in range(200)]
    always, never = ConformalBound(), ConformalBound()
    for score in scores:
        always.observe(score, float("-inf"))
        never.observe(score, float("inf"))
    assert always.bound == max(scores) > never.bound


def test_the_bound_follows_a_shift_of_the_scores() -> None:
    rng = random.Random(0)
    missed = miss_rates(ConformalBound(), lambda index: rng.gauss(0 if index < 2000 else 1.5, 1), 4000)
    assert np.mean(missed[500:2000]) == pytest.approx(0.1, abs=0.03)
    assert np.mean(missed[2600:]) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("slope", [1 / 400, -1 / 400])
def test_the_median_follows_a_drift_in_both_directions(slope: float) -> None:
    rng = random.Random(0)
    missed = miss_rates(ConformalBound(0.5, 0.0), lambda index: rng.gauss(slope * index, 1), 4000)
    assert np.mean(missed[1000:]) == pytest.approx(0.5, abs=0.03)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=80), st.sampled_from([0.5, 0.9]))
def test_the_bound_is_the_first_one_or_a_score(scores: list[float], level: float) -> None:
    bound = ConformalBound(level, first_bound=100.0)
    for score in scores:
        bound.observe(score, bound.bound)
    assert bound.bound in {100.0, *scores}
