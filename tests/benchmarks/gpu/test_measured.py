from typing import Any

import pytest

from benchmarks.gpu.measured import (
    decode_bytes,
    decode_table,
    engine_table,
    failed_runs,
    prefill_flop,
    prefill_table,
    speedup,
    three_models_table,
)

FIGURES: dict[str, Any] = {
    "ceilings": {"copy_bytes_s": 1e12, "flop_s": 1e15},
    "load, graphs True": {
        "weight_bytes": 2_000_000_000, "kv_bytes_per_token": 1000, "parameters": 1_000_000,
        "spec": {"layers": 1, "heads": 1, "head_dim": 1},
    },
    "decode": [{"batch": 4, "context": 500, "graphs": True, "num_steps": 1, "ms": 4.0}],
    "whole engine": [{"batch": 16, "max_steps": 8, "ms": 1.25, "runner_ms": 1.0}],
    "prefill": [{"num_tokens": 1000, "ms": 2.0}],
    "three models": {
        "tokens_per_s_alone": [10.0, 20.0],
        "under MPS": [{"shares": (40, 30), "tokens_per_s": [5.0, 15.0], "speed-up": 1.25}],
    },
}  # fmt: skip


def test_a_decode_step_reads_all_weights_and_the_kv_of_each_sequence() -> None:
    assert decode_bytes(1000, 10, batch=3, context=7) == 1000 + 3 * 7 * 10


def test_a_prompt_multiplies_with_every_layer_but_only_one_row_with_the_vocabulary() -> None:
    spec = {"layers": 2, "heads": 3, "head_dim": 4}
    assert prefill_flop(spec, 110, 10, 5) == 2 * 100 * 5 + 2 * (4 * 3 * 4 * 25 / 2) + 2 * 10


def test_workers_that_only_share_time_have_a_speed_up_of_one() -> None:
    assert speedup([1.0, 2.0, 5.0, 1.0], [4.0, 8.0, 20.0, 4.0]) == pytest.approx(1.0)
    assert speedup([4.0, 8.0], [4.0, 8.0]) == 2.0


def test_tables_show_shares_of_the_ceilings() -> None:
    assert decode_table(FIGURES).splitlines()[1].split() == ["4", "500", "yes", "1", "4.000", "1000", "0.50"]
    assert engine_table(FIGURES).splitlines()[1].split() == ["16", "8", "1.250", "1.000", "20%", "12800"]
    assert prefill_table(FIGURES, 0).splitlines()[1].split() == ["1000", "2.000", "500000", "0.00"]
    assert "1.25 times the work of one after another" in three_models_table(FIGURES)


def test_a_part_that_failed_has_no_table() -> None:
    assert decode_table({}) == engine_table({}) == prefill_table({"ceilings": {}}, 0) == three_models_table({}) == ""


def test_workers_of_which_runs_failed_are_named_with_the_first_reason() -> None:
    good = {"runs": 5, "failed_runs": 0, "first_failure": ""}
    bad = {"runs": 5, "failed_runs": 4, "first_failure": "not finite"}
    assert failed_runs({"alone": [good, good], "together": [good, bad]}) == [
        "together, worker 1: 4 of 5 runs failed: not finite"
    ]
    assert failed_runs({"alone": [good]}) == []
