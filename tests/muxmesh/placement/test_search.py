"""The search: never worse than greedy, the optimum of tiny cases, memory, and the bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest

from muxmesh.errors import ConfigError
from muxmesh.placement.corrected_estimator import CorrectedEstimator
from muxmesh.placement.plan import Cluster, ModelLoad
from muxmesh.placement.profile import Profile
from muxmesh.placement.reference_estimator import ReferenceEstimator
from muxmesh.placement.search import fits, groups, search
from muxmesh.placement.throughput_bound import throughput_bound
from muxmesh.placement.unit_choices import Objective, UnitChoices, decode_shares
from tests.support.placement import load, profile

KINDS = (("small", 0.1, 100), ("large", 0.3, 3000))
PROFILE = profile(kinds=KINDS)


def choices(
    loads: Sequence[ModelLoad], cluster: Cluster, objective: Objective | None = None, of: Profile = PROFILE
) -> UnitChoices:
    corrected = CorrectedEstimator(of, cluster)
    return UnitChoices(loads, of, cluster, objective or Objective(), ReferenceEstimator(of, 200, 100), corrected)


LOADS = [load("a", 20.0), load("b", 3.0), load("c", 1.0, "large"), load("d", 6.0, "large")]


def all_states(loads: Sequence[ModelLoad], cluster: Cluster) -> Iterator[list[tuple[int, frozenset[int]]]]:
    """Every assignment of models to the units of every group of sizes."""
    for sizes in ([2], [1, 1], [2, 1], [2, 2], [2, 1, 1], [1, 1, 1], [1, 1, 1, 1]):
        if sum(sizes) <= cluster.num_devices:
            for places in product(range(len(sizes)), repeat=len(loads)):
                yield [
                    (size, frozenset(model for model, place in enumerate(places) if place == unit))
                    for unit, size in enumerate(sizes)
                    if unit in places
                ]


@pytest.mark.parametrize("objective", [Objective(), Objective(reference=1.0, corrected=0.0)])
def test_the_best_plan_of_a_tiny_case_is_found(objective: Objective) -> None:
    cluster = Cluster(2, 2, 100_000)
    tried = choices(LOADS, cluster, objective)
    values = []
    for state in all_states(LOADS, cluster):
        found = [tried.best(*unit) for unit in state]
        values.append(sum(one.value for one in found if one) if all(found) else 0.0)
    result = search(choices(LOADS, cluster, objective), max_moves=1500)
    assert result.values[0] == pytest.approx(max(values))
    assert result.values[0] > result.greedy_value - 1e-9


def test_a_plan_has_every_model_once_and_fits_the_cluster() -> None:
    cluster = Cluster(2, 2, 100_000)
    for plan in search(choices(LOADS, cluster), max_moves=300).plans:
        assert sorted(model.load.name for unit in plan.units for model in unit.models) == ["a", "b", "c", "d"]
        assert plan.num_devices <= 4
        for unit in plan.units:
            assert sum(model.decode_share for model in unit.models) <= cluster.max_share


def test_no_plan_exceeds_the_bound() -> None:
    cluster = Cluster(2, 2, 100_000)
    loads = [load(one.name, one.rate * 10, one.kind) for one in LOADS]
    corrected = CorrectedEstimator(PROFILE, cluster)
    best = search(choices(loads, cluster), max_moves=500).plans[0]
    bound = throughput_bound(loads, PROFILE, cluster, corrected)
    assert 0.3 * bound < corrected.score(best) <= bound


def test_a_search_gives_the_same_plan_for_the_same_seed() -> None:
    cluster = Cluster(1, 2, 100_000)
    assert search(choices(LOADS, cluster), 7, 200).plans == search(choices(LOADS, cluster), 7, 200).plans


def test_models_that_fit_no_device_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"models: c: large fits no unit of 2 or fewer devices"):
        search(choices(LOADS, Cluster(1, 2, 1000)))
    with pytest.raises(ConfigError, match=r"cluster: 1 devices do not hold all 4 models, with at most 4 in a unit"):
        search(choices(LOADS, Cluster(1, 1, 3400)))


def test_only_maximal_shares_are_tried_unless_all_are_asked_for() -> None:
    assert list(decode_shares((30, 60, 90), 2, 120, is_thorough=False)) == [(30, 90), (60, 60), (90, 30)]
    assert len(list(decode_shares((30, 60, 90), 2, 120, is_thorough=True))) == 6
    assert list(decode_shares((30, 60, 90), 4, 120, is_thorough=False)) == [(30, 30, 30, 30)]


def test_groups_are_the_splits_of_nodes_into_powers_of_two() -> None:
    assert len(list(groups(Cluster(1, 8, 1)))) == 10
    assert set(groups(Cluster(2, 2, 1))) == {(2, 2), (2, 1, 1), (1, 1, 1, 1)}


def test_units_do_not_span_nodes() -> None:
    assert fits(Cluster(2, 6, 1), [4, 4, 2, 2])
    assert not fits(Cluster(2, 6, 1), [4, 4, 4])
