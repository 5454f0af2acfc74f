"""Filter, score and pick, one rule after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.step_cost import UNMEASURED, ModelCosts, StepCost
from router.unit_choice import (
    CLEARLY_S,
    PREFILL_WEIGHT,
    Candidate,
    ChoiceReason,
    UnitLoad,
    assumed_costs,
    choose,
    choose_better,
    filtered,
    prefill_s,
)


def unit(
    name: str, cached: int = 0, wait_s: float = 0.0, seqs: int = 0, prefill: float | None = None, **state: Any
) -> Candidate:
    """A unit for a prompt of 1,000 tokens, of which each takes a millisecond."""
    computed_s = (1000 - cached) / 1000 if prefill is None else prefill
    return Candidate(name, 1000, cached, wait_s, computed_s, seqs, **state)


def chosen(*candidates: Candidate, turn: int = 0) -> tuple[str, ChoiceReason]:
    choice = choose(candidates, turn)
    return choice.candidate.unit, choice.reason


def test_the_unit_that_caches_the_prompt_is_chosen() -> None:
    assert chosen(unit("a"), unit("b", cached=900)) == ("b", ChoiceReason.PREFIX)


def test_an_idle_unit_computes_again_what_another_caches_behind_a_long_queue() -> None:
    assert chosen(unit("a"), unit("b", cached=900, wait_s=3.0)) == ("a", ChoiceReason.RECOMPUTE)


def test_a_short_queue_is_worth_waiting_for_a_cached_prompt() -> None:
    assert chosen(unit("a"), unit("b", cached=900, wait_s=1.0)) == ("b", ChoiceReason.PREFIX)


def test_what_is_computed_again_counts_more_than_a_wait() -> None:
    shorter_wait, more_cached = unit("a", wait_s=1.0), unit("b", cached=700, wait_s=2.0)
    assert shorter_wait.first_token_s < more_cached.first_token_s and PREFILL_WEIGHT > 1
    assert chosen(shorter_wait, more_cached)[0] == "b"


def test_a_prefix_is_not_copied_for_a_small_gain() -> None:
    assert chosen(unit("a", cached=500), unit("b", cached=600, wait_s=0.3))[0] == "b"
    assert chosen(unit("a", cached=500), unit("b", cached=600, wait_s=0.5))[0] == "a"


def test_without_a_cached_token_the_fewest_sequences_decide() -> None:
    assert chosen(unit("a", seqs=2), unit("b", seqs=1)) == ("b", ChoiceReason.LOAD)


def test_equal_units_take_turns() -> None:
    units = [unit(name) for name in "abc"]
    assert [chosen(*units, turn=turn)[0] for turn in range(6)] == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize("state", [{"is_connected": False}, {"is_awake": False}, {"fits": False}])
def test_a_unit_that_cannot_serve_is_not_chosen_though_it_caches_the_prompt(state: dict[str, bool]) -> None:
    assert chosen(unit("a", cached=999, **state), unit("b", wait_s=9.0)) == ("b", ChoiceReason.ONLY)
    assert chosen(unit("a", cached=999, **state), unit("b", **state)) == ("a", ChoiceReason.PREFIX), "none is better"


def test_a_unit_that_can_never_hold_the_sequence_is_worse_than_one_that_is_away() -> None:
    assert chosen(unit("a", fits=False), unit("b", is_connected=False))[0] == "b"
    assert chosen(unit("a", is_awake=False), unit("b", is_connected=False))[0] == "a"


def test_the_reason_names_what_was_known_of_the_best_units() -> None:
    away = [unit(name, is_connected=False) for name in "xy"]
    text = choose([unit("a"), unit("b", cached=900, wait_s=0.5), *away], 0).text
    assert text == (
        "b: 900 of 1000 tokens cached, waits 0.5 s, prefill 0.1 s; a: 0 of 1000 tokens cached, free, prefill 1 s; "
        "not available: 2"
    )
    assert choose([unit("a"), *away], 0).text == "a: 0 of 1000 tokens cached, free, prefill 1 s; not available: 2"
    assert choose([unit("a")], 0).text == "a: 0 of 1000 tokens cached, free, prefill 1 s"


def test_a_queued_request_moves_to_a_unit_that_starts_it_clearly_sooner() -> None:
    better = choose_better([unit("a"), unit("b", wait_s=5.0)], unit("c", cached=900, wait_s=4.0), 0)
    assert better is not None and better.candidate.unit == "a"


@pytest.mark.parametrize("wait_s", [0.0, 1.5, 1.8])
def test_it_stays_if_it_gains_little(wait_s: float) -> None:
    assert choose_better([unit("a", prefill=1.0)], unit("c", cached=900, wait_s=wait_s), 0) is None


def test_it_stays_if_it_would_start_within_a_moment_anyway() -> None:
    assert choose_better([unit("a", prefill=0.0)], unit("c", wait_s=CLEARLY_S * 0.9, prefill=0.0), 0) is None


def test_it_leaves_a_unit_that_is_lost_whatever_it_gains() -> None:
    lost = unit("c", cached=1000, is_connected=False)
    better = choose_better([unit("a", wait_s=60.0)], lost, 0)
    assert better is not None and better.candidate.unit == "a"
    assert (
        choose_better([unit("a", is_connected=False, cached=1000, prefill=0.0)], replace(lost, wait_s=0.1), 0) is None
    )


def test_it_does_not_move_to_a_unit_that_is_lost() -> None:
    assert choose_better([unit("a", is_connected=False)], unit("c", wait_s=60.0), 0) is None


@pytest.mark.parametrize(
    ("load", "wait_s"),
    [
        (UnitLoad(), 0.0),
        (UnitLoad(3, 10.0, 2.0), 2.0),
        (UnitLoad(4, 10.0, 2.0), 2.5),
        (UnitLoad(7, 10.0, 2.0), 10.0),
        (UnitLoad(7, 10.0, 12.0), 12.0),
    ],
)
def test_a_request_waits_for_prefill_ahead_and_for_a_slot_of_four(load: UnitLoad, wait_s: float) -> None:
    assert load.wait_s(4) == wait_s


def test_prefill_is_of_what_is_not_cached_after_what_is() -> None:
    costs = ModelCosts(StepCost(0.5, 0.01, 0.001), StepCost(9.0, 9.0, 9.0))
    assert prefill_s(costs, 12, 10, 8) == pytest.approx(0.5 + 2 * 0.01 + (10 + 11) * 0.001)


candidates = st.builds(
    Candidate,
    unit=st.text(max_size=2),
    num_tokens=st.just(1000),
    num_cached_tokens=st.integers(0, 999),
    wait_s=st.floats(0, 100),
    prefill_s=st.floats(0, 100),
    num_sequences=st.integers(0, 9),
    fits=st.booleans(),
    is_connected=st.booleans(),
    is_awake=st.booleans(),
)


@given(st.lists(candidates, min_size=1, max_size=6), st.integers(0, 1000))
def test_the_choice_is_left_by_the_filter_and_nearly_the_best(units: list[Candidate], turn: int) -> None:
    left, choice = filtered(units), choose(units, turn)
    assert any(choice.candidate is one for one in left)
    assert choice.candidate.score_s <= min(one.score_s for one in left) * 1.25 + 0.005 + 1e-9
    for one in left:
        if one.score_s <= choice.candidate.score_s:
            assert one.num_cached_tokens <= choice.candidate.num_cached_tokens


@given(st.lists(candidates, max_size=5), candidates, st.integers(0, 1000))
def test_a_request_never_moves_to_a_later_first_token_unless_its_unit_is_left_out(
    others: list[Candidate], current: Candidate, turn: int
) -> None:
    better = choose_better(others, current, turn)
    if better is not None and any(one is current for one in filtered([*others, current])):
        assert better.candidate.first_token_s < current.first_token_s


def test_a_unit_without_costs_is_taken_to_be_as_fast_as_the_first_that_has_them() -> None:
    slow, fast = (ModelCosts(StepCost(seconds, 0.0, 0.0), StepCost(seconds, 0.0, 0.0)) for seconds in (2.0, 1.0))
    assert assumed_costs([None, slow, fast, None]) == [slow, slow, fast, slow]
    assert assumed_costs([None, None]) == [UNMEASURED, UNMEASURED]
