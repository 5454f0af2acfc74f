"""The operations that checks and benchmarks run on a card, on interpreted kernels and a tiny model."""

from typing import Any

import pytest
import torch

from benchmarks.gpu.engine_operations import EngineOperations

LOAD = {
    "model": "tiny", "dtype": "float32", "pool_tokens": 512, "max_num_seqs": 2, "step_tokens": 32, "max_len": 64,
    "max_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> EngineOperations:
    operations = EngineOperations()
    operations.run("load", LOAD, ())
    return operations


def run(engine: EngineOperations, operation: str, **arguments: Any) -> Any:
    return engine.run(operation, arguments, ())


def test_the_first_token_of_a_run_of_steps_is_that_of_a_single_step(engine: EngineOperations) -> None:
    single = run(engine, "decode", batch=2, context=20, num_steps=1, count=1)
    several = run(engine, "decode", batch=2, context=20, num_steps=2, count=1)
    assert (single["steps"], several["steps"]) == (1, 2)
    assert [tokens[0] for tokens in several["tokens"]] == [tokens[0] for tokens in single["tokens"]]
    assert single["ms"] > 0


def test_outputs_do_not_depend_on_the_other_sequences_of_a_step(engine: EngineOperations) -> None:
    (alone,) = run(engine, "generate", batch=1, prompt_tokens=9, num_tokens=3)
    together = run(engine, "generate", batch=2, prompt_tokens=9, num_tokens=3)
    assert len(alone) == 3
    assert together[0] == alone


def test_prompts_and_decoding_are_counted_in_tokens_per_second(engine: EngineOperations) -> None:
    assert run(engine, "prefill", num_tokens=20, count=1)["ms"] > 0
    for work in (
        {"prompt": 20, "batch": 0, "context": 0, "num_steps": 1},
        {"prompt": 0, "batch": 2, "context": 20, "num_steps": 2},
    ):
        found = run(engine, "work_until", seconds=0.01, **work)
        assert found["tokens_per_s"] > 0
        assert (found["runs"] > 1, found["failed_runs"], found["first_failure"]) == (True, 0, "")


def test_runs_that_fail_are_counted_and_work_goes_on(engine: EngineOperations) -> None:
    engine.weights["norm"].fill_(torch.nan)
    found = run(engine, "work_until", seconds=0.01, prompt=20, batch=0, context=0, num_steps=1)
    engine.weights["norm"].fill_(1)
    assert found["tokens_per_s"] > 0
    assert found["failed_runs"] == found["runs"] > 1
    assert "logits that are not finite" in found["first_failure"]


def test_blocks_of_different_sequences_differ(engine: EngineOperations) -> None:
    first, second = engine._tables(2, 40)
    assert len(first) == 3
    assert not set(first) & set(second)
