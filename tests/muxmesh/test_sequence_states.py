"""Seconds by state, of all sequences together, with times that are exact in binary."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.sequence_states import SequenceState, SequenceStates

BATCHED, PAUSED, SWAPPED = SequenceState.BATCHED, SequenceState.PAUSED, SequenceState.SWAPPED
SWAPPING_OUT, SWAPPING_IN = SequenceState.SWAPPING_OUT, SequenceState.SWAPPING_IN


def test_a_sequence_that_is_displaced_and_swapped_has_the_seconds_of_each_state() -> None:
    states = SequenceStates()
    states.begin(7, BATCHED, 100.0)
    for at_s, state in ((101.0, PAUSED), (103.0, BATCHED), (104.0, PAUSED), (104.5, SWAPPING_OUT), (105.0, SWAPPED)):
        states.enter(7, state, at_s)
    for at_s, state in ((109.0, SWAPPING_IN), (109.25, PAUSED), (109.25, BATCHED)):
        states.enter(7, state, at_s)
    assert states.seconds(111.0) == {
        SequenceState.PREFILL: 0.0, BATCHED: 1 + 1 + 1.75, PAUSED: 2.5, SWAPPING_OUT: 0.5, SWAPPED: 4.0,
        SWAPPING_IN: 0.25,
    }  # fmt: skip


def test_each_sequence_has_seconds_of_its_own() -> None:
    states = SequenceStates()
    states.begin(1, BATCHED, 0.0)
    states.begin(2, BATCHED, 1.0)
    states.enter(1, PAUSED, 2.0)
    states.enter(1, BATCHED, 5.0)
    assert states.seconds_of(1, 9.0) == {BATCHED: 2.0 + 4.0, PAUSED: 3.0}
    assert states.seconds_of(2, 9.0) == {BATCHED: 8.0}
    states.end(1, 9.0)
    with pytest.raises(KeyError):
        states.seconds_of(1, 9.0)


def test_a_state_that_is_entered_twice_is_one_stay() -> None:
    states = SequenceStates()
    states.begin(1, BATCHED, 0.0)
    states.enter(1, SWAPPED, 1.0)
    states.enter(1, SWAPPED, 2.0)
    assert states.seconds(4.0)[SWAPPED] == 3.0


def test_a_sequence_that_has_ended_enters_no_state() -> None:
    states = SequenceStates()
    states.begin(1, BATCHED, 0.0)
    states.end(1, 2.0)
    states.enter(1, SWAPPED, 3.0)
    assert len(states) == 0
    assert {state: s for state, s in states.seconds(9.0).items() if s} == {BATCHED: 2.0}


@given(st.integers(0, 2**32))
def test_the_seconds_of_all_states_are_those_that_sequences_were_there(seed: int) -> None:
    rng, states, now_s = random.Random(seed), SequenceStates(), 0.0
    present, sequence_s = set[int](), 0.0
    for step in range(60):
        elapsed_s = rng.randrange(8) / 4
        now_s, sequence_s = now_s + elapsed_s, sequence_s + len(present) * elapsed_s
        choice = rng.random()
        if choice < 0.3 or not present:
            states.begin(step, rng.choice(list(SequenceState)), now_s)
            present.add(step)
        elif choice < 0.5:
            ending = rng.choice(sorted(present))
            states.end(ending, now_s)
            present.remove(ending)
        else:
            states.enter(rng.choice(sorted(present)), rng.choice(list(SequenceState)), now_s)
        states.check_integrity()
        assert len(states) == len(present)
    assert sum(states.seconds(now_s).values()) == sequence_s
