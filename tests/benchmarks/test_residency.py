"""The benchmark of residency on a tiny trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.residency import (
    BLOCK,
    LOAD,
    NUM_UNITS,
    OURS,
    STRATEGIES,
    TURNS,
    by_session,
    by_turns,
    least_loaded,
    most_cached,
    outcome,
    prefill_s,
    sketches_of,
)
from loadtest.traces import MOONCAKE_BLOCK, read_trace
from router.unit_choice import Candidate

NUM_SESSIONS, NUM_TURNS = 40, 4


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Sessions one after the other; each turn adds a block of 512 tokens to the prompt."""
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        for number in range(NUM_SESSIONS * NUM_TURNS):
            session, turn = divmod(number, NUM_TURNS)
            hash_ids = [100 * session + index for index in range(turn + 1)]
            line = {"timestamp": number * 1000, "input_length": len(hash_ids) * MOONCAKE_BLOCK, "output_length": 5}
            file.write(json.dumps({**line, "hash_ids": hash_ids}) + "\n")
    return path


def test_times_are_scaled_to_the_load(trace: Path) -> None:
    arrivals = read_trace(trace)
    sketches = sketches_of(arrivals, LOAD)
    busy_s = sum(prefill_s(one.num_input) for one in arrivals)
    assert busy_s / (NUM_UNITS * sketches[-1].at_s) == pytest.approx(LOAD)


def test_every_strategy_serves_all_requests_and_residency_finds_more_than_turns(trace: Path) -> None:
    arrivals = read_trace(trace)
    outcomes = {strategy.name: outcome(arrivals, strategy, 0.1) for strategy in STRATEGIES}
    assert all(one.num_failed == 0 for one in outcomes.values())
    assert outcomes[OURS.name].cached > outcomes[TURNS.name].cached


def unit(num_cached: int, num_sequences: int) -> Candidate:
    return Candidate("u", 100, num_cached, 0.0, 1.0, num_sequences)


def test_the_strategies_that_ours_is_compared_with() -> None:
    units = [unit(0, 3), unit(50, 2), unit(50, 1), unit(10, 1)]
    assert [by_turns(units, (), turn) for turn in range(5)] == [0, 1, 2, 3, 0]
    assert [least_loaded(units, (), turn) for turn in range(4)] == [2, 2, 2, 3]
    assert [most_cached(units, (), turn) for turn in range(4)] == [2] * 4
    blocks = [bytes([index]) * 16 for index in range(3 * MOONCAKE_BLOCK // BLOCK)]
    assert by_session(units, blocks, 0) == by_session(units, blocks[:-1], 5), "later blocks do not count"
    assert len({by_session(units, [bytes([value]) * 16], 0) for value in range(20)}) == len(units)
    assert by_session(units, (), 6) == 2, "without a block, by turns"
