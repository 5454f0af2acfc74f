"""The corrected estimator: its formula, memory, contention, latency."""

from __future__ import annotations

import math

import pytest

from muxmesh.placement.corrected_estimator import Candidate, CorrectedEstimator
from muxmesh.placement.plan import Cluster, PlacedModel, PlacedUnit, Plan
from tests.support.placement import CLUSTER, load, profile

ESTIMATOR = CorrectedEstimator(profile(), CLUSTER)


def test_what_is_served_is_at_most_the_rate() -> None:
    estimate = ESTIMATOR.estimate_unit(1, [Candidate(load("a", 2.0), 90, 90)])
    assert estimate is not None
    assert estimate.models[0].throughput == 2.0
    assert estimate.prefill_part == pytest.approx(2.0 * 0.1 * 200 / 1000)


def test_prefills_and_decodes_divide_the_time_at_saturation() -> None:
    # 4 sequences: a decode step takes 1.4 ms, 100 steps an output; a prefill 20 ms.
    estimate = ESTIMATOR.estimate_unit(1, [Candidate(load("a", 1e6), 90, 90, max_num_seqs=4)])
    assert estimate is not None
    without_prefills = 4 / 0.14
    served = estimate.models[0].throughput
    assert served == pytest.approx((1 - served * 0.02) * without_prefills, rel=1e-6)
    assert math.isinf(estimate.models[0].ttft_s)
    assert estimate.models[0].tpot_s == pytest.approx(0.0014 / (1 - served * 0.02), rel=1e-6)


def test_a_larger_share_or_more_devices_is_never_slower() -> None:
    found = [
        ESTIMATOR.estimate_unit(size, [Candidate(load("a", 1e6), 90, share, 8)])
        for size, share in ((1, 30), (1, 45), (1, 60), (1, 90), (2, 90))
    ]
    served = [one.models[0].throughput for one in found if one]
    assert len(served) == 5 and served == sorted(served)


def test_neighbours_slow_a_decode_down_by_their_shares() -> None:
    contended = CorrectedEstimator(profile(contention=0.5), CLUSTER)
    models = [Candidate(load("a", 1.0), 90, 60, 4), Candidate(load("b", 1.0), 90, 30, 4)]
    quiet, noisy = ESTIMATOR.estimate_unit(1, models), contended.estimate_unit(1, models)
    assert quiet is not None and noisy is not None
    assert noisy.models[0].tpot_s == pytest.approx(quiet.models[0].tpot_s * 1.15)
    assert noisy.models[1].tpot_s == pytest.approx(quiet.models[1].tpot_s * 1.3)


def test_weights_and_workers_take_memory_from_the_kv() -> None:
    cluster = Cluster(1, 2, memory_bytes=1000, worker_bytes=50)
    estimator = CorrectedEstimator(profile(), cluster)
    assert estimator.kv_bytes(1, ["small", "small"]) == 1000 - 4 * 50 - 200
    assert estimator.kv_bytes(2, ["small"]) == 2 * (1000 - 100) - 100
    assert estimator.estimate_unit(1, [Candidate(load(str(one), 1.0), 90, 30) for one in range(5)]) is None


def test_batch_caps_are_what_rates_need_within_the_memory() -> None:
    models = [Candidate(load("a", 5.0), 90, 90), Candidate(load("b", 10.0), 90, 90)]
    ample = ESTIMATOR.estimate_unit(1, models)
    tight = CorrectedEstimator(profile(), Cluster(1, 1, 200 + 301 * 4)).estimate_unit(1, models)
    assert ample is not None and ample.max_num_seqs[0] < ample.max_num_seqs[1]
    assert tight is not None and sum(tight.max_num_seqs) <= 4


def test_attainment_falls_as_the_load_nears_the_capacity() -> None:
    found = []
    for rate in (1.0, 10.0, 25.0, 100.0):
        plan = Plan((PlacedUnit(1, (PlacedModel(load("a", rate), 90, 90, 8),)),))
        found.append(ESTIMATOR.attainment(plan))
    assert found[0] > 0.99 and found == sorted(found, reverse=True) and found[-1] < 0.5


def test_a_plan_that_does_not_fit_serves_nothing() -> None:
    estimator = CorrectedEstimator(profile(), Cluster(1, 1, 50))
    plan = Plan((PlacedUnit(1, (PlacedModel(load("a", 1.0), 90, 90, 8),)),))
    assert estimator.score(plan) == 0.0
