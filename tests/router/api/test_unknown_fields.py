"""What a message has beyond its descriptor is named: fields of vLLM, of newer versions, and of another wire type."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message

from muxmesh.errors import InvalidRequest
from muxmesh.v1 import inference_pb2
from router.api.unknown_fields import refuse_unknown_fields, reserved_fields

REQUEST = inference_pb2.GenerateRequest
VLLM_ONLY = {
    "media": 14,
    "lora_name": 15,
    "decoding.json": 6,
    "decoding.regex": 7,
    "decoding.choice": 8,
    "decoding.grammar": 9,
    "decoding.json_object": 10,
    "decoding.structural_tag": 11,
    "response.prompt_candidates.token_ids": 2,
    "response.prompt_candidates.all": 3,
    "response.output_candidates.token_ids": 2,
    "response.output_candidates.all": 3,
    "kv.kv_transfer_params": 3,
    "kv.ec_transfer_params": 4,
}
"""Path → number of the fields of vLLM's requests that the mesh does not support."""


def with_bytes(path: str, raw: bytes) -> inference_pb2.GenerateRequest:
    """A request with ``raw`` appended to the message that holds the field ``path``."""
    message = inference_pb2.GenerateRequest(text="hi")
    target: Any = message
    for name in path.split(".")[:-1]:
        target = getattr(target, name)
    target.MergeFromString(raw)
    return message


def refusal(message: Message) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        refuse_unknown_fields(message)
    return caught.value.field, caught.value.problem


@pytest.mark.parametrize("path", VLLM_ONLY)
def test_a_field_of_vllm_that_is_not_supported_is_refused_by_its_name(path: str) -> None:
    number = VLLM_ONLY[path]
    message = with_bytes(path, bytes([number << 3 | 2, 1, 0]))  # one byte, as for a string or a message
    assert refusal(message) == (path, f"(field {number}) is not supported by this mesh; leave it out")


@pytest.mark.parametrize("path", ["(number 1023)", "sampling.(number 1023)", "kv.(number 1023)"])
def test_a_field_of_a_newer_version_is_refused_by_its_number(path: str) -> None:
    message = with_bytes(path, b"\xf8\x3f\x01")
    assert refusal(message) == (path, "is a field that this mesh does not know; it may be of a newer version")


def test_an_unknown_field_of_an_entry_is_refused_with_its_index() -> None:
    message = REQUEST()
    message.chat.messages.add(role="user")
    message.chat.messages.add().MergeFromString(b"\xf8\x3f\x01")
    assert refusal(message)[0] == "chat.messages[1].(number 1023)"


@pytest.mark.parametrize(
    ("path", "raw", "kind"),
    [
        ("sampling.seed", b"\x2a\x01\x00", "int64"),
        ("temperature", b"\x28\x00", "float"),
        ("response.output_candidates", b"\x38\x05", "CandidateTokens"),
        ("kv.swap_format", b"\xa2\x06\x00", "enum"),
    ],
)
def test_a_known_field_with_another_wire_type_is_refused_by_its_name(path: str, raw: bytes, kind: str) -> None:
    """A parser keeps it as an unknown field, and the request would run without it."""
    assert refusal(with_bytes(path, raw)) == (path, f"is sent with another wire type than that of {kind}")


def test_a_request_of_known_fields_passes() -> None:
    decoding = inference_pb2.DecodingOptions(logit_bias={3: 1.0}, allowed_token_ids=[3])
    message = REQUEST(text="hi", decoding=decoding)
    message.chat.messages.add(role="user", content="hi")
    refuse_unknown_fields(message)


def test_every_reserved_number_of_the_public_api_has_its_name() -> None:
    found = {name: reserved_fields(kind) for name, kind in inference_pb2.DESCRIPTOR.message_types_by_name.items()}
    assert {name: fields for name, fields in found.items() if fields} == {
        "GenerateRequest": {14: "media", 15: "lora_name"},
        "DecodingOptions": {
            6: "json", 7: "regex", 8: "choice", 9: "grammar", 10: "json_object", 11: "structural_tag",
        },
        "CandidateTokens": {2: "token_ids", 3: "all"},
        "KvOptions": {3: "kv_transfer_params", 4: "ec_transfer_params"},
        "FinishInfo": {6: "kv_transfer_params", 8: "ec_transfer_params"},
    }  # fmt: skip
