"""Every error about a request names the field as a client sends it: `stopping.stop_strings[1]`, not `stop_strings`.

The tables are compared with the descriptors: a new field needs an entry.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from muxmesh.errors import InvalidRequest
from muxmesh.rpc.message_parser import parse
from muxmesh.v1 import inference_pb2
from router.api.generate_messages import request_from_message
from router.request_validation import resolve, validate
from tests.support.pipeline_parts import served_model
from tests.support.protobuf_wire import varint

REQUEST = inference_pb2.GenerateRequest
MODEL = served_model(max_model_len=100)
MAX_PROMPT_BYTES = 300
NAN = float("nan")
_FIXED64, _LENGTH = 1, 2


def leaf_fields(descriptor: Descriptor, numbers: tuple[int, ...] = (), path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and numbers of each field that is no message. An entry of a repeated message is the first one."""
    for field in descriptor.fields:
        nested, at = field.message_type, (*numbers, field.number)
        if nested is None or nested.GetOptions().map_entry:
            yield path + field.name, at
        else:
            yield from leaf_fields(nested, at, f"{path}{field.name}{'[0]' if field.is_repeated else ''}.")


LEAVES = dict(leaf_fields(REQUEST.DESCRIPTOR))


def wrapped(numbers: tuple[int, ...], inner: bytes, wire_type: int = _LENGTH) -> bytes:
    """``inner`` as the value of the field at the end of ``numbers``, inside the messages before it."""
    tag = varint(numbers[-1] << 3 | wire_type)
    value = tag + (varint(len(inner)) if wire_type == _LENGTH else b"") + inner
    return wrapped(numbers[:-1], value) if len(numbers) > 1 else value


def refusal(raw: bytes, num_tokens: int = 5) -> str:
    """The field that the router names for a request message whose prompt has ``num_tokens``."""
    with pytest.raises(InvalidRequest) as caught:
        request = request_from_message(parse(REQUEST, raw))
        validate(request, MODEL, MAX_PROMPT_BYTES)
        resolve(request, MODEL, [5] * num_tokens, 0, 0.0)
    return caught.value.field


@pytest.mark.parametrize("path", LEAVES)
def test_a_field_with_another_wire_type_is_named_by_its_path(path: str) -> None:
    raw = wrapped(LEAVES[path], struct.pack("<d", 1.0), _FIXED64)
    assert refusal(REQUEST(model="m").SerializeToString() + raw) == path


@pytest.mark.parametrize(
    "path",
    [path for path in LEAVES if path.split(".")[-1] in ("text", "role", "content", "request_id", "model")]
    + ["stopping.stop_strings", "kv.cache_salt", "session_id"],
)
def test_a_string_that_is_not_utf_8_is_named_by_its_path(path: str) -> None:
    expected = f"{path}[0]" if path == "stopping.stop_strings" else path
    assert refusal(wrapped(LEAVES[path], b"\xff")) == expected


