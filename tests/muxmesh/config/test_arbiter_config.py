"""The settings of the arbiter: defaults, what `auto` becomes, and what is refused."""

from dataclasses import asdict, dataclass
from typing import Any

import pytest
from pydantic import ValidationError

from muxmesh.config.arbiter_config import ArbiterConfig


@dataclass(frozen=True)
class Unit:
    """What `auto` depends on."""

    is_cuda: bool = True
    uses_mps: bool = False
    has_limits: bool = False
    has_slos: bool = False
    num_models: int = 2

    def resolve(self, **settings: Any) -> ArbiterConfig:
        return ArbiterConfig(**settings).resolved(**asdict(self))


@pytest.mark.parametrize(
    ("unit", "mode"),
    [
        (Unit(), "adbs"),
        (Unit(has_limits=True), "adbs"),
        (Unit(uses_mps=True, has_limits=True), "adbs"),
        (Unit(uses_mps=True), "spatial"),
        (Unit(num_models=1), "roundrobin"),
        (Unit(num_models=1, has_slos=True), "adbs"),
        (Unit(num_models=1, uses_mps=True, has_limits=True), "adbs"),
    ],
)
def test_auto_is_adbs_unless_mps_limits_no_worker_or_one_model_has_no_slo(unit: Unit, mode: str) -> None:
    assert unit.resolve().mode == mode
    assert unit.resolve(mode="fcfs").mode == "fcfs"


def test_over_subscription_is_20_percent_on_a_gpu_only_unless_it_is_set() -> None:
    assert [Unit(is_cuda=one, uses_mps=one).resolve().over_subscription for one in (False, True)] == [0, 20]
    assert Unit(uses_mps=True).resolve(over_subscription=0).over_subscription == 0


def test_workers_of_a_gpu_without_mps_never_compute_together() -> None:
    assert [Unit().resolve(over_subscription=over).over_subscription for over in (None, 20, 100)] == [0, 0, 0]


def test_slos_let_a_worker_be_overtaken_more_often_unless_it_is_set() -> None:
    assert [Unit(has_slos=has_slos).resolve().max_overtakes for has_slos in (False, True)] == [8, 32]
    assert Unit(has_slos=True).resolve(max_overtakes=1).max_overtakes == 1


def test_a_worker_is_not_killed_before_its_grant_is_revoked() -> None:
    with pytest.raises(ValidationError, match=r"kill_after_s: is 5; must be at least longest_grant_s \(10\)"):
        ArbiterConfig(kill_after_s=5)


def test_grants_that_would_be_checked_without_a_pause_are_refused() -> None:
    assert ArbiterConfig(longest_grant_s=0.01).longest_grant_s == 0.01
    with pytest.raises(ValidationError, match=r"longest_grant_s\n.*greater than or equal to 0\.01"):
        ArbiterConfig(longest_grant_s=0.001)


def test_the_time_until_the_kill_is_free_in_a_mode_that_revokes_nothing() -> None:
    assert ArbiterConfig(mode="spatial", kill_after_s=5).kill_after_s == 5
