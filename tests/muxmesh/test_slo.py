"""Targets, verdicts and slack of SLOs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.config.slo_config import SloConfig
from muxmesh.slo import Objective, RequestSlo, Slo, catch_up_s, first_token_due_s, next_token_due_s
from muxmesh.step_cost import StepCost
from muxmesh.types import SloTargets
from muxmesh.unloaded_latency import Unloaded

# A step of n tokens over c earlier ones takes 10 + 1 * n + 0.01 * c ms.
COST = StepCost(0.010, 0.001, 0.00001, mean_seqs=5, mean_context=300)
UNLOADED = Unloaded(COST, COST, chunk=100)


@pytest.mark.parametrize(
    ("config", "targets", "e2el_s"),
    [
        (SloConfig(ttft_s=1), SloTargets(1, None), None),
        (Slo(tpot_s=0.1), SloTargets(None, 0.1), None),
        (SloConfig(ttft_s=1, tpot_s=0.1), SloTargets(1, 0.1), 1 + 20 * 0.1),
        (
            SloConfig(scale=4),
            SloTargets(4 * UNLOADED.ttft_s(150), 4 * UNLOADED.tpot_s(150, 21)),
            4 * UNLOADED.e2el_s(150, 21),
        ),
    ],
)
def test_targets_are_the_limits_or_a_multiple_of_the_unloaded_latency(
    config: Objective, targets: SloTargets, e2el_s: float | None
) -> None:
    slo = RequestSlo.of(config, UNLOADED)
    assert slo is not None
    assert slo.targets(150, 21) == targets
    assert slo.e2el_s(150, 21) == (None if e2el_s is None else pytest.approx(e2el_s))


def test_a_request_has_no_slo_without_one_of_its_model_and_with_a_scale_of_an_unknown_latency() -> None:
    assert RequestSlo.of(None, UNLOADED) is None
    assert RequestSlo.of(SloConfig(scale=4), None) is None
    assert RequestSlo.of(SloConfig(ttft_s=1), None) is not None


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "e2el_s", "expected"),
    [
        (1.0, 0.1, 3.0, (True, True, True)),
        (1.1, 0.1, 3.0, (False, True, True)),
        (1.0, 0.2, 3.0, (True, False, True)),
        (1.0, None, 3.1, (True, True, False)),
    ],
)
def test_a_request_meets_its_slo_if_it_meets_both_targets(
    ttft_s: float, tpot_s: float | None, e2el_s: float, expected: tuple[bool, bool, bool]
) -> None:
    verdict = RequestSlo(SloConfig(ttft_s=1, tpot_s=0.1)).verdict(5, 21, ttft_s, tpot_s, e2el_s)
    assert (verdict.ttft, verdict.tpot, verdict.e2el) == expected
    assert verdict.met == (expected[0] and expected[1])


def test_a_target_that_is_not_set_is_met() -> None:
    assert RequestSlo(SloConfig(tpot_s=0.1)).verdict(5, 21, 1e9, 0.1, 1e9).met


@given(st.integers(1, 2000), st.integers(1, 500), st.floats(1, 16), st.floats(0, 2), st.floats(0, 2))
def test_with_a_scale_who_meets_both_targets_meets_the_rule_of_muxserve(
    num_prompt: int, num_output: int, scale: float, ttft: float, tpot: float
) -> None:
    slo = RequestSlo(SloConfig(scale=scale), UNLOADED)
    ttft_s = ttft * scale * UNLOADED.ttft_s(num_prompt)
    tpot_s = tpot * scale * UNLOADED.tpot_s(num_prompt, num_output)
    verdict = slo.verdict(num_prompt, num_output, ttft_s, tpot_s, ttft_s + (num_output - 1) * tpot_s)
    assert verdict.e2el or not verdict.met


def test_the_first_token_is_due_its_target_after_the_arrival_whatever_the_clocks_of_the_hosts_are() -> None:
    # The router sent the request 0.3 s after its arrival; the worker got it at 1000 by its own clock.
    assert first_token_due_s(SloTargets(0.5, None, 0.3), 1000.0) == pytest.approx(1000.2)


def test_the_token_after_n_is_due_n_times_the_target_after_the_first() -> None:
    assert next_token_due_s(SloTargets(None, 0.1), 1000.0, 3) == pytest.approx(1000.3)


def test_nothing_more_is_due_after_a_wait_that_is_longer_than_the_ttft_target() -> None:
    assert next_token_due_s(SloTargets(0.5, 0.1, waited_s=0.5), 1000.0) == pytest.approx(1000.1)
    assert next_token_due_s(SloTargets(0.5, 0.1, waited_s=0.6), 1000.0) == math.inf
    assert next_token_due_s(SloTargets(None, 0.1, waited_s=9.0), 1000.0) == pytest.approx(1000.1)


def test_nothing_is_due_without_a_target() -> None:
    for targets in (None, SloTargets()):
        assert first_token_due_s(targets, 1000.0) == next_token_due_s(targets, 1000.0) == math.inf
        assert catch_up_s(targets) == math.inf


def test_steps_of_eight_tokens_can_be_made_up_for() -> None:
    assert catch_up_s(SloTargets(0.5, 0.1)) == pytest.approx(0.8)