TEXT: dict[str, Any] = {"text": "hi"}
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "request_id": ({**TEXT, "request_id": "\0"}, "request_id"),
    "text": ({"text": ""}, "text"),
    "token_ids.ids": ({"token_ids": {"ids": [5, 999]}}, "token_ids.ids[1]"),
    "chat.messages[0].role": (
        {"chat": {"messages": [{"role": "user", "content": "x"}, {"role": "tool"}]}},
        "chat.messages[1].role",
    ),
    "chat.messages[0].content": ({"chat": {"messages": [{"role": "user", "content": "x" * 301}]}}, "chat.messages"),
    "temperature": ({**TEXT, "temperature": NAN}, "temperature"),
    "sampling.num_sequences": ({**TEXT, "sampling": {"num_sequences": 2**32 - 1}}, "sampling.num_sequences"),
    "sampling.top_p": ({**TEXT, "sampling": {"top_p": 0.0}}, "sampling.top_p"),
    "sampling.min_p": ({**TEXT, "sampling": {"min_p": -0.5}}, "sampling.min_p"),
    "sampling.seed": ({**TEXT, "sampling": {"seed": -1}}, "sampling.seed"),
    "decoding.presence_penalty": ({**TEXT, "decoding": {"presence_penalty": 3}}, "decoding.presence_penalty"),
    "decoding.frequency_penalty": (
        {**TEXT, "decoding": {"frequency_penalty": float("-inf")}},
        "decoding.frequency_penalty",
    ),
    "decoding.repetition_penalty": ({**TEXT, "decoding": {"repetition_penalty": 0.0}}, "decoding.repetition_penalty"),
    "decoding.logit_bias": ({**TEXT, "decoding": {"logit_bias": {5: NAN}}}, "decoding.logit_bias[5]"),
    "decoding.allowed_token_ids": (
        {**TEXT, "decoding": {"allowed_token_ids": [5, 2**32 - 1]}},
        "decoding.allowed_token_ids[1]",
    ),
    "stopping.max_new_tokens": ({**TEXT, "stopping": {"max_new_tokens": 0}}, "stopping.max_new_tokens"),
    "stopping.min_new_tokens": ({**TEXT, "stopping": {"min_new_tokens": 99}}, "stopping.min_new_tokens"),
    "stopping.stop_token_ids": ({**TEXT, "stopping": {"stop_token_ids": [5, 999]}}, "stopping.stop_token_ids[1]"),
    "stopping.stop_strings": ({**TEXT, "stopping": {"stop_strings": ["x", ""]}}, "stopping.stop_strings[1]"),
    "response.prompt_candidates.top_n": (
        {**TEXT, "response": {"prompt_logprobs": True, "prompt_candidates": {"top_n": 21}}},
        "response.prompt_candidates.top_n",
    ),
    "response.output_candidates.top_n": (
        {**TEXT, "response": {"output_logprobs": True, "output_candidates": {"top_n": 21}}},
        "response.output_candidates.top_n",
    ),
    "kv.cache_salt": ({**TEXT, "kv": {"cache_salt": "x" * 257}}, "kv.cache_salt"),
    "kv.swap_format": ({**TEXT, "kv": {"swap_format": 9}}, "kv.swap_format"),
    "truncate_prompt_tokens": ({**TEXT, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    "session_id": ({**TEXT, "session_id": ""}, "session_id"),
    "expected_output_tokens": ({**TEXT, "expected_output_tokens": 0}, "expected_output_tokens"),
}
"""Path → a message whose only fault is in that field, and the field that the error names."""
ANY_VALUE = {
    "sampling.top_k",
    "stopping.include_stop_strings",
    "stopping.ignore_eos",
    "response.prompt_token_ids",
    "response.prompt_logprobs",
    "response.output_text",
    "response.output_token_ids",
    "response.output_logprobs",
    "response.skip_special_tokens",
    "response.scheduling",
    "kv.bypass_prefix_cache",
    "priority",
}
"""Fields of which every value is valid."""


def test_every_field_has_an_invalid_value_in_the_table_or_none_at_all() -> None:
    assert set(LEAVES) == set(INVALID) | ANY_VALUE | {"model"}, "an unknown model is NOT_FOUND, for any name"


@pytest.mark.parametrize("path", INVALID)
def test_an_invalid_value_is_named_by_its_path(path: str) -> None:
    fields, expected = INVALID[path]
    assert refusal(REQUEST(**fields).SerializeToString()) == expected
    assert expected.startswith(path.partition("[")[0])


@pytest.mark.parametrize("path", ["temperature", "sampling.top_p", "sampling.min_p", "decoding.presence_penalty",
                                  "decoding.frequency_penalty", "decoding.repetition_penalty"])  # fmt: skip
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf"), 3e38])
def test_no_number_beyond_all_bounds_is_accepted(path: str, value: float) -> None:
    message: Any = REQUEST(**TEXT)
    *parents, name = path.split(".")
    setattr(getattr(message, parents[0]) if parents else message, name, value)
    assert refusal(message.SerializeToString()) == path


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (TEXT, "text"),
        ({"token_ids": {"ids": [5]}}, "token_ids.ids"),
        ({"chat": {"messages": [{"role": "user", "content": "x"}]}}, "chat.messages"),
    ],
)
@pytest.mark.parametrize("num_tokens", [0, 100])
def test_a_prompt_of_no_token_or_too_many_is_named_by_its_field(
    fields: dict[str, Any], expected: str, num_tokens: int
) -> None:
    assert refusal(REQUEST(**fields).SerializeToString(), num_tokens) == expected
