"""What a peer of the value checks reports, on interpreted kernels and a tiny model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu.value_operations import ValueOperations

LOAD = {
    "model": "tiny", "dtype": "float32", "pool_tokens": 512, "max_num_seqs": 2, "step_tokens": 32, "max_len": 64,
}  # fmt: skip
STEPS = {"prompt": 20, "batch": 2, "context": 20, "repeats": 1}


@pytest.fixture(scope="module")
def peer() -> ValueOperations:
    operations = ValueOperations()
    operations.run("load", LOAD, ())
    return operations


def run(peer: ValueOperations, operation: str, **arguments: Any) -> Any:
    return peer.run(operation, arguments, ())


@contextlib.contextmanager
def damaged(weight: torch.Tensor, value: float) -> Iterator[None]:
    """While the block runs, one element is ``value``."""
    before = weight[0, 0].clone()
    weight[0, 0] = value
    yield
    weight[0, 0] = before


def test_each_product_of_a_layer_and_of_the_logits_is_compared_with_f32(peer: ValueOperations) -> None:
    found = run(peer, "products", rows=[1, 20])
    names = ["0.qkv", "0.o", "0.gate_up", "0.down", "lm_head"]
    assert [(one["name"], one["rows"]) for one in found] == [(name, rows) for rows in (1, 20) for name in names]
    assert all(one["is_finite"] and one["error"] < 1e-5 for one in found)
    with damaged(peer.weights["0.o"], torch.nan):
        (bad,) = (one for one in run(peer, "products", rows=[1]) if not one["is_finite"])
    assert (bad["name"], bad["f32_is_finite"]) == ("0.o", False)


def test_weights_of_the_generator_of_the_device_are_finite(peer: ValueOperations) -> None:
    assert run(peer, "generated") == []


def test_norm_and_gate_are_compared_with_f32(peer: ValueOperations) -> None:
    found = run(peer, "row_operations", rows=20)
    assert [one["name"] for one in found] == ["norm", "gate"]
    assert all(one["is_finite"] and one["error"] < 1e-5 for one in found)


def test_steps_are_the_same_in_every_process_and_after_each_other(peer: ValueOperations) -> None:
    first, again = run(peer, "steps", **STEPS), run(peer, "steps", **STEPS)
    other = ValueOperations()
    other.run("load", LOAD, ())
    assert first == again == run(other, "steps", **STEPS)
    assert first["failures"] == []
    assert first["token"] == first["largest"][0]
    assert len(first["decode tokens"]) == 2
    assert [norm for _, norm in first["trace"] if norm is None] == []


def test_a_step_that_is_not_finite_shows_which_tensor_was_the_first(peer: ValueOperations) -> None:
    with damaged(peer.weights["1.down"], torch.inf):
        found = run(peer, "steps", **STEPS)
    assert len(found["failures"]) == 3, "the prompt, the decode step and the traced prompt"
    assert found["token"] is None
    assert next(name for name, norm in found["trace"] if norm is None) == "addmm_ in2 [96, 48]"
