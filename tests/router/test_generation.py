import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest

from muxmesh.types import FinishReason, Sampling
from router import generation
from router.generation import FinishKind, GenerationRequest, ModelCounters, OutputOptions, StoppingOptions, TextPrompt

VALUES = [one for _, one in inspect.getmembers(generation, is_dataclass) if one.__module__ == generation.__name__]


def test_an_output_ends_for_an_engine_s_reason_or_by_a_stop_string() -> None:
    assert {kind.name for kind in FinishKind} == {reason.name for reason in FinishReason} | {"STOP_STRING"}


@pytest.mark.parametrize("kind", [one for one in VALUES if one is not ModelCounters], ids=lambda kind: kind.__name__)
def test_values_that_cross_module_boundaries_are_frozen(kind: Any) -> None:
    value: Any = kind(**dict.fromkeys(one.name for one in fields(kind)))
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(kind)[0].name, "x")


def test_a_request_without_options_samples_one_sequence_and_returns_its_text_only() -> None:
    request = GenerationRequest("m", TextPrompt("hi"))
    assert (request.num_sequences, request.seed, request.sampling) == (1, None, Sampling())
    assert request.stopping == StoppingOptions(None, 0, (), (), False, False)
    assert request.output == OutputOptions(True, False, False, True, False)


def test_a_request_is_hashable() -> None:
    first, second = (GenerationRequest("m", TextPrompt("hi")) for _ in range(2))
    assert first == second and hash(first) == hash(second)


def test_every_counter_starts_at_zero() -> None:
    assert {getattr(ModelCounters(), one.name) for one in fields(ModelCounters)} == {0}
