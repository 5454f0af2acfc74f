"""The plan of faults: a function of its seed that reaches every fault of every role."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.chaos.faults import CLIENT, FAULTS, MODEL
from benchmarks.chaos.plan import PlannedFault, plan_faults, role_of, show_plan

NAMES = ["kvstore/unit0", "prefill/a", "decode/a", "prefill/b", "decode/b", "router", "redis", CLIENT, f"{MODEL}/a"]


def plan(seed: int, seconds: float = 300.0) -> list[PlannedFault]:
    return list(plan_faults(random.Random(seed), seconds, FAULTS, NAMES))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another_one() -> None:
    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    short = plan(3, 60.0)
    assert plan(3, 300.0)[: len(short)] == short


def test_at_a_slower_pace_the_same_faults_come_later() -> None:
    fast = list(plan_faults(random.Random(3), 60.0, FAULTS, NAMES))
    slow = list(plan_faults(random.Random(3), 60.0, FAULTS, NAMES, pace=3.0))
    assert [fault.target for fault in slow] == [fault.target for fault in fast[: len(slow)]]
    assert all(
        later.at_s - 1 == pytest.approx(3 * (sooner.at_s - 1), abs=0.03)
        for sooner, later in zip(fast, slow, strict=False)
    )


def test_a_fault_hits_only_the_roles_that_the_table_gives_it() -> None:
    roles = {fault.name: fault.roles for fault in FAULTS}
    assert all(role_of(fault.target) in roles[fault.fault] for seed in range(20) for fault in plan(seed))


def test_every_fault_hits_every_role_of_the_table_sooner_or_later() -> None:
    hit = {(fault.fault, role_of(fault.target)) for seed in range(20) for fault in plan(seed)}
    assert hit == {(fault.name, role) for fault in FAULTS for role in fault.roles}


def test_faults_are_in_order_of_time_and_held_within_their_bounds() -> None:
    bounds = {fault.name: fault.hold_s for fault in FAULTS}
    faults = plan(4, 1000.0)
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    assert faults[-1].at_s < 1000.0
    assert all(bounds[fault.fault][0] <= fault.hold_s <= bounds[fault.fault][1] for fault in faults)


def test_some_faults_come_together_and_some_during_a_recovery() -> None:
    faults = plan(5, 1000.0)
    gaps = [b.at_s - a.at_s for a, b in pairwise(faults)]
    counts = Counter("together" if gap <= 0.11 else "soon" if gap <= 2.5 else "apart" for gap in gaps)
    assert min(counts["together"], counts["soon"]) > len(gaps) / 8
    assert counts["apart"] > len(gaps) / 4


def test_a_plan_is_shown_with_a_line_for_each_fault() -> None:
    faults = [PlannedFault(1.0, "kill -9", "redis", 0.0), PlannedFault(2.5, "stop", "router", 0.7)]
    assert show_plan(faults).splitlines() == ["    1.00 s  kill -9   redis", "    2.50 s  stop      router  for 0.7 s"]
