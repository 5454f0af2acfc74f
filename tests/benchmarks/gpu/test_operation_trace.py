import math

import torch

from benchmarks.gpu.operation_trace import OperationTrace, TracedTensor, first_difference, first_not_finite


def traced(*norms: float) -> list[TracedTensor]:
    return [TracedTensor(f"mm out{number} [2]", norm) for number, norm in enumerate(norms)]


def test_every_tensor_of_floats_is_traced_with_its_norm_and_memory_that_was_not_written_is_not() -> None:
    with OperationTrace() as trace, torch.inference_mode():
        target = torch.empty(2, 2)
        target.copy_(torch.eye(2, dtype=torch.bfloat16))
        torch.mm(target.view(2, 2), target, out=torch.empty(2, 2))
        torch.arange(3)
    tensors = trace.tensors()
    assert [one.name for one in tensors if one.name.startswith(("copy_", "mm"))] == [
        "copy_ in1 [2, 2]", "copy_ out0 [2, 2]", "mm in0 [2, 2]", "mm in1 [2, 2]", "mm out0 [2, 2]",
    ]  # fmt: skip
    assert {one.norm for one in tensors} == {math.sqrt(2)}
    assert trace.logits is target


def test_what_is_not_finite_is_found_where_it_is_first_read_or_written() -> None:
    with OperationTrace() as trace:
        zero = torch.zeros(2)
        one = zero + 1
        one.div_(zero)
        one.neg()
    tensors = trace.tensors()
    at = first_not_finite(tensors)
    assert at is not None and tensors[at].name == "div_ out0 [2]"
    assert all(tensor.is_finite for tensor in tensors[:at])
    assert first_not_finite(tensors[:at]) is None


def test_the_first_norm_that_differs_by_more_than_a_part_is_found() -> None:
    expected = traced(1.0, 2.0, 4.0)
    assert first_difference(traced(1.01, 1.99, 4.0), expected, 0.02) is None
    assert first_difference(traced(1.0, 2.1, 9.0), expected, 0.02) == 1
    assert first_difference(traced(1.0, 2.0, math.nan), expected, 0.02) == 2


def test_a_trace_of_other_operations_differs_from_where_they_begin() -> None:
    expected = traced(1.0, 2.0)
    assert first_difference(expected[:1], expected, 0.02) == 1
    assert first_difference([*expected, *traced(3.0)], expected, 0.02) == 2
    assert first_difference([TracedTensor("add out0 [2]", 1.0), expected[1]], expected, 0.02) == 0
