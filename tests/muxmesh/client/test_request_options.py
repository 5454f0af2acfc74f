"""Options as fields of the request message, and what the wire cannot carry."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from muxmesh.client import OutputOptions, RequestOptions
from muxmesh.client.request_options import request_of
from muxmesh.errors import InvalidRequest
from muxmesh.v1 import inference_pb2

ALL: RequestOptions = {
    "model": "m", "max_new_tokens": 5, "min_new_tokens": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.75,
    "min_p": 0.25, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5,
    "logit_bias": {3: -1.0}, "allowed_token_ids": [3, 4], "seed": (1 << 63) - 1, "num_sequences": 2,
    "stop_strings": ["a", "b"], "stop_token_ids": [6], "include_stop_strings": True, "ignore_eos": True,
    "truncate_prompt_tokens": 8, "skip_special_tokens": False, "logprobs": 0, "prompt_logprobs": 1, "cache_salt": "s",
    "bypass_prefix_cache": True, "kv_swap_format": "int8", "priority": -3, "expected_output_tokens": 9,
    "explain_scheduling": True, "request_id": "r", "timeout_s": 2.0,
}  # fmt: skip


def with_option(name: str, value: Any) -> inference_pb2.GenerateRequest:
    options: dict[str, Any] = {name: value}
    return request_of(RequestOptions(**options))  # type: ignore[typeddict-item]


def test_a_request_without_options_leaves_every_default_to_the_mesh() -> None:
    expected = inference_pb2.GenerateRequest(response=inference_pb2.ResponseOptions(output_token_ids=True))
    assert request_of({}) == expected
    for name in RequestOptions.__annotations__:
        assert with_option(name, None) == expected


def test_every_option_has_its_field_in_the_request() -> None:
    request = request_of(ALL)
    assert request == inference_pb2.GenerateRequest(
        request_id="r",
        model="m",
        temperature=0.5,
        sampling=inference_pb2.SamplingOptions(num_sequences=2, top_k=4, top_p=0.75, min_p=0.25, seed=(1 << 63) - 1),
        decoding=inference_pb2.DecodingOptions(
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            logit_bias={3: -1.0},
            allowed_token_ids=[3, 4],
        ),
        stopping=inference_pb2.StoppingOptions(
            max_new_tokens=5,
            min_new_tokens=2,
            stop_token_ids=[6],
            stop_strings=["a", "b"],
            include_stop_strings=True,
            ignore_eos=True,
        ),
        response=inference_pb2.ResponseOptions(
            output_token_ids=True,
            prompt_token_ids=True,
            skip_special_tokens=False,
            output_logprobs=True,
            prompt_logprobs=True,
            prompt_candidates=inference_pb2.CandidateTokens(top_n=1),
            scheduling=True,
        ),
        kv=inference_pb2.KvOptions(
            cache_salt="s", bypass_prefix_cache=True, swap_format=inference_pb2.KV_SWAP_FORMAT_INT8
        ),
        truncate_prompt_tokens=8,
        priority=-3,
        expected_output_tokens=9,
    )
    assert ALL.keys() == RequestOptions.__annotations__.keys()
    assert set(unset_fields(request)) == {"text", "token_ids", "chat", "session_id", "output_candidates", "output_text"}


def unset_fields(message: Message) -> Iterator[str]:
    """A field that is new in the proto appears here until the client has an option for it."""
    present = {field.name: value for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.name not in present:
            yield field.name
        elif isinstance(present[field.name], Message):
            yield from unset_fields(present[field.name])


def test_generate_takes_all_options_of_a_stream_but_the_number_of_sequences() -> None:
    assert RequestOptions.__annotations__.keys() - OutputOptions.__annotations__.keys() == {"num_sequences"}


@pytest.mark.parametrize(("stop", "expected"), [("end", ["end"]), (["a", "b"], ["a", "b"]), ((), [])])
def test_one_stop_string_needs_no_list(stop: Any, expected: list[str]) -> None:
    assert list(request_of({"stop_strings": stop}).stopping.stop_strings) == expected


@pytest.mark.parametrize(("kv_format", "number"), [(None, 0), ("raw", 1), ("int8", 2)])
def test_the_swap_format_is_sent_by_its_number(kv_format: Any, number: int) -> None:
    assert request_of({"kv_swap_format": kv_format}).kv.swap_format == number


def test_an_empty_list_of_allowed_tokens_is_refused_since_on_the_wire_it_would_allow_all() -> None:
    with pytest.raises(InvalidRequest, match=r"^allowed_token_ids: is empty: no token .*; None allows all$"):
        request_of({"allowed_token_ids": []})


def test_a_top_k_of_minus_one_is_off() -> None:
    assert request_of({"top_k": -1}) == request_of({"top_k": 0})


def test_numbers_of_numpy_are_numbers() -> None:
    with_numpy: Any = {
        "seed": np.int64(5), "temperature": np.float32(0.5), "stop_token_ids": np.array([1, 2]),
        "logit_bias": {np.int32(3): np.float64(1.0)},
    }  # fmt: skip
    assert request_of(with_numpy) == request_of(
        {"seed": 5, "temperature": 0.5, "stop_token_ids": [1, 2], "logit_bias": {3: 1.0}}
    )


UINT32 = ("min_new_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
BOUNDS: list[tuple[str, int, int]] = [
    *((name, 0, (1 << 32) - 1) for name in UINT32),
    ("max_new_tokens", 1, (1 << 32) - 1),
    ("num_sequences", 1, (1 << 32) - 1),
    ("expected_output_tokens", 1, (1 << 32) - 1),
    ("seed", 0, (1 << 63) - 1),
    ("priority", -(1 << 31), (1 << 31) - 1),
]


@pytest.mark.parametrize(("name", "least", "most"), BOUNDS)
def test_a_number_outside_its_bounds_is_refused_by_its_name(name: str, least: int, most: int) -> None:
    for value in (least - 1, most + 1, 1.5, "1", True):
        with pytest.raises(InvalidRequest) as caught:
            with_option(name, value)
        assert caught.value.field == name
        assert caught.value.problem == f"is {value!r}; a whole number from {least} to {most} is needed"
    for value in (least, most):
        with_option(name, value)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("top_k", -2, "is -2; a whole number from 0 to 4294967295 is needed; -1 is off"),
        ("temperature", "hot", "is 'hot'; a number is needed"),
        ("temperature", True, "is True; a number is needed"),
        ("top_p", [0.5], "is [0.5]; a number is needed"),
        ("ignore_eos", 1, "is 1; True or False is needed"),
        ("model", 5, "is 5; a string is needed"),
        ("request_id", b"r", "is b'r'; a string is needed"),
        ("cache_salt", "\ud800", "is '\\ud800'; text that UTF-8 can encode is needed"),
        ("kv_swap_format", "int4", "is 'int4'; raw or int8 is needed"),
        ("kv_swap_format", ["raw"], "is ['raw']; raw or int8 is needed"),
        ("stop_strings", 5, "is 5; a list is needed"),
        ("stop_strings", ["a", 5], "has 5 in it; a string is needed"),
        ("stop_token_ids", 5, "is 5; a list is needed"),
        ("stop_token_ids", "5", "is '5'; a list is needed"),
        ("stop_token_ids", [3, -1], "has -1 in it; a whole number from 0 to 4294967295 is needed"),
        ("allowed_token_ids", [1 << 32], "has 4294967296 in it; a whole number from 0 to 4294967295 is needed"),
        ("logit_bias", [(3, 1.0)], "is [(3, 1.0)]; a dictionary is needed"),
        ("logit_bias", {-1: 1.0}, "has -1 in it; a whole number from 0 to 4294967295 is needed"),
        ("logit_bias", {3: 1 << 20_000}, "has an integer of 20001 bits in it; a number that a float holds is needed"),
        ("logit_bias", {3: "x"}, "has 'x' in it; a number is needed"),
    ],
)
def test_a_value_that_cannot_be_sent_is_refused_by_the_name_of_its_option(name: str, value: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_option(name, value)
    assert (caught.value.field, caught.value.problem) == (name, problem)


@pytest.mark.parametrize("name", sorted(RequestOptions.__annotations__))
def test_arrays_and_huge_numbers_are_sent_or_refused_by_the_name_of_their_option(name: str) -> None:
    refused = set()
    for value in (np.array([1, 2]), np.array([]), np.array(3), np.array([[1]]), 10**5000, [10**5000], {1: 10**5000}):
        try:
            with_option(name, value)
        except InvalidRequest as error:
            refused.add(error.field)
    assert refused <= {name}


def test_an_error_quotes_at_most_a_hundred_characters() -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_option("temperature", "hot" * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "; did you mean 'max_new_tokens'?"),
        ("temprature", "; did you mean 'temperature'?"),
        ("stop", "; did you mean 'stop_strings'?"),
        ("n", "; did you mean 'num_sequences'?"),
        ("num_predict", "; did you mean 'max_new_tokens'?"),
        ("xyzzy", ""),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(TypeError) as caught:
        with_option(name, 5)
    assert str(caught.value) == f"{name!r} is not an option of a request{hint}"
